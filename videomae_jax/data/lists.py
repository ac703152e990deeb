"""Lists of videos: a path a line, with a class, classes or numbers; what is missing is named by its line."""

import collections
import csv
import math
import os
import pathlib
import re
from collections.abc import Sequence

from etils import epath

from videomae_jax.data import columns
from videomae_jax.data.sources import SUFFIXES, SourceError, VideoSource, join
from videomae_jax.storage import is_remote

_LIKE_LABEL = {"action", "category", "class", "labels", "class_id", "label_id", "target"}
_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)"

Line = tuple[int, list[str]]
"""(line number, fields)."""


def from_csv(
    path: str | os.PathLike, head: str = "softmax", root: str = "", allow_missing: bool = False
) -> VideoSource:
    """A list with a path and an optional label per line; relative paths start at `root`, or its own folder.

    Columns are separated by tabs, commas or spaces (the published lists), fields with separators are
    quoted. A path may lack its suffix. An empty label, like none, is -1: unknown.
    A first line that names a `path` column is a header: `label` is then read too and other columns
    are ignored. Without one, column 1 is the path and column 2 the label; of the three columns of VideoMAE
    V2's lists, FOLDER FRAMES LABEL and PATH START FRAMES (START 0 or 1), the label is read. Labels are all
    integers from 0, or all names (classes are then in alphabetical order).

    Args:
        head: "softmax"; "multilabel": classes separated by `;`, a lone `;` for none of them; "regression":
            numbers separated by `;`. The last two need a label on every line.
        allow_missing: leave absent videos out and name them in `notes`.

    Raises:
        SourceError: an unreadable or empty list, a wrong column, an absent file, a repeated one, or a label
            that is missing or makes no sense for the head.
    """
    path = epath.Path(path)
    folder = str(epath.Path(root) if root else path.parent)
    lines, names, labels = _fields(path, _read_rows(path, folder))
    lines, found, labels, absent = _find(path, folder, lines, names, labels)
    ids = columns.texts(found)
    notes = ()
    if absent:
        line, video = absent[0]
        text = (
            f"{path}, line {line}: no file {join(folder, video)} ({len(absent)} of {len(names)} are absent)"
        )
        if not allow_missing or not ids:
            raise SourceError(
                f"{text}: correct the paths, relative ones start at {folder} (data.root); a header must name "
                f"a column `path`; or leave them out with --config.data.allow_missing=true (prepare: "
                f"--allow_missing)"
            )
        some = ", ".join(video for _, video in absent[:10]) + (", ..." if len(absent) > 10 else "")
        notes = (f"{text}: left out as allowed: {some}",)
    shared = {"notes": notes, "absent": tuple(video for _, video in absent), "head": head or "softmax"}
    if not head:  # labels of any kind, and nobody asks for them
        return VideoSource(folder, ids, columns.numbers([-1] * len(ids)), **shared)
    if head != "softmax":
        classes, targets = (_numbers if head == "regression" else _multi_hot)(path, lines, labels)
        return VideoSource(folder, ids, columns.numbers([-1] * len(ids)), classes, targets, **shared)
    classes, numbers = _one_class(path, lines, labels)
    return VideoSource(folder, ids, columns.numbers(numbers), classes, **shared)


def _read_rows(path: epath.Path, folder: str) -> list[Line]:
    """The fields of a list separated by tabs, commas or spaces; quotes protect separators."""
    try:
        data = path.read_bytes()
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise SourceError(f"{path} cannot be read as a text list: it is UTF-16, save it as UTF-8")
        lines = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))  # a name may hold other breaks of lines
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as a text list: {error}") from None
    text = next((line.strip() for line in lines if line.strip()), "")
    whole = join(folder, text).exists()  # paths only, one a line, whatever is in them
    delimiter = "\t" if whole else next((d for d in "\t, " if d in text), "\t")
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    parsed, before = [], 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise SourceError(
                f"{path}, line {before + 1}: a quote is not closed, or text follows it ({error})"
            ) from None
        if row is None:
            break
        if rows.line_num > before + 1:
            raise SourceError(f"{path}, line {before + 1}: a quote is not closed on its line")
        before = rows.line_num
        fields = [field.strip() for field in row]
        if delimiter == " ":  # trailing blanks are not fields
            fields = [field for field in fields if field]
        if any(fields):
            parsed.append((rows.line_num, fields))
    if not parsed:
        raise SourceError(f"{path} is empty: expected a path and an optional label per line")
    return parsed


def _fields(path: epath.Path, rows: list[Line]) -> tuple[list[int], list[str], list[str]]:
    """(line numbers, paths, labels) of the rows; a label is empty where there is none."""
    header = [name.lower() for name in rows[0][1]]
    has_header = "path" in header
    if has_header:
        others = sorted(_LIKE_LABEL & set(header))
        if others and "label" not in header:
            raise SourceError(
                f"{path}, line 1: the header has a column `{others[0]}`: call the one of the labels `label`"
            )
        rows, width = rows[1:], len(header)
        places = [header.index(name) for name in ("path", "label") if name in header]
    else:
        width = len(rows[0][1])
        places = [0, 1][:width] if width < 3 else _published(rows)
    if not rows:
        raise SourceError(f"{path} lists no video below its header")
    names, labels = [], []
    for line, row in rows:
        if len(row) != width or not places:
            raise SourceError(
                f"{path}, line {line}: {len(row)} columns {row} where a path and an optional label were "
                f"expected: quote paths with separators, or begin with a header line `path,label`"
            )
        if not row[places[0]]:
            raise SourceError(f"{path}, line {line}: no path")
        names.append(row[places[0]])
        labels.append(row[places[1]] if len(places) == 2 else "")
    return [line for line, _ in rows], names, labels


def _published(rows: list[Line]) -> list[int]:
    """Places of path and label in a list of VideoMAE V2; empty where it is none."""
    fields = [row[1:] for _, row in rows]
    if not all(len(row) >= 2 and all(re.fullmatch(r"-?\d+", field) for field in row) for row in fields):
        return []
    if all(row[0] in ("0", "1") for row in fields):
        return [0]  # PATH START FRAMES, and what may follow
    return [0, 2] if all(len(row) == 2 for row in fields) else []


def _find(
    path: epath.Path, folder: str, lines: list[int], names: list[str], labels: list[str]
) -> tuple[list[int], tuple[str, ...], list[str], list[tuple[int, str]]]:
    """Lines, names and labels of the videos that are there, with their suffix; (line, name) of the others."""
    first_line: dict[str, int] = {}
    endings: dict[str, dict[str, list[str]]] = {}
    places = [video if is_remote(video) else os.path.join(folder, video) for video in names]
    there = _There(places)
    found, absent = [], []
    for line, video, label, place in zip(lines, names, labels, places, strict=True):
        suffixes = [""]
        if place not in there:
            parent, _, name = place.rpartition("/")
            if parent not in endings:
                endings[parent] = _by_stem(epath.Path(parent or "/"))
            suffixes = endings[parent].get(name, [])
        if len(suffixes) > 1:
            raise SourceError(f"{path}, line {line}: {video} is {' and '.join(suffixes)}: add the suffix")
        whole = video + "".join(suffixes)
        before = first_line.setdefault(whole if is_remote(whole) else os.path.normpath(whole), line)
        if before != line:
            raise SourceError(f"{path}, line {line}: {video} is already on line {before}")
        if suffixes:
            found.append((line, whole, label))
        else:
            absent.append((line, video))
    kept = list(zip(*found, strict=True)) or [(), (), ()]
    return list(kept[0]), tuple(kept[1]), list(kept[2]), absent


class _There:
    """Which of many places hold something; a folder of many is listed once, not asked for each.

    A link into nowhere, or what is no file, is there: it is the failure of that video alone.
    """

    _MANY = 64

    def __init__(self, places: Sequence[str]):
        self._asked = collections.Counter(place.rpartition("/")[0] for place in places)
        self._names: dict[str, set[str]] = {}

    def __contains__(self, place: str) -> bool:
        parent, _, name = place.rpartition("/")
        if self._asked[parent] >= self._MANY:
            if parent not in self._names:
                self._names[parent] = _names_in(parent or "/")
            if name in self._names[parent]:
                return True
        # Not in the list of names, and yet there: where upper and lower case are one.
        return epath.Path(place).exists() or os.path.islink(place)


def _names_in(folder: str) -> set[str]:
    try:
        return (
            {e.name for e in epath.Path(folder).iterdir()} if is_remote(folder) else set(os.listdir(folder))
        )
    except OSError:  # absent, or no folder
        return set()


def _by_stem(folder: epath.Path) -> dict[str, list[str]]:
    """Suffixes of the videos in a folder, by their names without."""
    found: dict[str, list[str]] = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        suffix = pathlib.PurePosixPath(entry.name).suffix
        if suffix.lower() in SUFFIXES:
            found.setdefault(entry.name.removesuffix(suffix), []).append(suffix)
    return found


def _one_class(
    path: epath.Path, lines: list[int], labels: Sequence[str]
) -> tuple[tuple[str, ...], list[int]]:
    """(class names, class of each video)."""
    given = [label or "-1" for label in labels]
    are_numbers = [re.fullmatch(_NUMBER, label.lower()) is not None for label in given]
    if not any(is_number and label != "-1" for is_number, label in zip(are_numbers, given, strict=True)):
        for line, label in zip(lines, given, strict=True):
            if ";" in label:
                raise SourceError(
                    f"{path}, line {line}: {label!r} is several classes: set head.kind=multilabel (prepare: "
                    f"--head=multilabel), or write one"
                )
        classes = tuple(sorted(set(given) - {"-1"}))
        places = {"-1": -1, **{name: i for i, name in enumerate(classes)}}
        return classes, [places[label] for label in given]
    for line, label in zip(lines, given, strict=True):
        if not re.fullmatch(r"-1|\d{1,6}", label, re.ASCII):
            raise SourceError(
                f"{path}, line {line}: the label {label!r} beside numbers: labels are all integers from 0 or "
                f"all names; for numbers to predict set head.kind=regression (prepare: --head=regression)"
            )
    numbers = [int(label) for label in given]
    return tuple(str(i) for i in range(max(numbers) + 1)), numbers


_Targets = tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]


def _multi_hot(path: epath.Path, lines: list[int], labels: Sequence[str]) -> _Targets:
    """(class names in order, 0 or 1 for each of them per video)."""
    named = []
    for line, label in zip(lines, labels, strict=True):
        parts = {part.strip() for part in label.split(";") if part.strip()}
        if not label or "-1" in parts:
            raise SourceError(f"{path}, line {line}: no classes: name them, or write `;` for none of them")
        named.append(parts)
    classes = tuple(sorted(set().union(*named), key=lambda n: (int(n), n) if n.isdecimal() else (-1, n)))
    return classes, tuple(tuple(float(name in parts) for name in classes) for parts in named)


def _numbers(path: epath.Path, lines: list[int], labels: Sequence[str]) -> _Targets:
    """(names of the values, the values of each video)."""
    values: list[tuple[float, ...]] = []
    for line, label in zip(lines, labels, strict=True):
        try:
            values.append(tuple(float(part) for part in label.split(";")))
        except ValueError:
            what = f"{label} is no number" if label else "no number"
            raise SourceError(f"{path}, line {line}: {what} to predict") from None
        if not all(map(math.isfinite, values[-1])):
            raise SourceError(
                f"{path}, line {line}: {label} is not finite: correct it, or leave the line out"
            )
        if len(values[-1]) != len(values[0]):
            raise SourceError(
                f"{path}, line {line}: {len(values[-1])} numbers where {len(values[0])} were before"
            )
    return tuple(f"value {i}" for i in range(len(values[0]))), tuple(values)
