"""Where videos come from, local or remote (gs://): random access to records of a folder or a CSV list."""

import abc
import csv
import dataclasses
import hashlib
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
    """

    root: str
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] = ()

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
            if field.name in ("ids", "labels", "positions")
        }
        return dataclasses.replace(self, **per_video)

    def fingerprint(self) -> str:
        """Hash of ids and labels in order: equal means that the same stream of records is drawn."""
        lines = (f"{video}\t{label}" for video, label in zip(self.ids, self.labels, strict=True))
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


def split_folder(path: str, split: str) -> epath.Path | None:
    """The subfolder of `path` for "train", "validation" or "test"; None where there is none.

    A folder is divided if it has `train` and another of these; one of them alone is a class.
    """
    names = [name for known in _SPLITS.values() for name in known]
    present = {name for name in names if (epath.Path(path) / name).is_dir()}
    if "train" not in present or len(present) < 2:
        return None
    return next((epath.Path(path) / name for name in _SPLITS[split] if name in present), None)


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


def from_csv(path: str | os.PathLike) -> VideoSource:
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
    _check_files(path, ids, [line for line, _ in rows])
    if all(re.fullmatch(r"-1|\d{1,6}", label, re.ASCII) for label in labels):
        numbers = tuple(int(label) for label in labels)
        classes = tuple(str(i) for i in range(max(numbers) + 1))
    else:
        classes = tuple(sorted(set(labels) - {"-1"}))
        numbers = tuple(-1 if label == "-1" else classes.index(label) for label in labels)
    return VideoSource(str(path.parent), tuple(ids), numbers, classes)


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
    """Divides a source into (kept, held out): `videos` of them, at most a tenth, chosen by their ids' hash.

    The choice does not depend on order or seed, so a video stays held out from run to run.
    """
    count = min(videos, len(source) // 10)
    by_hash = sorted(range(len(source)), key=lambda i: hashlib.sha256(source.ids[i].encode()).digest())
    held = sorted(by_hash[:count])
    return source.select(sorted(by_hash[count:])), source.select(held)
