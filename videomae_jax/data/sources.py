"""Where videos come from, local or remote (gs://): random access to records of a folder or a CSV list."""

import abc
import array
import collections
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, TypedDict, TypeVar

import numpy as np
from etils import epath

from videomae_jax.data import columns
from videomae_jax.data.images import JpegFrames
from videomae_jax.storage import is_remote

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("3g2", "3gp", "amv", "asf", "avi", "divx", "dv", "f4v", "flv", "gif", "m1v", "m2ts", "m2v", "m4v"),
        *("mkv", "mov", "mp4", "mpe", "mpeg", "mpg", "mts", "mxf", "nut", "ogg", "ogm", "ogv", "qt", "rm"),
        *("rmvb", "ts", "vob", "webm", "wmv", "wtv", "y4m"),
    )
)
IMAGE_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".webp"])
HEADS = ("softmax", "multilabel", "regression")
_LIST_SUFFIXES = (".csv", ".tsv", ".txt")
_PARTS = {"train": "train(ing)?", "validation": "val(id(ate|ation)?)?|dev", "test": "test(ing)?"}


class SourceError(ValueError):
    """A data set that cannot be used as it is; the text names the culprit and the fix."""


class Record(TypedDict):
    """One video: a path, a file's bytes or opened JPEGs, its class (-1: unknown), its place in the source.

    `name` is its id. `error` says why a stored video could not be read; it is empty for all others.
    """

    video: str | bytes | JpegFrames
    name: str
    label: int
    record: int
    error: str


def hash_of(name: str) -> int:
    """What chooses videos, whatever their order: the first 8 bytes of the SHA-256 of an id, uint64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


AnySource = TypeVar("AnySource", bound="Source")


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """Videos in a fixed order, random-access and picklable: what the loader draws from.

    Attributes:
        root: the folder that they are in.
        ids: unique; they name the videos in logs and predictions.
        labels: class of each video, -1 where unknown.
        classes: class names in label order; empty without labels.
        head: what is predicted: "softmax", one class; "multilabel" or "regression", the targets.
        targets: of "multilabel", 0 or 1 for each class, and of "regression", numbers, which `classes` then
            name; labels are -1.
        notes: lines that the user should read: what was left out, and why there are no labels.
        absent: names of listed videos that are not there.
        short_side: of every video's frames, at most, in pixels; 0: unknown.
    """

    root: str
    ids: tuple[str, ...] | columns.Column[str]
    labels: tuple[int, ...] | columns.Column[int]
    classes: tuple[str, ...] = ()
    targets: tuple[tuple[float, ...], ...] = ()
    head: str = "softmax"
    noun: ClassVar[str] = "videos"
    notes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    short_side: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The video at `index`."""

    def select(self: AnySource, indices: Sequence[int] | np.ndarray) -> AnySource:
        """The videos at `indices`, in that order."""
        rows = np.asarray(indices, np.uint32)  # of all columns
        chosen = {name: columns.take(getattr(self, name), rows) for name in ("ids", "labels", "targets")}
        return dataclasses.replace(self, **chosen)

    def hashes(self) -> np.ndarray:
        """`hash_of` of each id, uint64 [N]."""
        return np.fromiter(map(hash_of, self.ids), np.uint64, len(self))

    def fingerprint(self) -> str:
        """Hash of ids and labels in order: equal means that the same stream of records is drawn."""
        total, labels = hashlib.sha256(), self.targets or self.labels
        lines = (f"{video}\t{label}" for video, label in zip(self.ids, labels, strict=True))
        before = ""
        while some := "\n".join(itertools.islice(lines, 2**16)):
            total.update(f"{before}{some}".encode())
            before = "\n"
        return total.hexdigest()[:16]


def join(root: str, path: str) -> epath.Path:
    """A path relative to `root`, unless it is absolute or a URL."""
    return epath.Path(path) if is_remote(path) else epath.Path(root) / path


class VideoSource(Source):
    """Files, or folders of frames; an id is a path relative to `root`."""

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        path = str(join(self.root, self.ids[index]))
        name, label, error = self.ids[index], self.labels[index], ""
        if re.search(r"\\x[0-9a-f]{2}", name) and not os.path.lexists(path):
            error = f"{path}: the name is not UTF-8: rename the file"
        return {"video": path, "name": name, "label": label, "record": index, "error": error}


def part_of(name: str) -> str:
    """The part that a folder or list is called after: Train, videos_val, val_256, testing; "" for none.

    >>> [part_of(name) for name in ("Train", "videos_val", "valid", "test_set", "jump")]
    ['train', 'validation', 'validation', 'test', '']
    """
    for part, words in _PARTS.items():
        if re.fullmatch(rf"(videos?[_-])?({words})([_-](videos?|set|\d+))?", name.lower()):
            return part
    return ""


def split_part(path: str, split: str) -> epath.Path | None:
    """The subfolder or list of `path` for "train", "validation" or "test"; None where there is none.

    A folder is divided if it has one for training (such as `train`, or train.csv, the published layout) and
    another of these.

    Raises:
        SourceError: two of them are called after the same part.
    """
    entries = sorted(_entries(os.fspath(path)))
    folders = [(name, name) for name, is_folder in entries if is_folder]
    lists = [(name, os.path.splitext(name)[0]) for name, is_folder in entries if _is_list(name, is_folder)]
    for named in (folders, lists):
        parts: dict[str, str] = {}
        for name, stem in named:
            if part := part_of(stem):
                if part in parts:
                    raise SourceError(
                        f"{path} has {parts[part]} and {name}, both called after the {part} part: keep one, "
                        f"or pass one of them"
                    )
                parts[part] = name
        if "train" in parts and len(parts) > 1:
            return epath.Path(path) / parts[split] if split in parts else None
    return None


def beside_parts(path: str) -> list[str]:
    """Videos, and folders with some, that a folder divided into subfolders has beside its parts."""
    return [
        name
        for name, is_folder in sorted(_entries(path))
        if not name.startswith(".")
        and (
            not part_of(name) and next(videos_below(f"{path}/{name}"), None) is not None
            if is_folder
            else os.path.splitext(name)[1].lower() in SUFFIXES
        )
    ]


def _is_list(name: str, is_folder: bool) -> bool:
    return not is_folder and os.path.splitext(name)[1].lower() in _LIST_SUFFIXES


def videos_below(folder: str | os.PathLike, ignored: collections.Counter[str] | None = None) -> Iterator[str]:
    """Video files and folders of frames, also behind links to folders; a link back up ends there.

    Whatever has a video's name counts as one: what is no file fails when it is read, by name.

    Args:
        ignored: counts the other files by their suffix.

    Yields:
        Their paths below `folder`, separated by slashes, in order of their parts.
    """
    return _below(os.fspath(folder), "", ignored, frozenset())


def _below(
    folder: str, name: str, ignored: collections.Counter[str] | None, seen: frozenset[str]
) -> Iterator[str]:
    place = folder if is_remote(folder) else os.path.realpath(folder)
    if place in seen:
        return
    entries = {entry: is_folder for entry, is_folder in _entries(folder) if not entry.startswith(".")}
    suffixes = {
        entry: os.path.splitext(entry)[1].lower() for entry, is_folder in entries.items() if not is_folder
    }
    is_flat = len(suffixes) == len(entries) and SUFFIXES.isdisjoint(suffixes.values())
    if seen and is_flat and not IMAGE_SUFFIXES.isdisjoint(suffixes.values()):
        yield name
        return
    if ignored is not None:
        ignored.update(suffix for suffix in suffixes.values() if suffix not in SUFFIXES)
    for entry in sorted(entries, key=_printable):
        path = f"{name}/{entry}" if name else entry
        if entries[entry]:
            yield from _below(f"{folder.rstrip('/')}/{entry}", path, ignored, seen | {place})
        elif suffixes[entry] in SUFFIXES:
            yield path


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of what a folder holds, without a question for each of them."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            yield from ((entry.name, _is_folder(entry)) for entry in entries)
        return

    def fail(error: Exception) -> None:
        raise error

    _, folders, files = next(epath.Path(folder).walk(on_error=fail), (folder, [], []))
    yield from ((name.rstrip("/"), True) for name in folders)
    yield from ((name, False) for name in files if name)  # some stores name the folder itself


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where one may not look
        return False


def from_folder(path: str | os.PathLike) -> VideoSource:
    """All videos below a folder; if each lies in a subfolder, the top subfolders are the classes.

    A subfolder with nothing but images is a video, each image a frame.

    Raises:
        SourceError: no such folder, or no video in it.
    """
    root = epath.Path(path)
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder: pass a folder of videos or a CSV list of them")
    ignored: collections.Counter[str] = collections.Counter()
    classes = array.array("i")
    folders: dict[str, bool] = {}  # in order; whether it holds folders itself

    def names() -> Iterator[str]:
        for name in map(_printable, videos_below(root, ignored)):
            top, slash, below = name.partition("/")
            if slash:
                folders[top] = "/" in below or folders.get(top, False)
            classes.append(len(folders) - 1 if slash else -1)
            yield name

    ids = columns.texts(names())
    if not ids:
        known = " ".join(sorted(SUFFIXES))
        raise SourceError(f"{root} holds no video: expected folders of frames, or files ending in {known}")
    notes = []
    if ignored:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.most_common(8))
        notes.append(f"{root}: {ignored.total()} files are no videos by their suffix ({kinds}): left out")
    labels = columns.numbers(classes)
    if stray := labels.count(-1):
        if len(folders) > 1:
            some = f" and {stray - 1} more videos" if stray > 1 else ""
            notes.append(
                f"{root}: {ids[labels.index(-1)]}{some} beside {len(folders)} folders, so the folders are no "
                f"classes: move it into one to have labels"
            )
        return VideoSource(str(root), ids, columns.numbers([-1] * len(ids)), notes=tuple(notes))
    _check_classes(root, folders)
    return VideoSource(str(root), ids, labels, tuple(folders), notes=tuple(notes))


def _printable(path: str) -> str:
    """A path as an id: bytes of a name that are not UTF-8 are spelt out."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _check_classes(root: epath.Path, classes: Mapping[str, bool]) -> None:
    """Refuses class folders that are called after parts, but for vehicles: `train` beside others."""
    for name, holds_folders in classes.items():
        is_vehicle = name == "train" and len(classes) > 1 and not holds_folders
        if part_of(name) and not is_vehicle:
            raise SourceError(
                f"{root}: the folder {name} would be a class, and is called like a part: pass {root / name}, "
                f"put train beside it, or rename it"
            )


def relabel(source: AnySource, classes: Sequence[str], whose: str = "the training videos") -> AnySource:
    """The same videos with labels that count in `classes`, those of `whose`.

    Raises:
        SourceError: a video of a class that is not among them, or other numbers to predict.
    """
    if source.classes == tuple(classes):
        return source
    if source.head == "regression":
        raise SourceError(
            f"{source.root} has {len(source.classes)} numbers for each video, {whose} {len(classes)}: list "
            f"as many"
        )
    unknown = [name for name in source.classes if name not in classes]
    used = {source.classes[label] for label in source.labels if label >= 0}
    if source.targets:
        used = {name for name, *column in zip(source.classes, *source.targets, strict=True) if any(column)}
    if used & set(unknown):
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise SourceError(
            f"{source.root} has videos of the class {min(used & set(unknown))!r}, which is not among the "
            f"{len(classes)} classes of {whose} ({some}): rename or remove it, or train with it"
        )
    places = {name: i for i, name in enumerate(classes)}
    labels = tuple(places[source.classes[label]] if label >= 0 else -1 for label in source.labels)
    targets = tuple(
        tuple(dict(zip(source.classes, row, strict=True)).get(name, 0.0) for name in classes)
        for row in source.targets
    )
    return dataclasses.replace(source, labels=labels, classes=tuple(classes), targets=targets)


def hold_out(source: Source, videos: int) -> tuple[Source, Source]:
    """Divides a source into (kept, held out): `videos` of them, at most a tenth.

    Chosen by the hash of their ids, in equal parts of each class: the choice does not depend on order or
    seed, so a video stays held out from run to run.
    """
    count = min(videos, len(source) // 10)
    labels, hashes = np.asarray(source.labels), source.hashes()
    order = np.lexsort((hashes, labels))  # by class, and by hash in each
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = (np.arange(len(order)) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)  # in its class
    first = np.flatnonzero(rank <= np.partition(rank, count)[count])  # all, sorted, take seconds for millions
    is_held = np.zeros(len(labels), bool)
    is_held[order[first[np.lexsort((hashes[order[first]], rank[first]))[:count]]]] = True
    return source.select(np.flatnonzero(~is_held)), source.select(np.flatnonzero(is_held))
