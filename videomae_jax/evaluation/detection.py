"""Frame-mAP of action detections: PASCAL average precision of each class, as AVA's official evaluator has it.

Differences from it: of equal scores the order of rows decides nothing (a precision is read where scores
differ), and what is left out is counted.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

_MOST = 10_000  # detections of a frame and class, the best of them


class Boxes(NamedTuple):
    """Boxes with an action each; one of several actions stands here several times.

    Attributes:
        frames: which frame each is in; any numbers.
        corners: left, top, right, bottom.
        actions: what is done there.
        scores: how sure that is; of the truth they are not looked at.
    """

    frames: Int[np.ndarray, " N"]
    corners: Float[np.ndarray, "N 4"]
    actions: Int[np.ndarray, " N"]
    scores: Float[np.ndarray, " N"]

    def of(self, chosen: Bool[np.ndarray, " N"] | Int[np.ndarray, " M"]) -> "Boxes":
        """Some of them."""
        return Boxes(*(column[chosen] for column in self))


def overlaps(first: Float[np.ndarray, "N 4"], second: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "N M"]:
    """Intersection over union of each with each; 0 of boxes without area."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (first, second)]
    whole = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, whole, out=np.zeros_like(whole), where=whole > 0)


def average_precisions(
    truth: Boxes, found: Boxes, actions: Int[np.ndarray, " K"], threshold: float = 0.5
) -> dict[int, float | None]:
    """Average precision of each action; None of those without any true box.

    A detection is right if the true box of its action and frame that it overlaps most is overlapped by
    `threshold` or more, and no better scored one has it. All of a frame without truth are wrong.
    """
    has_area = (found.corners[:, 2:] > found.corners[:, :2]).all(1)
    return {
        int(action): _average_precision(
            truth.of(truth.actions == action), found.of(has_area & (found.actions == action)), threshold
        )
        for action in actions
    }


def mean(precisions: dict[int, float | None]) -> float:
    """The mean over the actions that have one; NaN without any."""
    known = [x for x in precisions.values() if x is not None]
    return float(np.mean(known)) if known else float("nan")


def _average_precision(truth: Boxes, found: Boxes, threshold: float) -> float | None:
    if not len(truth.frames):
        return None
    found = found.of(np.lexsort((-found.scores, found.frames)))
    starts = np.searchsorted(found.frames, found.frames)
    found = found.of(np.arange(len(starts)) - starts < _MOST)
    truth = truth.of(np.argsort(truth.frames, kind="stable"))
    right = np.zeros(len(found.frames), bool)
    for frame in np.intersect1d(truth.frames, found.frames):
        first, end = np.searchsorted(found.frames, [frame, frame + 1])
        low, high = np.searchsorted(truth.frames, [frame, frame + 1])
        overlap = overlaps(found.corners[first:end], truth.corners[low:high])
        nearest = overlap.argmax(axis=1)
        enough = np.flatnonzero(overlap.max(axis=1) >= threshold)
        _, best = np.unique(nearest[enough], return_index=True)
        right[first + enough[best]] = True
    return area_under(found.scores, right, len(truth.frames))


def area_under(scores: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"], total: int) -> float:
    """Area under the curve of the best precision at each recall or a higher one; equal scores are one point.

    Args:
        total: what there is to find.

    >>> round(area_under(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 2), 4)
    0.8333
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1) if len(order) else order
    hits = np.cumsum(right[order])[last]
    recall, precision = hits / total, hits / (last + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())
