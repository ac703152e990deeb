"""Contrastive heads: MLPs with batch norm over the global batch, and the loss between two views (MoCo v3)."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from videomae_jax.models.layout import Layout

_EPSILON = 1e-5  # of the batch norm


def init_mlp(key: Key[Array, ""], widths: tuple[int, ...]) -> dict:
    """Layers without bias, uniform up to the inputs' number to the power of -1/2; hidden ones are followed by
    batch norm with scale and bias.

    As published: the heads keep their framework's default, where the encoder's layers are Xavier's.

    Args:
        widths: of the input, of the hidden layers, and of the output.
    """
    params = {}
    keys = jax.random.split(key, len(widths) - 1)
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        bound = inputs**-0.5
        kernel = jax.random.uniform(keys[number], (inputs, outputs), minval=-bound, maxval=bound)
        params[f"layer{number}"] = {"kernel": kernel}
        if number < len(widths) - 2:
            params[f"norm{number}"] = {"scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)}
    return params


def apply_mlp(
    params: dict, x: Float[Array, "b D"], weight: Float[Array, " b"], dtype: str, layout: Layout
) -> Float[Array, "b E"]:
    """Layer, batch norm and ReLU for the hidden layers; the last is followed by a batch norm alone.

    Matmuls in `dtype`, the rest in float32.

    Args:
        weight: 0 for rows that the statistics leave out.
    """
    last = sum(name.startswith("layer") for name in params) - 1
    for number in range(last + 1):
        kernel = params[f"layer{number}"]["kernel"].astype(dtype)
        x = batch_norm((x.astype(dtype) @ kernel).astype(jnp.float32), weight, layout)
        if number < last:
            norm = params[f"norm{number}"]
            x = jax.nn.relu(x * norm["scale"] + norm["bias"])
    return x


def batch_norm(x: Float[Array, "b D"], weight: Float[Array, " b"], layout: Layout) -> Float[Array, "b D"]:
    """Zero mean and unit variance of each feature over the rows of weight 1 of all devices."""
    weight = weight[:, None]
    count = jnp.maximum(layout.sum_over_rows(weight.sum()), 1.0)
    mean = layout.sum_over_rows((weight * x).sum(axis=0)) / count
    variance = layout.sum_over_rows((weight * (x - mean) ** 2).sum(axis=0)) / count
    return (x - mean) * jax.lax.rsqrt(variance + _EPSILON)


def normalized(x: Float[Array, "b D"]) -> Float[Array, "b D"]:
    """Rows of length 1."""
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(axis=1, keepdims=True), 1e-24))


def info_nce(
    queries: Float[Array, "b D"],
    keys: Float[Array, "b D"],
    weight: Float[Array, " b"],
    temperature: float,
    layout: Layout,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """(2 T times the cross-entropy of each query, whether its own key is the nearest).

    The classes are the keys of the whole batch; those of weight 0 are nobody's negatives.

    Args:
        queries, keys: rows of length 1, of the same videos; no gradient reaches the keys.
    """
    everyone = layout.all_rows(jax.lax.stop_gradient(keys))
    present = layout.all_rows(weight) > 0
    logits = queries @ everyone.T / temperature
    own = layout.first_row(len(queries)) + jnp.arange(len(queries))
    is_own = own[:, None] == jnp.arange(len(everyone))
    logits = jnp.where(present | is_own, logits, -jnp.inf)
    positive = jnp.where(is_own, logits, 0.0).sum(axis=1)
    losses = 2 * temperature * (jax.nn.logsumexp(logits, axis=1) - positive)
    return losses, (positive >= logits.max(axis=1)).astype(jnp.float32)
