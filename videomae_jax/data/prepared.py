"""A prepared data set on disk: ArrayRecord shards that TFDS opens, a manifest, and a table of records.

manifest.json                              what it is: counts, failures, classes, one hash of everything
records.csv                                one line per record: where it is, id, label, size, hashes
index/SPLIT-*.npy                          the same as arrays, for the loader: see `index`
NAME-SPLIT.array_record-00000-of-00007     the records, `tf.train.Example`s with the bytes of a video
features.json, dataset_info.json           what TFDS reads
"""

import bisect
import collections
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from videomae_jax.data import columns, decode, images, index, ranges, reading
from videomae_jax.data.lists import from_csv
from videomae_jax.data.sources import (
    SUFFIXES,
    Record,
    Source,
    SourceError,
    beside_parts,
    from_folder,
    split_part,
)
from videomae_jax.storage import is_remote

FORMAT = 3  # 2: no JPEGs with a table; 1: the hash knew neither classes nor features, there were no targets
MANIFEST, RECORDS = "manifest.json", "records.csv"
COLUMNS = ("split", "shard", "position", "id", "label", "frames", "fps", "height", "width", "bytes")
COLUMNS += ("sha256", "source_sha256", "target")
COLUMNS += ("early",)  # see `transcode.Encoded`
COLUMNS += ("place", "length", "check")  # of the video of JPEGs in its shard: see `ranges` and `images`
_OPEN_SHARDS = 64  # readers of a process that are open at once


def is_prepared(path: str | epath.Path) -> bool:
    """Whether a folder holds a finished data set made by `prepare`, maybe with a damaged manifest."""
    file = epath.Path(path) / MANIFEST
    if not file.exists():
        return False
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError):
        return True
    return isinstance(manifest, dict) and type(manifest.get("format")) is int  # else of somebody else


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


def records_hash(rows: Iterable[Mapping[str, Any]], manifest: Mapping[str, Any]) -> str:
    """One hash of all records: split, id, label and bytes, in order; and of what labels and features mean."""
    total = hashlib.sha256()
    if manifest["format"] > 1:
        about = [manifest[name] for name in ("name", "head", "classes", "features")]
        total.update(json.dumps(about).encode())
    for row in rows:
        total.update(f"{row['split']}\t{row['id']}\t{row['label']}\t{row['sha256']}\n".encode())
    return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class PreparedSource(Source):
    """A split of a prepared data set.

    Attributes:
        split: its name.
        positions: row of each video in the split's index, uint32.
        content: hash of the data set.
        table: the split's index.
        shards: file name and end (in rows of the index) of each shard.
    """

    split: str = ""
    positions: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint32))
    content: str = ""
    table: index.Index = index.EMPTY
    shards: tuple[tuple[str, int], ...] = ()

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        name, video, error = self.ids[index], b"", ""
        try:
            video = self._video(index, name)
        except Exception as reason:  # damage shows as many types; raising would end the loader
            shard, position = self.place(index)
            error = f"{shard}, record {position} ({name}): {reason}"
        return {"video": video, "name": name, "label": self.labels[index], "record": index, "error": error}

    def _video(self, index: int, name: str) -> bytes | images.JpegFrames:
        """A whole file, or JPEGs that are read as they are needed."""
        row = int(self.positions[index])
        try:
            if not len(self.table.places):
                record = reading.patiently(lambda: self._stored(row))
                video, found = record["video"], record["id"].decode()
            else:
                path = str(epath.Path(self.root) / self.place(index)[0])
                place, length = int(self.table.places[row]), int(self.table.lengths[row])
                video = reading.patiently(lambda: images.JpegFrames(ranges.Value(path, place, length), name))
                found = name if video.check == self.table.checks[row] else "another video"
        except Exception as reason:
            raise SourceError(f"cannot be read ({reason})") from None
        if found != name:
            raise SourceError(f"holds {found}, so its label would be another video's")
        return video

    def _stored(self, row: int) -> dict[str, Any]:
        try:
            return _shards(self.root, self.split).read(row)
        except Exception as error:  # the reader is C++ and has few types for all
            # A store may have it the next time; what a disk has not, it will never have.
            if is_remote(self.root):
                raise decode.ReadError(str(error)) from None
            raise

    def place(self, index: int) -> tuple[str, int]:
        """(shard file, record in it) of a video."""
        row = int(self.positions[index])
        shard = bisect.bisect_right(self.shards, row, key=lambda shard: shard[1])
        return self.shards[shard][0], row - (self.shards[shard - 1][1] if shard else 0)

    def select(self, indices: Sequence[int] | np.ndarray) -> "PreparedSource":
        """The videos at `indices`, in that order."""
        rows = self.positions[np.asarray(indices, np.int64)]
        labels = columns.take(self.labels, indices)
        if isinstance(self.labels, columns.Column):
            labels = columns.Numbers(self.table.labels, rows=rows)
        # One array of rows for all: it is most of what a loader process is sent.
        ids, targets = columns.Texts(self.table.ids, self.table.id_ends, rows=rows), self.targets
        chosen = {"ids": ids, "labels": labels, "targets": columns.take(targets, indices)}
        return dataclasses.replace(self, positions=rows, **chosen)

    def hashes(self) -> np.ndarray:
        """As `Source.hashes`; they are stored."""
        return np.asarray(self.table.hashes[self.positions])

    def fingerprint(self) -> str:
        """Of the stored bytes too."""
        # Ids are part of the data set's hash: with an index only rows and labels are left to tell.
        if isinstance(self.table.labels, np.memmap):
            chosen = hashlib.sha256(self.positions.tobytes())
            chosen.update(np.asarray(self.targets or self.labels, np.float64).tobytes())
            about = f"{self.split} {chosen.hexdigest()}"
        else:
            about = super().fingerprint()
        return hashlib.sha256(f"{self.content} {about}".encode()).hexdigest()[:16]


class _Shards:
    """The records of a split as dicts, of which few files are open at once; never pickled into a worker."""

    def __init__(self, root: str, split: str):
        import tensorflow_datasets as tfds  # 0.8 s, and only prepared data needs it

        builder: Any = tfds.builder_from_directory
        self._features = builder(root).info.features
        manifest = read_manifest(root)
        lengths = manifest["splits"][split]["shard_lengths"]
        self._paths = [
            epath.Path(root) / shard_name(manifest["name"], split, shard, len(lengths))
            for shard in range(len(lengths))
        ]
        self._ends = list(itertools.accumulate(lengths))
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, position: int) -> dict[str, Any]:
        """The record at a place in the split."""
        shard = bisect.bisect_right(self._ends, position)
        start = self._ends[shard - 1] if shard else 0
        data = self._reader(shard, self._ends[shard] - start).read([position - start])[0]
        return self._features.deserialize_example_np(data)

    def _reader(self, shard: int, length: int) -> Any:
        with self._lock:
            reader = self._open.pop(shard, None) or _open_shard(self._paths[shard], length)
            if isinstance(reader, str):
                raise SourceError(f"the shard {reader}")
            self._open[shard] = reader
            # Closed when the last thread that reads from it has done so.
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return reader


def _shards(root: str, split: str) -> _Shards:
    # TFDS imports parts of itself when they are first used, and two threads that do so at once can each wait
    # for the other for ever.
    with _OPENING:
        return _opened(root, split)


_OPENING = threading.Lock()


@functools.lru_cache(maxsize=8)
def _opened(root: str, split: str) -> _Shards:
    return _Shards(root, split)


def open_prepared(path: str, split: str) -> PreparedSource:
    """One split of a prepared folder.

    Raises:
        SourceError: no such split, or no prepared data.
    """
    manifest = read_manifest(path)
    if not _has_records(manifest, split):
        some = ", ".join(name for name in manifest["splits"] if _has_records(manifest, name))
        raise SourceError(f"{path} has no split {split}: it has {some}")
    try:
        table = index.read(path, split, hashlib.sha256(json.dumps(manifest).encode()).hexdigest())
    except SourceError:
        raise
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}/{index.FOLDER} is damaged ({error}): prepare the data set again") from None
    if table is None:  # written by a version that made none
        table = index.make(row for row in read_rows(path) if row["split"] == split)
    lengths = manifest["splits"][split]["shard_lengths"]
    names = [shard_name(manifest["name"], split, shard, len(lengths)) for shard in range(len(lengths))]
    if len(table.labels) != sum(lengths):
        raise SourceError(
            f"{path}: {len(table.labels)} of {sum(lengths)} records of {split} are in its index"
        )
    return PreparedSource(
        root=str(path),
        ids=columns.Texts(table.ids, table.id_ends),
        labels=columns.Numbers(table.labels),
        classes=tuple(manifest["classes"]),
        split=split,
        positions=np.arange(len(table.labels), dtype=np.uint32),
        content=manifest["hash"],
        table=table,
        shards=tuple(zip(names, itertools.accumulate(lengths), strict=True)),
        targets=tuple(map(tuple, table.targets.tolist())),
        head=manifest.get("head", "softmax"),
        short_side=manifest.get("largest_short_side", 0),
    )


def open_source(
    path: str, split: str, head: str = "softmax", root: str = "", allow_missing: bool = False
) -> Source:
    """Videos of one split of `path`: prepared data, a CSV list, or a folder (its `split` subfolder or list).

    A list, or a folder without parts for `train` and another split, is all "train".

    Args:
        head: what labels are, see `lists.from_csv`; all but "softmax" need a list, or data prepared from one.
        root, allow_missing: of a list, likewise.

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
        return from_csv(place, head, root, allow_missing)
    if root or allow_missing:
        raise SourceError(
            f"{path} is no list: data.root and data.allow_missing are for lists, leave them out"
        )
    source = open_prepared(path, split) if is_prepared(path) else from_folder(place)
    beside = beside_parts(path) if place != epath.Path(path) and split == "train" else []
    if beside:
        some = ", ".join(beside[:8])
        note = f"{path}: {len(beside)} entries with videos beside its parts ({some}): left out"
        source = dataclasses.replace(source, notes=(*source.notes, note))
    if head and source.head != head and (source.targets or head != "softmax"):
        what = f"is prepared for {source.head}" if source.targets else "has at most one class for each video"
        raise SourceError(f"{path} {what}, not for head.kind={head}, which needs a CSV list of such labels")
    return source


def has_split(path: str, split: str) -> bool:
    """Whether `path` is divided and `split` is one of its parts."""
    if is_prepared(path):
        return _has_records(read_manifest(path), split)
    return epath.Path(path).is_dir() and split_part(path, split) is not None


def is_empty(path: str, split: str) -> bool:
    """Whether prepared data has a part of which nothing is there: all of its videos failed."""
    if not is_prepared(path):
        return False
    manifest = read_manifest(path)
    return split in manifest["splits"] and not _has_records(manifest, split)


def _has_records(manifest: dict[str, Any], split: str) -> bool:
    """Whether a part is there: of one all of whose videos failed or are absent nothing is."""
    return manifest["splits"].get(split, {"records": 0})["records"] > 0


def damage(path: str) -> Iterator[str]:
    """Reads every record again; yields a line for each that is not as written, with shard and record.

    Raises:
        SourceError: no prepared data.
    """
    manifest, rows = read_manifest(path), read_rows(path)
    if records_hash(rows, manifest) != manifest["hash"]:
        yield f"{RECORDS} does not match {MANIFEST}, or its classes, head or features are not those prepared"
    yield from _wrong_files(path, manifest)
    yield from _wrong_index(path, manifest, rows)
    places: dict[str, Iterator[str]] = {split: _misplaced(path, split) for split in manifest["splits"]}
    readers: dict[str, Any] = {}
    for row in rows:
        lengths = manifest["splits"][row["split"]]["shard_lengths"]
        shard = shard_name(manifest["name"], row["split"], int(row["shard"]), len(lengths))
        if shard not in readers:
            readers = {shard: _open_shard(epath.Path(path) / shard, lengths[int(row["shard"])])}
            if isinstance(readers[shard], str) and readers[shard] != "is absent":
                yield f"{shard}: {readers[shard]}"
        misplaced = next(places[row["split"]], "")
        if not isinstance(readers[shard], str):
            reason = _record_damage(readers[shard], int(row["position"]), row["sha256"])
            if reason := reason or misplaced:
                yield f"{shard}, record {row['position']} ({row['id']}): {reason}"


def check_shard(path: epath.PathLike, records: int) -> None:
    """Refuses a shard that is not there whole.

    Raises:
        SourceError: naming it.
    """
    reader = _open_shard(epath.Path(path), records)
    if isinstance(reader, str):
        raise SourceError(f"{path}: {reader}: remove it, then the same command writes it again")


def _wrong_files(path: str, manifest: dict[str, Any]) -> Iterator[str]:
    """Shards that are absent or too many, and class names that TFDS has otherwise."""
    expected = {
        shard_name(manifest["name"], split, shard, len(found["shard_lengths"]))
        for split, found in manifest["splits"].items()
        for shard in range(len(found["shard_lengths"]))
    }
    there = {file.name for file in epath.Path(path).iterdir() if ".array_record-" in file.name}
    yield from (f"{name}: is absent" for name in sorted(expected - there))
    yield from (f"{name}: is no shard of this data set" for name in sorted(there - expected))
    names = epath.Path(path) / "label.labels.txt"  # as TFDS writes them
    if names.exists() and names.read_text().splitlines() != manifest["classes"]:
        yield f"{names.name} has other classes, or in another order, than {MANIFEST}"


def _wrong_index(path: str, manifest: dict[str, Any], rows: list[dict[str, str]]) -> Iterator[str]:
    """Splits whose arrays do not say what the table of records does."""
    for split in manifest["splits"]:
        try:
            source = open_prepared(path, split)
        except SourceError as error:
            yield str(error)
            continue
        if index.differs(source.table, index.make(row for row in rows if row["split"] == split)):
            yield f"{index.FOLDER}/{split}-*.npy do not match {RECORDS}"


def _misplaced(path: str, split: str) -> Iterator[str]:
    """Of each record of JPEGs, what is wrong with how the index finds it; "": nothing."""
    try:
        source = open_prepared(path, split)
    except SourceError:
        return
    if len(source.table.places):
        yield from (source[i]["error"] for i in range(len(source)))


def _open_shard(path: epath.Path, length: int) -> Any:
    """A reader, or what is wrong."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(
            str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
        )
    except RuntimeError as error:
        return f"cannot be opened ({str(error).splitlines()[0]})" if path.exists() else "is absent"
    if not reader.ok() or reader.num_records() != length:
        return f"holds {reader.num_records() if reader.ok() else 'no readable'} of {length} records"
    return reader


def _record_damage(reader: Any, position: int, digest: str) -> str:
    try:
        data = reader.read([position])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        return str(error)
    return "" if hashlib.sha256(data).hexdigest() == digest else "is not what was written"
