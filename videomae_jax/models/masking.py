"""Which tubelets the encoder does not see: tube (the method), random, and frame masking; and which of them
the decoder predicts: all, or those of the running cell (VideoMAE V2).

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
    whole = {"tube": (t, h * w), "multi_block": (t, h * w), "random": (1, t * h * w), "frame": (h * w, t)}
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
        kind: "tube" hides the same places in every slice, "random" any tokens, "frame" whole slices;
            "multi_block" blocks of places in every slice, see `_blocks`.

    Raises:
        ValueError: see `counts`.
    """
    t, h, w = grid
    _, hidden = counts(kind, grid, ratio)
    if kind in ("tube", "multi_block"):
        places, hidden = h * w, hidden // t
    elif kind == "frame":
        places, hidden = t, hidden // (h * w)
    else:
        places = t * h * w
    # argsort and not top_k: top_k is not partitioned and would gather the batch on every device.
    noise: Float[Array, "B S"] = jax.vmap(lambda key: jax.random.uniform(key, (places,)))(keys)
    if kind == "multi_block":
        noise = noise - jax.vmap(lambda key: _blocks(jax.random.fold_in(key, 1), h, w))(keys)
    shuffled = jnp.argsort(noise, axis=-1).astype(jnp.int32)

    def tokens(chosen: Int[Array, "B K"]) -> Int[Array, "B L"]:
        chosen = jnp.sort(chosen, axis=-1)
        if kind in ("tube", "multi_block"):
            chosen = chosen[:, None, :] + (jnp.arange(t, dtype=jnp.int32) * h * w)[:, None]
        elif kind == "frame":
            chosen = chosen[:, :, None] * h * w + jnp.arange(h * w, dtype=jnp.int32)
        return chosen.reshape(len(keys), -1)

    return tokens(shuffled[:, hidden:]), tokens(shuffled[:, :hidden])


_SHORT, _LONG = (8, 0.15), (2, 0.7)  # blocks, and the share of the places that each covers


def _blocks(key: Key[Array, ""], height: int, width: int) -> Float[Array, " S"]:
    """1 for places of a slice that blocks hide, 0 for others; many small blocks or two large ones, by a coin.

    The masks of V-JEPA (arXiv 2404.08471) but for their count. There a batch is cut to its smallest number of
    visible places, in raster order, so early ones; and both kinds are computed for every clip. Here the
    number is fixed, and a random choice of the hidden or visible places makes up the difference.
    """
    coin_key, size_key, *block_keys = jax.random.split(key, 2 + _SHORT[0] + _LONG[0])
    is_long = jax.random.bernoulli(coin_key)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    # Blocks of a mask have one size.
    ratio = jax.random.uniform(size_key, minval=0.75, maxval=1.5)
    area = jnp.where(is_long, _LONG[1], _SHORT[1]) * height * width
    tall = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, height)
    wide = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, width)
    hidden = jnp.zeros((height, width), bool)
    for number, block_key in enumerate(block_keys):
        belongs = is_long == (number >= _SHORT[0])
        top, left = jax.random.uniform(block_key, (2,))
        top, left = jnp.floor(top * (height - tall + 1)), jnp.floor(left * (width - wide + 1))
        inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
        hidden |= inside & belongs
    return hidden.reshape(-1).astype(jnp.float32)


DECODER_KINDS = ("none", "running_cell")


def running_cell_count(grid: Grid, ratio: float) -> int:
    """How many tokens the running cell keeps for the decoder; `ratio` of each 2 x 2 cell is dropped.

    Raises:
        ValueError: an odd grid, or a ratio that is no quarter.

    >>> running_cell_count((8, 14, 14), 0.5)
    784
    """
    t, h, w = grid
    if h % 2 or w % 2:
        raise ValueError(f"the running cell needs an even grid, not {h} x {w}: choose another clip size")
    if 4 * ratio not in (1, 2, 3):
        raise ValueError(f"the running cell drops a quarter, a half or three quarters, not {ratio}: use 0.5")
    return t * h * w // 4 * (4 - int(4 * ratio))


def running_cell(keys: Key[Array, "B"], grid: Grid, ratio: float) -> Int[Array, "B K"]:
    """The tokens that the decoder works on: ascending raster indices, int32 (VideoMAE V2, arXiv 2303.16727).

    In each slice every 2 x 2 cell drops the same places, which move on by one from slice to slice; where
    they begin is drawn for each example. As in the published code.

    Raises:
        ValueError: see `running_cell_count`.
    """
    kept = running_cell_count(grid, ratio)
    t, h, w = grid
    queue = np.arange(4) < int(4 * ratio)  # dropped
    slices, rows, columns = np.ogrid[:t, :h, :w]
    place = 2 * (rows % 2) + columns % 2 + slices + 1
    phases = np.stack([np.flatnonzero(~queue[(place + phase) % 4]) for phase in range(4)])
    assert phases.shape == (4, kept)
    drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, 4))(keys)
    return jnp.asarray(phases, jnp.int32)[drawn]


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
