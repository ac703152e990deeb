"""The command `score-detections`: AVA's official metric of a file of detections, alone."""

import json
from array import array
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from videomae_jax import storage
from videomae_jax.apps import videos
from videomae_jax.config import UserError
from videomae_jax.data import boxes
from videomae_jax.evaluation import detection
from videomae_jax.evaluation.detection import Boxes


def run(truth: str, found: str, classes: str, excluded: str, out: str) -> dict[str, Any]:
    """Scores a CSV of detections by one of annotations, prints the table and writes it.

    Args:
        classes: list of the actions that count, see `boxes.read_actions`; others are left out on both sides.
        excluded: `video,time` of frames that are left out; "": none.
        out: JSON file: {"mAP": x, "classes": {ID: average precision, null without truth}, ...}.

    Raises:
        UserError: a file without a box, or annotations whose boxes are none.
        SourceError: files that are not understood, by line.
    """
    videos.make_room(storage.at(out), [truth, found, classes, excluded])
    actions = boxes.read_actions(classes)
    skipped = boxes.read_frames(excluded) if excluded else set()
    number: dict[tuple[str, int], int] = {}
    true, guessed = read(truth, number), read(found, number)
    if not all(areas := has_area(true.boxes)):
        raise UserError(
            f"{truth} line {true.lines[np.argmin(areas)]}: a box without area: left < right, top < bottom"
        )
    for path, side in ((truth, true), (found, guessed)):
        if not len(side.lines):
            raise UserError(f"{path} has no box in it: nothing can be scored")
    left_out = {number[frame] for frame in skipped if frame in number}
    annotated = true.frames - left_out
    if not annotated:
        raise UserError(f"{excluded} leaves out every frame of {truth}: nothing can be scored")
    if not annotated & guessed.frames:
        names = {place: frame for frame, place in number.items()}
        first = names[min(annotated)]
        raise UserError(
            f"{found} has no frame of {truth}, such as {','.join(map(str, first))} ms: "
            f"they are of other videos, or times are counted otherwise"
        )
    kept = [side.boxes.of(~np.isin(side.boxes.frames, list(left_out))) for side in (true, guessed)]
    precisions = detection.average_precisions(kept[0], kept[1], np.array(sorted(actions)))
    if all(value is None for value in precisions.values()):
        raise UserError(f"{truth} has no box of the classes in {classes}: nothing can be scored")
    result = {
        "mAP": detection.mean(precisions),
        "classes": {str(action): value for action, value in precisions.items()},
        "frames": len(annotated),
        "boxes": [int(np.isin(side.actions, list(actions)).sum()) for side in kept],
        "frames_without_truth": len(guessed.frames - annotated - left_out),
        "boxes_without_area": int((~has_area(guessed.boxes)).sum()),
    }
    storage.write_text(storage.at(out), json.dumps(result, indent=1) + "\n")
    _print(result, actions)
    return result


class Read(NamedTuple):
    """A file of boxes.

    Attributes:
        boxes: all of them.
        lines: where each stands.
        frames: numbers of all frames, also of those without any box.
    """

    boxes: Boxes
    lines: Int[np.ndarray, " N"]
    frames: set[int]


def read(path: str, number: dict[tuple[str, int], int]) -> Read:
    """Reads a file line by line into columns; frames are numbered as they come in `number`.

    Raises:
        SourceError: as `boxes.rows`.
    """
    frames, actions, lines = array("q"), array("q"), array("q")
    corners, scores = array("d"), array("d")
    seen: set[int] = set()
    for row in boxes.rows(path):
        frame = number.setdefault(row.frame, len(number))
        seen.add(frame)
        if row.corners:
            frames.append(frame)
            corners.extend(row.corners)
            actions.append(row.action)
            scores.append(row.extra)
            lines.append(row.line)
    found = Boxes(np.array(frames), np.array(corners).reshape(-1, 4), np.array(actions), np.array(scores))
    return Read(found, np.array(lines), seen)


def has_area(found: Boxes) -> Bool[np.ndarray, " N"]:
    """Which boxes lie the right way round."""
    left, top, right, bottom = found.corners.T
    return (left < right) & (top < bottom)


def _print(result: dict[str, Any], actions: dict[int, str]) -> None:
    known = [(value, int(action)) for action, value in result["classes"].items() if value is not None]
    for value, action in sorted(known, reverse=True):
        print(f"{value:7.2%}  {action:3} {actions[action]}")
    print(
        f"mAP {result['mAP']:.2%} over {len(known)} of {len(actions)} classes with true boxes, "
        f"{result['frames']} frames, {result['boxes'][1]} detections of {result['boxes'][0]} true boxes"
    )
    if result["frames_without_truth"]:
        print(f"{result['frames_without_truth']} frames without truth: all their detections count as wrong")
    if result["boxes_without_area"]:
        print(f"{result['boxes_without_area']} detections without area: left out")
