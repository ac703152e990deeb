"""Which tubelets the encoder does not see: tube (the method), random, and frame masking.

Counts are static, so every mask is a pair of sorted index arrays (visible, hidden); True means hidden
in the boolean form. Counts truncate the float64 product, as the published code: int(0.9 * 196) = 176.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from videomae_jax.models.tubelets import Grid

Indices = tuple[Int[Array, "B V"], Int[Array, "B M"]]


def counts(kind: str, grid: Grid, ratio: float) -> tuple[int, int]:
    """Returns how many tokens are (visible, hidden).

    Raises:
        ValueError: an unknown kind, or a ratio that hides nothing or everything.

    >>> counts("tube", (8, 14, 14), 0.9)
    (160, 1408)
    """
    t, h, w = grid
    whole = {"tube": (t, h * w), "random": (1, t * h * w), "frame": (h * w, t)}
    if kind not in whole:
        raise ValueError(f"unknown mask {kind!r}: use {', '.join(map(repr, whole))}")
    repeats, places = whole[kind]
    hidden = int(np.float64(ratio) * places)
    if not 0 < hidden < places:
        raise ValueError(
            f"mask ratio {ratio} hides {hidden} of {places} places of grid {tuple(grid)} ({kind}): "
            f"choose a ratio that leaves at least one visible and one hidden"
        )
    return repeats * (places - hidden), repeats * hidden


def indices(
    keys: Key[Array, "B"], kind: str, grid: Grid, ratio: float
) -> tuple[Int[Array, "B V"], Int[Array, "B M"]]:
    """Draws one mask per key: ascending raster indices of the visible and of the hidden tokens, int32.

    Args:
        keys: one key per example; each mask depends on its own key only.
        kind: "tube" hides the same places in every slice, "random" any tokens, "frame" whole slices.

    Raises:
        ValueError: see `counts`.
    """
    t, h, w = grid
    _, hidden = counts(kind, grid, ratio)
    if kind == "tube":
        places, hidden = h * w, hidden // t
    elif kind == "frame":
        places, hidden = t, hidden // (h * w)
    else:
        places = t * h * w
    # argsort and not top_k: top_k is not partitioned and would gather the batch on every device.
    noise: Float[Array, "B S"] = jax.vmap(lambda key: jax.random.uniform(key, (places,)))(keys)
    shuffled = jnp.argsort(noise, axis=-1).astype(jnp.int32)

    def tokens(chosen: Int[Array, "B K"]) -> Int[Array, "B L"]:
        chosen = jnp.sort(chosen, axis=-1)
        if kind == "tube":
            chosen = chosen[:, None, :] + (jnp.arange(t, dtype=jnp.int32) * h * w)[:, None]
        elif kind == "frame":
            chosen = chosen[:, :, None] * h * w + jnp.arange(h * w, dtype=jnp.int32)
        return chosen.reshape(len(keys), -1)

    return tokens(shuffled[:, hidden:]), tokens(shuffled[:, :hidden])


def to_mask(hidden: Int[Array, "B M"], tokens: int) -> Bool[Array, "B N"]:
    """The boolean form of hidden indices: True = hidden."""
    rows = jnp.arange(hidden.shape[0])[:, None]
    return jnp.zeros((hidden.shape[0], tokens), bool).at[rows, hidden].set(True)


def from_mask(mask: Bool[Array, "B N"]) -> Indices:
    """The index form of a boolean mask whose values are known (not traced).

    Raises:
        ValueError: a traced mask, a wrong dtype or rank, rows with unequal counts, or a row that hides
            nothing or everything.
    """
    if isinstance(mask, Tracer):
        raise ValueError(
            "the mask is traced, so its counts are unknown: close over a concrete mask, or call "
            "VideoMAE.predict(video, visible, hidden) with the indices of masking.indices"
        )
    rows = np.asarray(mask)
    if rows.dtype != np.bool_ or rows.ndim != 2:
        raise ValueError(f"mask is {rows.dtype}{list(rows.shape)}: expected bool [B, N], True = hidden")
    hidden = rows.sum(axis=1)
    if len(set(hidden.tolist())) != 1 or not 0 < hidden[0] < rows.shape[1]:
        raise ValueError(
            f"mask hides {hidden.tolist()} of {rows.shape[1]} tokens per row: every row must hide the "
            f"same number, at least one and not all"
        )
    order = np.argsort(rows, axis=1, kind="stable").astype(np.int32)
    visible = rows.shape[1] - int(hidden[0])
    return jnp.asarray(order[:, :visible]), jnp.asarray(order[:, visible:])


def _mask(key: Key[Array, ""], batch: int, kind: str, grid: Grid, ratio: float) -> Bool[Array, "B N"]:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    return to_mask(indices(keys, kind, grid, ratio)[1], math.prod(grid))


def tube_mask(key: Key[Array, ""], batch: int, grid: Grid, ratio: float) -> Bool[Array, "B N"]:
    """Tube masks, the method of VideoMAE: the same places hidden in all slices. True = hidden.

    Row i depends on (key, i) only. `grid` is (T', H', W').

    Raises:
        ValueError: a ratio that hides nothing or everything.
    """
    return _mask(key, batch, "tube", grid, ratio)


def random_mask(key: Key[Array, ""], batch: int, grid: Grid, ratio: float) -> Bool[Array, "B N"]:
    """Masks of any tokens of the clip; otherwise as `tube_mask`."""
    return _mask(key, batch, "random", grid, ratio)


def frame_mask(key: Key[Array, ""], batch: int, grid: Grid, ratio: float) -> Bool[Array, "B N"]:
    """Masks of whole temporal slices, `int(ratio * T')` of them; otherwise as `tube_mask`."""
    return _mask(key, batch, "frame", grid, ratio)
