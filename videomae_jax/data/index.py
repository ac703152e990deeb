"""The table of a prepared split as arrays on disk, which open in no time however many videos there are.

index/SPLIT-NAME.npy, of each record: `ids` and `id_ends` (see `columns.Texts`), `labels` int32, `hashes`
uint64 (see `sources.hash_of`), `targets` float64 [N, C], if any; and of one in JPEGs `places`, `lengths`
uint64 (of its video, see `ranges`) and `checks` uint32 (see `images`).
"""

import array
import pathlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from videomae_jax import storage
from videomae_jax.data import columns
from videomae_jax.data.sources import SourceError, hash_of

FOLDER = "index"


class Index(NamedTuple):
    """Arrays with a row for each record; see the module. Without JPEGs, or targets, theirs have no row."""

    ids: np.ndarray
    id_ends: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray
    targets: np.ndarray
    places: np.ndarray
    lengths: np.ndarray
    checks: np.ndarray

    def __reduce__(self) -> Any:
        return _again, tuple(map(columns.packed, self))


def _again(*arrays: Any) -> Index:
    return Index(*map(columns.unpacked, arrays))


EMPTY = Index(*(np.zeros(0, np.uint8) for _ in Index._fields))


def make(rows: Iterable[Mapping[str, Any]]) -> Index:
    """The index of lines of the table of records, whose values may be texts."""
    ids, id_ends, labels = bytearray(), array.array("Q"), array.array("i")
    hashes, places, lengths, checks = (array.array(kind) for kind in "QQQI")
    targets: list[list[float]] = []
    for row in rows:
        ids += row["id"].encode()
        id_ends.append(len(ids))
        hashes.append(hash_of(row["id"]))
        labels.append(int(row["label"]))
        if row.get("target"):
            targets.append([float(part) for part in row["target"].split(";")])
        if row.get("place"):
            for column, name in ((places, "place"), (lengths, "length"), (checks, "check")):
                column.append(int(row[name]))
    return Index(
        np.frombuffer(bytes(ids), np.uint8),
        np.array(id_ends, np.uint64),
        np.array(labels, np.int32),
        np.array(hashes, np.uint64),
        np.array(targets, np.float64),
        np.array(places, np.uint64),
        np.array(lengths, np.uint64),
        np.array(checks, np.uint32),
    )


def write(folder: storage.Place, split: str, index: Index) -> None:
    """Writes the files of a split."""
    for name, column in zip(Index._fields, index, strict=True):
        with storage.output(folder / FOLDER / f"{split}-{name}.npy") as path, path.open("wb") as file:
            np.save(file, column)


def read(folder: str, split: str, content: str) -> Index | None:
    """The index of a split, mapped into memory; None: the folder is of a format that had none.

    Args:
        content: hash of the data set; of one in a store (gs://) the index is kept in this machine's cache.

    Raises:
        OSError, ValueError: a file of it is damaged or absent.
        SourceError: it cannot be kept in the cache.
    """
    place = epath.Path(folder) / FOLDER
    if not place.exists():
        return None
    if storage.is_remote(folder):
        local = storage.cache() / FOLDER / content
        for name in _files(split):
            if not (local / name).exists():
                _keep(local / name, (place / name).read_bytes())
        place = local
    return Index(*(columns.mapped(str(pathlib.Path(place) / name)) for name in _files(split)))


def _keep(place: pathlib.Path, content: bytes) -> None:
    try:
        with storage.output(place, writer=uuid.uuid4().hex) as path:
            path.write_bytes(content)
    except OSError as error:
        raise SourceError(
            f"{place} cannot be written ({error.strerror}), and indexes of stores are kept there: free some "
            f"space, or set XDG_CACHE_HOME to another folder"
        ) from None


def _files(split: str) -> Sequence[str]:
    return [f"{split}-{name}.npy" for name in Index._fields]


def differs(index: Index, other: Index) -> bool:
    """Whether two indexes say different things."""
    return any(not np.array_equal(a, b) for a, b in zip(index, other, strict=True))
