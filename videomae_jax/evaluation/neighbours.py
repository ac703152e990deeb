"""k-NN on frozen features: how well the nearest known videos name the class of another. NumPy."""

import numpy as np
from jaxtyping import Float, Int

from videomae_jax.evaluation.classification import is_finite


def votes(
    known: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    asked: Float[np.ndarray, "B D"],
    classes: int,
    neighbours: int,
    temperature: float,
) -> Float[np.ndarray, "B K"]:
    """Share of the votes for each class, float64.

    The nearest by cosine vote, each with weight exp(cosine / temperature):
    the weighted k-NN of instance discrimination (arXiv 1805.01978), in blocks: memory does not grow with B.
    Known features that are not finite have no vote; the votes on asked ones are NaN.

    Args:
        temperature: positive.

    Raises:
        ValueError: no known features are finite.
    """
    usable = is_finite(known)
    if not usable.any():
        raise ValueError(f"none of the features of {len(known)} known videos are finite")
    known, labels = known[usable], labels[usable]
    is_lost = ~is_finite(asked)
    asked = np.where(is_lost[:, None], 0.0, asked).astype(asked.dtype)
    known, asked = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (known, asked))
    count = min(neighbours, len(known))
    scores = np.zeros((len(asked), classes))
    for start in range(0, len(asked), 1024):
        cosines = asked[start : start + 1024] @ known.T
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        near = np.take_along_axis(cosines, nearest, axis=1).astype(np.float64)
        weights = np.exp((near - near.max(axis=1, keepdims=True)) / temperature)
        rows = np.arange(start, start + len(cosines))[:, None]
        np.add.at(scores, (rows, labels[nearest]), weights)
    scores[is_lost] = np.nan
    return scores / scores.sum(axis=1, keepdims=True)
