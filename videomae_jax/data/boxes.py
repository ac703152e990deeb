"""Files of boxes: annotations and detections as AVA has them, class lists, and what detectors publish.

A row is `video,time,left,top,right,bottom,action[,person or score]`, corners in parts of the frame, time in
seconds; `video,time` alone is a frame without any box.
"""

import csv
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

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
    return list(_rows(path, needs_action))


def _lines(path: str) -> Iterator[tuple[int, list[str]]]:
    try:
        text = epath.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}): pass a CSV file") from None
    for number, fields in enumerate(csv.reader(text.splitlines()), 1):
        if fields:
            yield number, [field.strip() for field in fields]


def _rows(path: str, needs_action: bool) -> Iterator[Row]:
    for line, fields in _lines(path):
        if len(fields) == 6 and not needs_action:
            fields = [*fields, "-1"]
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


def read_frames(path: str) -> set[tuple[str, int]]:
    """The (video, milliseconds) of a file of `video,time`: frames that are excluded.

    Raises:
        SourceError: as `read_rows`.
    """
    found = set()
    for line, fields in _lines(path):
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
        text = epath.Path(path).read_text(encoding="utf-8")
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
            if row.strip():
                number, comma, name = row.partition(",")
                if not comma or not re.fullmatch(r"\s*\d+\s*", number):
                    raise SourceError(f"{path} line {line}: expected number,name")
                pairs.append((number, name))
    actions = {int(number): name.strip() for number, name in pairs}
    if not actions or len(actions) < len(pairs):
        raise SourceError(f"{path}: {'a number stands there twice' if pairs else 'no class in it'}")
    return actions
