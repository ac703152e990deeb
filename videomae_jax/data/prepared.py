"""A prepared data set on disk: ArrayRecord shards that TFDS opens, a manifest, and a table of records.

manifest.json                              what it is: counts, failures, classes, one hash of everything
records.csv                                one line per record: where it is, id, label, size, hashes
NAME-SPLIT.array_record-00000-of-00007     the records, `tf.train.Example`s with the bytes of a video
features.json, dataset_info.json           what TFDS reads
"""

import csv
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from videomae_jax.data.sources import (
    SUFFIXES,
    Record,
    Source,
    SourceError,
    from_csv,
    from_folder,
    split_part,
)

FORMAT = 1
MANIFEST, RECORDS = "manifest.json", "records.csv"
COLUMNS = ("split", "shard", "position", "id", "label", "frames", "fps", "height", "width", "bytes")
COLUMNS += ("sha256", "source_sha256")


def is_prepared(path: str | epath.Path) -> bool:
    """Whether a folder holds a finished data set made by `prepare`."""
    return (epath.Path(path) / MANIFEST).exists()


def read_manifest(path: str | epath.Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        SourceError: there is none, it is damaged, or of a newer format.
    """
    file = epath.Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format"]
    except FileNotFoundError:
        raise SourceError(
            f"{path} holds no {MANIFEST}: it is no prepared data set, or not finished"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{file} is damaged ({error}): prepare the data set again") from None
    if version > FORMAT:
        raise SourceError(
            f"{path} has format {version}, this version reads up to {FORMAT}: update videomae_jax"
        )
    return manifest


def read_rows(path: str | epath.Path) -> list[dict[str, str]]:
    """The lines of the table of records, in order."""
    with (epath.Path(path) / RECORDS).open("r") as file:
        return list(csv.DictReader(file))


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
    """File name of a shard, as TFDS expects it."""
    return f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def records_hash(rows: list[dict[str, Any]]) -> str:
    """One hash of all records: split, id, label and bytes, in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(f"{row['split']}\t{row['id']}\t{row['label']}\t{row['sha256']}\n".encode())
    return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class PreparedSource(Source):
    """A split of a prepared data set.

    Attributes:
        split: its name.
        positions: place of each video in the split.
        content: hash of the data set.
    """

    split: str = ""
    positions: tuple[int, ...] = ()
    content: str = ""

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        video, error = b"", ""
        try:
            record = _records(self.root, self.split)[self.positions[index]]
            video = record["video"]
        except Exception as reason:  # damage shows as many types; raising would end the loader
            shard, position = self.place(index)
            error = f"{shard}, record {position} ({self.ids[index]}): cannot be read ({reason})"
        name, label = self.ids[index], self.labels[index]
        return {"video": video, "name": name, "label": label, "record": index, "error": error}

    def place(self, index: int) -> tuple[str, int]:
        """(shard file, record in it) of a video."""
        manifest = read_manifest(self.root)
        lengths = manifest["splits"][self.split]["shard_lengths"]
        position, shard = self.positions[index], 0
        while position >= lengths[shard]:
            position, shard = position - lengths[shard], shard + 1
        return shard_name(manifest["name"], self.split, shard, len(lengths)), position

    def fingerprint(self) -> str:
        """Of the stored bytes too."""
        return hashlib.sha256(f"{self.content} {super().fingerprint()}".encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _records(root: str, split: str) -> Any:
    """The records of a split, a sequence of dicts; kept open, and never pickled into a worker."""
    import tensorflow_datasets as tfds  # 0.8 s, and only prepared data needs it

    builder: Any = tfds.builder_from_directory
    return builder(root).as_data_source(split)


def open_prepared(path: str, split: str) -> PreparedSource:
    """One split of a prepared folder.

    Raises:
        SourceError: no such split, or no prepared data.
    """
    manifest = read_manifest(path)
    if split not in manifest["splits"]:
        raise SourceError(f"{path} has no split {split}: it has {', '.join(manifest['splits'])}")
    rows = [row for row in read_rows(path) if row["split"] == split]
    return PreparedSource(
        root=str(path),
        ids=tuple(row["id"] for row in rows),
        labels=tuple(int(row["label"]) for row in rows),
        classes=tuple(manifest["classes"]),
        split=split,
        positions=tuple(range(len(rows))),
        content=manifest["hash"],
    )


def open_source(path: str, split: str, head: str = "softmax") -> Source:
    """Videos of one split of `path`: prepared data, a CSV list, or a folder (its `split` subfolder or list).

    A list, or a folder without parts for `train` and another split, is all "train".

    Args:
        head: what labels are, see `sources.from_csv`; all but "softmax" need a list.

    Raises:
        SourceError: there is nothing to read.
    """
    place = epath.Path(path)
    if not place.exists():
        raise SourceError(f"{path} does not exist: pass a folder of videos, a CSV list, or prepared data")
    if place.suffix.lower() in SUFFIXES and place.is_file():
        raise SourceError(f"{path} is a video: pass its folder, or a list that names it")
    if not place.is_file() and not is_prepared(path):
        place = split_part(path, split) or place
    if place.is_file():
        return from_csv(place, head)
    if head != "softmax":
        raise SourceError(f"{path} has at most one class for each video: {head} needs a CSV list of labels")
    return open_prepared(path, split) if is_prepared(path) else from_folder(place)


def has_split(path: str, split: str) -> bool:
    """Whether `path` is divided and `split` is one of its parts."""
    if is_prepared(path):
        return split in read_manifest(path)["splits"]
    return epath.Path(path).is_dir() and split_part(path, split) is not None


def damage(path: str) -> Iterator[str]:
    """Reads every record again; yields a line for each that is not as written, with shard and record.

    Raises:
        SourceError: no prepared data.
    """
    manifest, rows = read_manifest(path), read_rows(path)
    if records_hash(rows) != manifest["hash"]:
        yield f"{RECORDS} does not match {MANIFEST}"
    readers: dict[str, Any] = {}
    for row in rows:
        lengths = manifest["splits"][row["split"]]["shard_lengths"]
        shard = shard_name(manifest["name"], row["split"], int(row["shard"]), len(lengths))
        if shard not in readers:
            readers = {shard: _open_shard(epath.Path(path) / shard, lengths[int(row["shard"])])}
            if isinstance(readers[shard], str):
                yield f"{shard}: {readers[shard]}"
        if not isinstance(readers[shard], str):
            reason = _record_damage(readers[shard], int(row["position"]), row["sha256"])
            if reason:
                yield f"{shard}, record {row['position']} ({row['id']}): {reason}"


def _open_shard(path: epath.Path, length: int) -> Any:
    """A reader, or what is wrong."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.exists():
        return "is absent"
    reader = ArrayRecordReader(str(path), "")
    if not reader.ok() or reader.num_records() != length:
        return f"holds {reader.num_records() if reader.ok() else 'no readable'} of {length} records"
    return reader


def _record_damage(reader: Any, position: int, digest: str) -> str:
    try:
        data = reader.read([position])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        return str(error)
    return "" if hashlib.sha256(data).hexdigest() == digest else "is not what was written"
