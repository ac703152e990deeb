"""Boxes of one's own, in AVA's form (`data.scenes`): clips around key frames, prepared."""

import dataclasses

from etils import epath

from videomae_jax.data import boxes as files
from videomae_jax.data import scenes
from videomae_jax.data.builders.ava import Boxes, features, key_frame
from videomae_jax.data.collection import Collection, Entry
from videomae_jax.data.sources import SourceError


def boxes(folder: epath.Path, _videos: epath.Path) -> Collection:
    """One record per key frame that has a box, or a detector's, with the id VIDEO/SECOND; label -1.

    Raises:
        SourceError: as `scenes.open_scenes`.
    """
    path = str(folder)
    train = scenes.open_scenes(path, "train")
    if train.numbers != tuple(range(1, len(train.numbers) + 1)):
        raise SourceError(f"{folder}: number the classes from 1 on without gaps, so that they stay the same")
    parts = [part for part in scenes.PARTS if scenes.has_part(path, part)]
    splits = {part: _entries(path, part) for part in parts}
    return Collection("boxes", splits, train.classes, features(len(train.classes)))


def _entries(path: str, part: str) -> list[Entry]:
    source = scenes.open_scenes(path, part)  # which checks the rows
    places, numbers = dict(source.files), source.numbers
    frames: dict[tuple[str, int], Boxes] = {}
    for row in files.read_rows(str(epath.Path(path) / f"{part}.csv")):
        if row.video in places:
            frames.setdefault(row.frame, {})  # those without any box too
        if row.corners:
            marks = frames.setdefault(row.frame, {}).setdefault((*row.corners, row.extra), [0] * len(numbers))
            marks[numbers.index(row.action)] = 1
    detected = scenes.detected_file(path, part)
    for row in files.read_detections(detected) if detected else ():
        if row.video in places:  # what is found where nobody is counts in a test
            frames.setdefault(row.frame, {})
    return [
        dataclasses.replace(key_frame(frame[0], frame[1] / 1000, frames[frame]), path=places[frame[0]])
        for frame in sorted(frames)
    ]
