"""AVA 2.2: clips around key frames, with person boxes and their actions (arXiv 1705.08421).

Read from ava_train_v2.2.csv, ava_val_v2.2.csv, the lists of excluded timestamps, and the action list; the
movies are whole, so that seconds in the files are seconds of the movie.
"""

import csv
import re

from etils import epath

from videomae_jax.data.collection import Collection, Entry, VideoFinder, collect, find_file
from videomae_jax.data.scenes import CLIP_SECONDS
from videomae_jax.data.sources import SourceError

_ACTIONS = 80


def features(actions: int) -> dict[str, tuple[tuple[int | None, ...], str]]:
    """What a record has beside the usual: name -> (shape, dtype)."""
    return {
        "timestamp": ((), "float32"),  # seconds into the movie
        "boxes": ((None, 4), "float32"),  # x1, y1, x2, y2 as shares of width and height
        "actions": ((None, actions), "uint8"),  # of each box, 1 where it applies
        "persons": ((None,), "int32"),
    }


Boxes = dict[tuple[float, ...], list[int]]
"""(x1, y1, x2, y2, person) -> its actions, 1 where they apply."""


PARTS = {"train": "train", "validation": "val"}
"""Split -> what the official files call it."""


def ava(annotations: epath.Path, videos: epath.Path) -> Collection:
    """One record per annotated key frame, with the id MOVIE/SECOND; label -1.

    Raises:
        SourceError: annotation files of something else.
    """
    names = action_names(annotations)
    splits = {split: entries(annotations, short) for split, short in PARTS.items()}
    return collect("ava", splits, VideoFinder(videos), names, features(_ACTIONS))


def action_names(annotations: epath.Path) -> tuple[str, ...]:
    """The 80 actions, by their numbers."""
    file = find_file(annotations, "action list", "ava_action_list_v2.2.pbtxt")
    pairs = re.findall(r'name:\s*"([^"]*)"\s*(?:label_)?id:\s*(\d+)', file.read_text())
    names = {int(number): name for name, number in pairs}
    if sorted(names) != list(range(1, _ACTIONS + 1)):
        raise SourceError(f"{file} has {len(names)} actions, not the {_ACTIONS} of AVA 2.2")
    return tuple(names[number] for number in sorted(names))


def entries(annotations: epath.Path, short: str) -> list[tuple[Entry, list[str]]]:
    """The key frames of a part of AVA, each with the name of its movie."""
    excluded_file = f"ava_{short}_excluded_timestamps_v2.2.csv"
    excluded = {
        (movie, float(second))
        for movie, second in _rows(find_file(annotations, "list of excluded timestamps", excluded_file), 2)
    }
    file = find_file(annotations, f"{short} list", f"ava_{short}_v2.2.csv")
    frames = key_frames(file, _rows(file, 8), excluded)
    return [(key_frame(movie, second, boxes), [movie]) for (movie, second), boxes in frames.items()]


def key_frames(
    file: epath.Path, rows: list[list[str]], excluded: set[tuple[str, float]]
) -> dict[tuple[str, float], Boxes]:
    """(video, second) -> the boxes of a list of video,second,x1,y1,x2,y2,action,person."""
    frames: dict[tuple[str, float], Boxes] = {}
    empty: list[str] = []
    for movie, second, x1, y1, x2, y2, action, person in rows:
        if (movie, float(second)) in excluded:
            continue
        boxes = frames.setdefault((movie, float(second)), {})
        if not action:  # a key frame without anybody
            continue
        if not 1 <= int(action) <= _ACTIONS:
            raise SourceError(f"{file}: {movie}, second {second} has action {action}, of {_ACTIONS}")
        left, top, right, bottom = (min(max(float(value), 0.0), 1.0) for value in (x1, y1, x2, y2))
        if left >= right or top >= bottom:  # dropped as published, but said
            empty.append(f"{movie},{second}")
            continue
        key = (left, top, right, bottom, float(person))
        boxes.setdefault(key, [0] * _ACTIONS)[int(action) - 1] = 1
    if empty:
        print(f"{file}: {len(empty)} boxes without area are left out, the first of {empty[0]}", flush=True)
    return frames


def key_frame(movie: str, second: float, boxes: Boxes) -> Entry:
    """A record of `CLIP_SECONDS` around a key frame; its id is MOVIE/SECOND, its file still unknown.

    Seconds count in milliseconds, as `boxes.Row.frame` has them.
    """
    second = round(second, 3)
    extra = {
        "timestamp": second,
        "boxes": [list(key[:4]) for key in boxes],
        "actions": list(boxes.values()),
        "persons": [int(key[4]) for key in boxes],
    }
    return Entry(
        id=f"{movie}/{second:.10g}",
        path="",
        seconds=(max(second - CLIP_SECONDS / 2, 0.0), second + CLIP_SECONDS / 2),
        extra=extra,
    )


def _rows(file: epath.Path, columns: int) -> list[list[str]]:
    with file.open("r") as lines:
        rows = [row for row in csv.reader(lines) if row]
    odd = next((row for row in rows if len(row) != columns), None)
    if odd is not None:
        raise SourceError(f"{file} is no list of AVA 2.2: {odd} has {len(odd)} columns, not {columns}")
    return rows
