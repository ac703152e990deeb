"""The command `score-detections`: AVA's official metric of a file of detections, alone."""

import json
from typing import Any

import numpy as np

from videomae_jax import storage
from videomae_jax.config import UserError
from videomae_jax.data import boxes
from videomae_jax.data.boxes import Row
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
    if trouble := storage.trouble(storage.at(out).parent):
        raise UserError(f"{trouble}: choose another --out")
    actions = boxes.read_actions(classes)
    skipped = boxes.read_frames(excluded) if excluded else set()
    true_rows, found_rows = boxes.read_rows(truth), boxes.read_rows(found)
    for row in true_rows:
        if row.corners and not has_area(row):
            raise UserError(f"{truth} line {row.line}: a box without area: left < right, top < bottom")
    for path, rows in ((truth, true_rows), (found, found_rows)):
        if not any(row.corners for row in rows):
            raise UserError(f"{path} has no box in it: nothing can be scored")
    annotated = {row.frame for row in true_rows} - skipped
    if not annotated & {row.frame for row in found_rows}:
        raise UserError(
            f"{found} has no frame of {truth}, such as {','.join(map(str, min(annotated, default='?')))} ms: "
            f"they are of other videos, or times are counted otherwise"
        )
    number: dict[tuple[str, int], int] = {}
    sides = as_boxes(true_rows, number, skipped), as_boxes(found_rows, number, skipped)
    precisions = detection.average_precisions(sides[0], sides[1], np.array(sorted(actions)))
    result = {
        "mAP": detection.mean(precisions),
        "classes": {str(action): value for action, value in precisions.items()},
        "frames": len(annotated),
        "boxes": [int(np.isin(side.actions, list(actions)).sum()) for side in sides],
        "frames_without_truth": len({row.frame for row in found_rows} - annotated - skipped),
        "boxes_without_area": sum(row.corners is not None and not has_area(row) for row in found_rows),
    }
    storage.write_text(storage.at(out), json.dumps(result, indent=1) + "\n")
    _print(result, actions)
    return result


def has_area(row: Row) -> bool:
    """Whether the box of a row lies the right way round."""
    assert row.corners
    left, top, right, bottom = row.corners
    return left < right and top < bottom


def as_boxes(rows: list[Row], number: dict[tuple[str, int], int], skipped: set[tuple[str, int]]) -> Boxes:
    """The boxes of rows but for those of skipped frames; frames are numbered as they come in `number`."""
    kept = [row for row in rows if row.corners and row.frame not in skipped]
    return Boxes(
        np.array([number.setdefault(row.frame, len(number)) for row in kept], np.int64),
        np.array([row.corners for row in kept], np.float64).reshape(-1, 4),
        np.array([row.action for row in kept], np.int64),
        np.array([row.extra for row in kept], np.float64),
    )


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
