"""Losses of a clip's outputs, and targets from labels; each clip's own, float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def smoothed(labels: Int[Array, " B"], classes: int, smoothing: float) -> Float[Array, "B K"]:
    """Distributions over classes: 1 - s + s / K for the label, s / K for every other class."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def output_losses(
    outputs: Float[Array, "B K"],
    targets: Float[Array, "B K"],
    head: str,
    class_weights: tuple[float, ...] | None,
) -> Float[Array, " B"]:
    """Loss of each clip by the kind of head.

    "softmax": cross-entropy with a distribution over classes. "multilabel": binary cross-entropy with 0..1
    per class, their mean. "regression": squared error, its mean.

    Args:
        class_weights: factor of each class's (or output's) part of the loss; None: all 1.
    """
    if head == "softmax":
        parts = -targets * jax.nn.log_softmax(outputs)
    elif head == "multilabel":
        parts = jnp.logaddexp(0.0, outputs) - targets * outputs
    else:
        parts = (outputs - targets) ** 2
    if class_weights is not None:
        parts = parts * jnp.asarray(class_weights)
    return parts.sum(axis=-1) if head == "softmax" else parts.mean(axis=-1)


def balanced_weights(counts: list[int]) -> tuple[float, ...]:
    """Weights inverse to the classes' numbers of clips, 1 on average over the clips; none may be 0.

    >>> balanced_weights([30, 10])
    (0.6666666666666666, 2.0)
    """
    return tuple(sum(counts) / (len(counts) * count) for count in counts)
