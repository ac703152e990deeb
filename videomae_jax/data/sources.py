"""Where videos come from: a folder, or a CSV list; random access to (path, label, id) records."""

import csv
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TypedDict

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
_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class SourceError(ValueError):
    """A data set that cannot be used as it is; the text names the culprit and the fix."""


class Record(TypedDict):
    """One video: a local path, its class (-1: unknown), and its place in the source."""

    path: str
    label: int
    record: int


@dataclasses.dataclass(frozen=True)
class VideoSource:
    """A list of videos, in a fixed order.

    Attributes:
        root: the folder that ids are relative to.
        ids: relative paths, unique; they name the videos in logs and predictions.
        labels: class of each video, -1 where unknown.
        classes: class names in label order; empty without labels.
    """

    root: str
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        path = str(pathlib.Path(self.root, self.ids[index]))
        return {"path": path, "label": self.labels[index], "record": index}

    def select(self, indices: Sequence[int]) -> "VideoSource":
        """The videos at `indices`, in that order."""
        ids, labels = (tuple(field[i] for i in indices) for field in (self.ids, self.labels))
        return dataclasses.replace(self, ids=ids, labels=labels)

    def fingerprint(self) -> str:
        """Hash of ids and labels in order: equal means that the same stream of records is drawn."""
        lines = (f"{video}\t{label}" for video, label in zip(self.ids, self.labels, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def split_folder(path: str, split: str) -> pathlib.Path | None:
    """The subfolder of `path` for "train", "validation" or "test"; None where there is none.

    A folder is divided if it has `train` and another of these; one of them alone is a class.
    """
    present = {name for names in _SPLITS.values() for name in names if pathlib.Path(path, name).is_dir()}
    if "train" not in present or len(present) < 2:
        return None
    return next((pathlib.Path(path, name) for name in _SPLITS[split] if name in present), None)


def _files_below(folder: pathlib.Path, seen: set[pathlib.Path]) -> Iterator[pathlib.Path]:
    """All files, also behind symbolic links to folders; a link back to a folder above it ends there."""
    if folder.resolve() in seen:
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(entry, seen | {folder.resolve()})
        elif entry.is_file():
            yield entry


def from_folder(path: str | pathlib.Path) -> VideoSource:
    """All videos below a folder; if each lies in a subfolder, the top subfolders are the classes.

    Raises:
        SourceError: no such folder, or no video in it.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder: pass a folder of videos or a CSV list of them")
    files = sorted(
        file.relative_to(root) for file in _files_below(root, set()) if file.suffix.lower() in SUFFIXES
    )
    if not files:
        known = " ".join(sorted(SUFFIXES))
        raise SourceError(f"{root} holds no video: expected files ending in {known}")
    ids = tuple(file.as_posix() for file in files)
    if any(len(file.parts) == 1 for file in files):
        return VideoSource(str(root), ids, (-1,) * len(ids))
    classes = sorted({file.parts[0] for file in files})
    labels = tuple(classes.index(file.parts[0]) for file in files)
    return VideoSource(str(root), ids, labels, tuple(classes))


def _read_rows(path: pathlib.Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of a list separated by tabs, commas or spaces; quotes protect separators."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as a text list: {error}") from None
    text = next((line.strip() for line in lines if line.strip()), "")
    whole = (path.parent / text).is_file()  # paths only, one a line, whatever is in them
    delimiter = "\t" if whole else next((d for d in "\t, " if d in text), "\t")
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    parsed = [(rows.line_num, [field.strip() for field in row]) for row in rows]
    if delimiter == " ":  # trailing blanks are not fields
        parsed = [(line, [field for field in row if field]) for line, row in parsed]
    return [(line, row) for line, row in parsed if any(row)]


def from_csv(path: str | pathlib.Path) -> VideoSource:
    """A list with a path and an optional label per line; relative paths start at the list's folder.

    Columns are separated by tabs, commas or spaces (the published lists), fields with separators are
    quoted. An empty label, like none, is -1: unknown.
    A first line that names a `path` column is a header: `label` is then read too and other columns
    are ignored. Without one, column 1 is the path and column 2 the label. Labels are all integers from 0,
    or all names (classes are then in alphabetical order).

    Raises:
        SourceError: an unreadable or empty list, a wrong column, an absent file, or a repeated one.
    """
    path = pathlib.Path(path)
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


def _check_files(path: pathlib.Path, ids: list[str], lines: list[int]) -> None:
    if not ids:
        raise SourceError(f"{path} lists no video below its header")
    first_line: dict[str, int] = {}
    absent = []
    for video, line in zip(ids, lines, strict=True):
        if first_line.setdefault(video, line) != line:
            raise SourceError(f"{path}, line {line}: {video} is already on line {first_line[video]}")
        if not (path.parent / video).is_file():
            absent.append((line, video))
    if absent:
        line, video = absent[0]
        raise SourceError(
            f"{path}, line {line}: no file {path.parent / video} ({len(absent)} of {len(ids)} are absent): "
            f"correct the paths, relative ones start at the list's folder; a header must name a column `path`"
        )


def open_source(path: str, split: str) -> VideoSource:
    """Videos of one split of `path`: a CSV list, or a folder (its `split` subfolder if it has one).

    A list, or a folder without subfolders `train` and `validation`, is all "train".

    Raises:
        SourceError: there is nothing to read.
    """
    if not pathlib.Path(path).exists():
        raise SourceError(f"{path} does not exist: pass a folder of videos or a CSV list of them")
    if pathlib.Path(path).suffix.lower() in SUFFIXES and pathlib.Path(path).is_file():
        raise SourceError(f"{path} is a video: pass its folder, or a list that names it")
    if pathlib.Path(path).is_file():
        return from_csv(path)
    return from_folder(split_folder(path, split) or path)


def hold_out(source: VideoSource, videos: int) -> tuple[VideoSource, VideoSource]:
    """Divides a source into (kept, held out): `videos` of them, at most a tenth, chosen by their ids' hash.

    The choice does not depend on order or seed, so a video stays held out from run to run.
    """
    count = min(videos, len(source) // 10)
    by_hash = sorted(range(len(source)), key=lambda i: hashlib.sha256(source.ids[i].encode()).digest())
    held = sorted(by_hash[:count])
    return source.select(sorted(by_hash[count:])), source.select(held)
