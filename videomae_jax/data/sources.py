"""Where videos come from, local or remote (gs://): random access to records of a folder or a CSV list."""

import abc
import collections
import csv
import dataclasses
import hashlib
import operator
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TypedDict, TypeVar

from etils import epath

SUFFIXES = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
IMAGE_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".webp"])
_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class SourceError(ValueError):
    """A data set that cannot be used as it is; the text names the culprit and the fix."""


class Record(TypedDict):
    """One video: a path or a file's bytes, its class (-1: unknown), its place in the source.

    `name` is its id. `error` says why a stored video could not be read; it is empty for all others.
    """

    video: str | bytes
    name: str
    label: int
    record: int
    error: str


AnySource = TypeVar("AnySource", bound="Source")


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """Videos in a fixed order, random-access and picklable: what the loader draws from.

    Attributes:
        root: the folder that they are in.
        ids: unique; they name the videos in logs and predictions.
        labels: class of each video, -1 where unknown.
        classes: class names in label order; empty without labels.
        targets: what to predict for each video where that is not one class: 0 or 1 for each class
            (multilabel) or numbers (regression); `classes` then names them, and labels are -1.
    """

    root: str
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] = ()
    targets: tuple[tuple[float, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The video at `index`."""

    def select(self: AnySource, indices: Sequence[int]) -> AnySource:
        """The videos at `indices`, in that order."""
        per_video = {
            field.name: tuple(getattr(self, field.name)[i] for i in indices)
            for field in dataclasses.fields(self)
            if field.name in ("ids", "labels", "positions", "targets") and getattr(self, field.name)
        }
        return dataclasses.replace(self, **per_video)

    def fingerprint(self) -> str:
        """Hash of ids and labels in order: equal means that the same stream of records is drawn."""
        labels = self.targets or self.labels
        lines = (f"{video}\t{label}" for video, label in zip(self.ids, labels, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as gs://bucket/file, which libav cannot read by itself."""
    return "://" in path


def join(root: str, path: str) -> epath.Path:
    """A path relative to `root`, unless it is absolute or a URL."""
    return epath.Path(path) if is_remote(path) else epath.Path(root) / path


class VideoSource(Source):
    """Files, or folders of frames; an id is a path relative to `root`."""

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        path = str(join(self.root, self.ids[index]))
        name, label = self.ids[index], self.labels[index]
        return {"video": path, "name": name, "label": label, "record": index, "error": ""}


def split_part(path: str, split: str) -> epath.Path | None:
    """The subfolder or list of `path` for "train", "validation" or "test"; None where there is none.

    A folder is divided if it has `train` (or train.csv, the published layout) and another of these; one of
    them alone is a class.
    """
    for ending, exists in (("", operator.methodcaller("is_dir")), (".csv", operator.methodcaller("is_file"))):
        parts: dict[str, epath.Path] = {}
        for known, names in _SPLITS.items():
            for part in (epath.Path(path) / f"{name}{ending}" for name in names):
                if known not in parts and exists(part):
                    parts[known] = part
        if "train" in parts and len(parts) > 1:
            return parts.get(split)
    return None


def videos_below(folder: epath.Path, seen: frozenset[str] = frozenset()) -> Iterator[epath.Path]:
    """Video files and folders of frames, also behind links to folders; a link back up ends there."""
    place = str(folder) if is_remote(str(folder)) else os.path.realpath(folder)
    if place in seen:
        return
    folders, files = [], []
    for entry in folder.iterdir():
        if not entry.name.startswith("."):
            (folders if entry.is_dir() else files).append(entry)
    videos = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    if seen and not videos and not folders and any(f.suffix.lower() in IMAGE_SUFFIXES for f in files):
        yield folder
    yield from videos
    for entry in folders:
        yield from videos_below(entry, seen | {place})


def from_folder(path: str | os.PathLike) -> VideoSource:
    """All videos below a folder; if each lies in a subfolder, the top subfolders are the classes.

    A subfolder with nothing but images is a video, each image a frame.

    Raises:
        SourceError: no such folder, or no video in it.
    """
    root = epath.Path(path)
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder: pass a folder of videos or a CSV list of them")
    found = sorted(pathlib.PurePosixPath(video.relative_to(root)) for video in videos_below(root))
    if not found:
        known = " ".join(sorted(SUFFIXES))
        raise SourceError(f"{root} holds no video: expected folders of frames, or files ending in {known}")
    ids = tuple(video.as_posix() for video in found)
    if any(len(video.parts) == 1 for video in found):
        return VideoSource(str(root), ids, (-1,) * len(ids))
    classes = sorted({video.parts[0] for video in found})
    labels = tuple(classes.index(video.parts[0]) for video in found)
    return VideoSource(str(root), ids, labels, tuple(classes))


def _read_rows(path: epath.Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of a list separated by tabs, commas or spaces; quotes protect separators."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as a text list: {error}") from None
    text = next((line.strip() for line in lines if line.strip()), "")
    whole = join(str(path.parent), text).exists()  # paths only, one a line, whatever is in them
    delimiter = "\t" if whole else next((d for d in "\t, " if d in text), "\t")
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    parsed = [(rows.line_num, [field.strip() for field in row]) for row in rows]
    if delimiter == " ":  # trailing blanks are not fields
        parsed = [(line, [field for field in row if field]) for line, row in parsed]
    return [(line, row) for line, row in parsed if any(row)]


def from_csv(path: str | os.PathLike, head: str = "softmax") -> VideoSource:
    """A list with a path and an optional label per line; relative paths start at the list's folder.

    Columns are separated by tabs, commas or spaces (the published lists), fields with separators are
    quoted. An empty label, like none, is -1: unknown.
    A first line that names a `path` column is a header: `label` is then read too and other columns
    are ignored. Without one, column 1 is the path and column 2 the label. Labels are all integers from 0,
    or all names (classes are then in alphabetical order).

    Raises:
        SourceError: an unreadable or empty list, a wrong column, an absent file, or a repeated one.
    """
    path = epath.Path(path)
    rows = _read_rows(path)
    if not rows:
        raise SourceError(f"{path} is empty: expected a path and an optional label per line")
    header = [name.lower() for name in rows[0][1]]
    if "path" in header:
        rows = rows[1:]
        places = [header.index(name) for name in ("path", "label") if name in header]
        columns = len(header)
    else:
        columns = len(rows[0][1])
        places = [0, 1][:columns]
    ids, labels = [], []
    for line, row in rows:
        if len(row) != columns or (columns > 2 and "path" not in header):
            raise SourceError(
                f"{path}, line {line}: {len(row)} columns {row} where a path and an optional label were "
                f"expected: quote paths that contain the separator, or add a header line `path,label`"
            )
        ids.append(row[places[0]])
        labels.append((row[places[1]] if len(places) == 2 else "") or "-1")
    lines = [line for line, _ in rows]
    _check_files(path, ids, lines)
    if head != "softmax":
        parts = [[part.strip() for part in label.split(";") if part.strip()] for label in labels]
        classes, targets = (_numbers if head == "regression" else _multi_hot)(path, lines, parts)
        return VideoSource(str(path.parent), tuple(ids), (-1,) * len(ids), classes, targets)
    if all(re.fullmatch(r"-1|\d{1,6}", label, re.ASCII) for label in labels):
        numbers = tuple(int(label) for label in labels)
        classes = tuple(str(i) for i in range(max(numbers) + 1))
    else:
        classes = tuple(sorted(set(labels) - {"-1"}))
        numbers = tuple(-1 if label == "-1" else classes.index(label) for label in labels)
    return VideoSource(str(path.parent), tuple(ids), numbers, classes)


_Targets = tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]


def _multi_hot(_path: epath.Path, _lines: list[int], labels: list[list[str]]) -> _Targets:
    """(class names in order, 0 or 1 for each of them per video); -1 stands for no label."""
    named = [set(parts) - {"-1"} for parts in labels]
    classes = tuple(sorted(set().union(*named), key=lambda n: (int(n), n) if n.isdecimal() else (-1, n)))
    return classes, tuple(tuple(float(name in parts) for name in classes) for parts in named)


def _numbers(path: epath.Path, lines: list[int], labels: list[list[str]]) -> _Targets:
    """(names of the values, the values of each video)."""
    values = []
    for line, parts in zip(lines, labels, strict=True):
        try:
            values.append(tuple(float(part) for part in parts))
        except ValueError:
            raise SourceError(f"{path}, line {line}: {';'.join(parts)} is no number to predict") from None
        if len(values[-1]) != len(values[0]):
            raise SourceError(f"{path}, line {line}: {len(parts)} numbers where {len(values[0])} were before")
    return tuple(f"value {i}" for i in range(len(values[0]))), tuple(values)


def relabel(source: AnySource, classes: Sequence[str], whose: str = "the training videos") -> AnySource:
    """The same videos with labels that count in `classes`, those of `whose`.

    Raises:
        SourceError: a video of a class that is not among them.
    """
    if source.classes == tuple(classes):
        return source
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


def _check_files(path: epath.Path, ids: list[str], lines: list[int]) -> None:
    if not ids:
        raise SourceError(f"{path} lists no video below its header")
    first_line: dict[str, int] = {}
    absent = []
    for video, line in zip(ids, lines, strict=True):
        if first_line.setdefault(video, line) != line:
            raise SourceError(f"{path}, line {line}: {video} is already on line {first_line[video]}")
        if not join(str(path.parent), video).exists():
            absent.append((line, video))
    if absent:
        line, video = absent[0]
        raise SourceError(
            f"{path}, line {line}: no file {join(str(path.parent), video)} ({len(absent)} of {len(ids)} are "
            f"absent): correct the paths, relative ones start at the list's folder; a header must name"
            f" a column `path`"
        )


def hold_out(source: Source, videos: int) -> tuple[Source, Source]:
    """Divides a source into (kept, held out): `videos` of them, at most a tenth.

    Chosen by the hash of their ids, in equal parts of each class: the choice does not depend on order or
    seed, so a video stays held out from run to run.
    """
    count = min(videos, len(source) // 10)
    by_hash = sorted(range(len(source)), key=lambda i: hashlib.sha256(source.ids[i].encode()).digest())
    sizes, seen = collections.Counter(source.labels), collections.Counter()
    rank = {}  # place of each video in its class, 0..1
    for i in by_hash:
        rank[i] = (seen[source.labels[i]] + 0.5) / sizes[source.labels[i]]
        seen[source.labels[i]] += 1
    chosen = sorted(by_hash, key=rank.__getitem__)
    return source.select(sorted(chosen[count:])), source.select(sorted(chosen[:count]))
