"""How good predictions are: views merged, then one number per video counted once. NumPy, float64.

Outputs that are not finite are never right: a video with one of them, in any view, counts as wrong.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


def is_finite(values: Float[np.ndarray, "B ..."]) -> Bool[np.ndarray, " B"]:
    """Whether all values of a video are."""
    flat: Any = np.isfinite(values.reshape(len(values), -1))  # NumPy's stubs make it one or many
    return flat.all(axis=1)


class OutputError(ValueError):
    """What a model says of a video is not finite, so it says nothing."""


def check_finite(outputs: Float[np.ndarray, "B ..."], ids: Sequence[str], whose: str) -> None:
    """Refuses outputs for the videos `ids` of which one is not finite.

    Raises:
        OutputError: naming `whose` outputs they are, and the first video.
    """
    good = is_finite(outputs)
    if not good.all():
        raise OutputError(
            f"{whose}: the outputs for {int((~good).sum())} of {len(ids)} videos are not finite, the "
            f"first is {ids[int(good.argmin())]}: these weights have diverged (train again with a lower "
            f"optim.lr, or with optim.clip_norm) or are damaged"
        )


def merge_views(outputs: Float[np.ndarray, "B V K"], head: str) -> Float[np.ndarray, "B K"]:
    """One score per video and class from the outputs of its views, float64.

    As published the mean over views of the softmax; of the sigmoid for "multilabel", of the values for
    "regression". NaN for a video with an output that is not finite: a softmax would hide -inf.

    >>> merge_views(np.array([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]), "softmax").round(4).tolist()
    [[0.4995, 0.3413, 0.1592]]
    """
    x = np.asarray(outputs, np.float64)
    good = is_finite(x)
    x = np.where(good[:, None, None], x, 0.0)
    if head == "softmax":
        x = np.exp(x - x.max(axis=-1, keepdims=True))
        x = x / x.sum(axis=-1, keepdims=True)
    elif head == "multilabel":
        x = np.exp(-np.logaddexp(0, -x))
    return np.where(good[:, None], x.mean(axis=1), np.nan)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Merged scores of the videos that could be decoded, and the truth.

    Attributes:
        records: place of each video in its source, ascending, each once.
        values: float64, see `merge_views`.
        labels: class of each video; -1: unknown.
        targets: of "multilabel" and "regression", else [B, 0].
    """

    records: Int[np.ndarray, " B"]
    values: Float[np.ndarray, "B K"]
    labels: Int[np.ndarray, " B"]
    targets: Float[np.ndarray, "B J"]

    @property
    def not_finite(self) -> Int[np.ndarray, " M"]:
        """Places in the source of the videos whose scores are not finite."""
        return self.records[~is_finite(self.values)]

    def metrics(self, head: str) -> dict[str, float]:
        """The figures of a kind of head, as fractions.

        "softmax": top1, top5, mean_class_accuracy (over classes that have videos), loss. "multilabel":
        mean_average_precision. "regression": mean_squared_error, mean_absolute_error, r2 (0 at most where all
        targets are the same), which are NaN where scores are not finite.
        """
        if head == "multilabel":
            return {"mean_average_precision": mean_average_precision(self.values, self.targets)}
        if head == "regression":
            error = self.values - self.targets
            spread = ((self.targets - self.targets.mean(axis=0)) ** 2).mean()
            squared = float((error**2).mean())
            return {
                "mean_squared_error": squared,
                "mean_absolute_error": float(np.abs(error).mean()),
                "r2": float(1 - squared / spread) if spread else float(squared == 0) + 0 * squared,
            }
        known = self.labels >= 0
        values, labels = self.values[known], self.labels[known]
        ranks = label_ranks(values, labels)
        right = ranks == 0
        per_class = [right[labels == label].mean() for label in np.unique(labels)]
        chosen = np.nan_to_num(values[np.arange(len(labels)), labels], nan=0.0)
        return {
            "top1": float(right.mean()),
            "top5": float((ranks < 5).mean()),
            "mean_class_accuracy": float(np.mean(per_class)),
            "loss": float(-np.log(np.maximum(chosen, 1e-300)).mean()),
        }

    def confusion(self) -> Int[np.ndarray, "K K"]:
        """Videos by (class, predicted class)."""
        classes = self.values.shape[1]
        known = self.labels >= 0
        pairs = self.labels[known] * classes + self.values[known].argmax(axis=1)
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def label_ranks(values: Float[np.ndarray, "B K"], labels: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    """How many classes come before the label's by score; of equal scores the lower class comes first.

    A video with a score that is not finite comes after any number of classes.
    """
    own = values[np.arange(len(labels)), labels][:, None]
    before = np.arange(values.shape[1]) < labels[:, None]
    ranks = ((values > own) | ((values == own) & before)).sum(axis=1)
    return np.where(is_finite(values), ranks, np.iinfo(ranks.dtype).max)


def mean_average_precision(scores: Float[np.ndarray, "B K"], targets: Float[np.ndarray, "B K"]) -> float:
    """Mean over classes of the average precision; classes without a positive video are left out.

    Videos of equal score come at once, so their order does not matter. Scores that are not finite count
    as the wrong ones: last of all for a positive video, first for another.

    >>> mean_average_precision(np.array([[0.9], [0.8], [0.1]]), np.array([[1.0], [0.0], [1.0]]))
    0.8333333333333333
    """
    scores = np.where(np.isfinite(scores), scores, np.where(targets > 0, -np.inf, np.inf))
    precisions = []
    for score, target in zip(scores.T, targets.T, strict=True):
        if target.any():
            order = np.argsort(-score)
            # The last of each run of equal scores.
            ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
            hits = np.cumsum(target[order])[ends]
            precisions.append((hits / (ends + 1) * np.diff(hits, prepend=0)).sum() / hits[-1])
    return float(np.mean(precisions))


def is_at_chance(accuracy: float, labels: Int[np.ndarray, " B"]) -> bool:
    """Whether always naming the most frequent class is as good, within two standard deviations of luck."""
    share = np.bincount(labels[labels >= 0]).max() / len(labels)
    return bool(accuracy < 1 and accuracy <= share + 2 * np.sqrt(share * (1 - share) / len(labels)))
