"""Files of boxes: annotations and detections as AVA has them, class lists, and what detectors publish.

A row is `video,time,left,top,right,bottom,action[,person or score]`, corners in parts of the frame, time in
seconds; `video,time` alone is a frame without any box.
"""

import csv
import json
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
from etils import epath

from videomae_jax.data.sources import SourceError


class Row(NamedTuple):
    """A line of a file of boxes.

    Attributes:
        time: seconds into the video.
        corners: left, top, right, bottom in 0..1; None of a frame without any box.
        action: number of what is done there; -1 of a frame without any box.
        extra: the person's number in annotations, the score in detections; 1 where there is none.
        line: where it stands, from 1.
    """

    video: str
    time: float
    corners: tuple[float, float, float, float] | None
    action: int
    extra: float
    line: int

    @property
    def frame(self) -> tuple[str, int]:
        """Video and milliseconds: equal for all boxes of a frame, however its time is written."""
        return self.video, round(self.time * 1000)


def read_rows(path: str, needs_action: bool = True) -> list[Row]:
    """The rows of a file of boxes.

    Args:
        needs_action: else a row may end after the corners; its action is -1 then.

    Raises:
        SourceError: it cannot be read, or a line is no such row; named by file and line.
    """
    return list(rows(path, needs_action))


def _lines(path: str) -> Iterator[tuple[int, list[str]]]:
    try:
        with epath.Path(path).open("r", encoding="utf-8") as file:
            for number, fields in enumerate(csv.reader(line.removeprefix("\ufeff") for line in file), 1):
                if fields:
                    yield number, [field.strip() for field in fields]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read ({error}): pass a CSV file") from None


def rows(path: str, needs_action: bool = True) -> Iterator[Row]:
    """`read_rows`, one after the other: a file of AVA's validation part may have 14 million."""
    for line, fields in _lines(path):
        if line == 1 and fields[1:2] == ["time"]:  # the names of the columns
            continue
        if not needs_action:  # nor has it to be there
            fields = [*fields[:6], fields[6] or "-1", *fields[7:]] if len(fields) > 6 else fields
            fields = [*fields, "-1"] if len(fields) == 6 else fields
        if len(fields) not in (2, 7, 8):
            raise SourceError(
                f"{path} line {line} has {len(fields)} fields: expected video,time,left,top,right,bottom,"
                f"action and a score or person, or video,time of a frame without a box"
            )
        try:
            time, *numbers = (float(field) for field in fields[1:])
        except ValueError as error:
            raise SourceError(f"{path} line {line}: {error}: all but the video's name are numbers") from None
        if not all(math.isfinite(x) for x in (time, *numbers)) or time < 0:
            raise SourceError(f"{path} line {line}: {','.join(fields)} holds what is no number or time")
        if not numbers:
            yield Row(fields[0], time, None, -1, 1.0, line)
            continue
        left, top, right, bottom, action, *extra = numbers
        if action != int(action) or (action < 0 and needs_action):
            raise SourceError(f"{path} line {line}: the action {fields[6]} is no number of a class")
        yield Row(fields[0], time, (left, top, right, bottom), int(action), (extra or [1.0])[0], line)


DETECTIONS = (".csv", ".json", ".pkl")
"""Suffixes of files that `read_detections` knows."""


def read_detections(path: str) -> list[Row]:
    """Boxes that a detector found in AVA's movies, in one of the four published forms, or of one's own.

    * .csv: `video,time,left,top,right,bottom,[action],score` (LFB, SlowFast, one's own)
    * .json: AlphAction's and VideoMAE's list of {image_id, bbox, score}, boxes in pixels; `images` with their
      sizes stand in the same file or in another .json of its folder (`ava_val_v2.2_min.json`)
    * .pkl: MMAction2's {"video,second": [[left, top, right, bottom, score], ...]}

    Raises:
        SourceError: it cannot be read, or is none of these.
    """
    suffix = epath.Path(path).suffix
    if suffix not in DETECTIONS:
        raise SourceError(f"{path}: boxes of a detector are {', '.join(DETECTIONS)} files")
    if suffix == ".csv":
        return read_rows(path, needs_action=False)
    try:
        return list(_of_alphaction(epath.Path(path)) if suffix == ".json" else _of_mmaction(path))
    except SourceError:
        raise
    except Exception as error:  # damaged files show as many types
        raise SourceError(f"{path} is not understood ({type(error).__name__}: {error})") from None


def _of_alphaction(file: epath.Path) -> Iterator[Row]:
    found = json.loads(file.read_text())
    others = [found] if isinstance(found, dict) and found.get("images") else []
    if not others:
        others = [json.loads(other.read_text()) for other in sorted(file.parent.glob("*min.json"))]
    images: dict[Any, dict[str, Any]] = {}
    for image in (i for other in others if isinstance(other, dict) for i in other.get("images", ())):
        known = images.setdefault(image["id"], image)
        if any(known[name] != image[name] for name in ("movie", "timestamp", "width", "height")):
            raise SourceError(
                f"{file}: image {image['id']} is of {known['movie']} in one *min.json of its folder and of "
                f"{image['movie']} in another: put `images` into the file itself, or keep one of them"
            )
    if not images:
        raise SourceError(
            f"{file} has boxes in pixels and no images beside: put the file with their sizes "
            f"(ava_val_v2.2_min.json) into its folder"
        )
    for place, box in enumerate(found["annotations"] if isinstance(found, dict) else found, 1):
        image = images[box["image_id"]]
        left, top, wide, high = box["bbox"]
        size = image["width"], image["height"]
        corners = (left / size[0], top / size[1], (left + wide) / size[0], (top + high) / size[1])
        yield Row(image["movie"], float(image["timestamp"]), corners, -1, float(box["score"]), place)


def _of_mmaction(path: str) -> Iterator[Row]:
    with epath.Path(path).open("rb") as file:
        found = _Arrays(file).load()
    for place, (frame, table) in enumerate(found.items(), 1):
        video, _, second = frame.rpartition(",")
        for left, top, right, bottom, score in np.asarray(table, float).reshape(-1, 5).tolist():
            yield Row(video, float(second), (left, top, right, bottom), -1, score, place)


def inside(row: Row) -> Row | None:
    """A box that a detector found, cut to the frame; None if nothing is left of it."""
    assert row.corners
    left, top, right, bottom = (min(max(x, 0.0), 1.0) for x in row.corners)
    return row._replace(corners=(left, top, right, bottom)) if left < right and top < bottom else None


class _Arrays(pickle.Unpickler):
    """Reads dicts of NumPy arrays and nothing else: nothing that a file names is called but these."""

    _KNOWN: ClassVar = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        """What an array is made of.

        Raises:
            SourceError: anything else.
        """
        is_array = name in ("_reconstruct", "scalar") and module.endswith(".multiarray")
        if (module, name) not in self._KNOWN and not (is_array and module.startswith("numpy")):
            raise SourceError(f"it asks for {module}.{name}: detections are dicts of arrays alone")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_frames(path: str) -> set[tuple[str, int]]:
    """The (video, milliseconds) of a file of `video,time`: frames that are excluded.

    Raises:
        SourceError: as `read_rows`.
    """
    found = set()
    for line, fields in _lines(path):
        if line == 1 and fields == ["video", "time"]:
            continue
        try:
            video, time = fields
            found.add((video, round(float(time) * 1000)))
        except ValueError:
            raise SourceError(f"{path} line {line}: expected video,time") from None
    return found


def read_actions(path: str) -> dict[int, str]:
    """Numbers and names of the actions of a class list: AVA's pbtxt, or `number,name` a line.

    Raises:
        SourceError: nothing like it, or a number that stands there twice.
    """
    try:
        text = epath.Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}): pass a list of classes") from None
    pairs: list[tuple[str, str]] = []
    if "{" in text:
        for block in re.findall(r"\{(.*?)\}", text, re.DOTALL):
            number, name = re.search(r"id\s*:\s*(\d+)", block), re.search(r"name\s*:\s*\"(.*?)\"", block)
            if not number or not name:
                raise SourceError(f"{path}: {{{' '.join(block.split())}}} has no id or name")
            pairs.append((number[1], name[1]))
    else:
        for line, row in enumerate(text.splitlines(), 1):
            if row.strip() and (line > 1 or row.replace(" ", "").lower() != "number,name"):
                number, comma, name = row.partition(",")
                if not comma or not re.fullmatch(r"\s*\d+\s*", number):
                    raise SourceError(f"{path} line {line}: expected number,name")
                pairs.append((number, name))
    actions = {int(number): name.strip() for number, name in pairs}
    if not actions or len(actions) < len(pairs):
        raise SourceError(f"{path}: {'a number stands there twice' if pairs else 'no class in it'}")
    if len(set(actions.values())) < len(actions):
        raise SourceError(f"{path}: a name stands there twice")
    return actions
