"""Crops to clips on the device, as Pillow resizes them; in whole numbers, so bytes are the same anywhere."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int, Int32, UInt8

_ONE = 256  # shares are multiples of 1/256: exact in bfloat16, as bytes are, and so are float32 sums of both


def clips(batch: dict[str, Array], size: tuple[int, int]) -> UInt8[Array, "B T H W C"]:
    """The clips of a batch, whose `video` the loader has resized, or left to us with `crop`, int32 [B, 2]."""
    return resize(batch["video"], batch["crop"], size) if "crop" in batch else batch["video"]


class Taps(NamedTuple):
    """What each of N pixels of a line takes: the places of K given ones, and their shares in 1/256."""

    places: Int32[Array, "B N K"]
    shares: Int32[Array, "B N K"]


def resize(
    video: UInt8[Array, "B T S Z C"], crop: Int[Array, "B 2"], size: tuple[int, int]
) -> UInt8[Array, "B T H W C"]:
    """Resizes the upper left `crop` (height, width) of each frame to `size`: bilinear, with anti-aliasing.

    Differs from Pillow by one grey level at most, but for one pixel in a thousand of white noise. A TPU
    multiplies matrices, for it gathers slowly; others gather, which needs no space for what is between.
    """
    crop = crop.astype(jnp.int32)
    rows, columns = (taps(crop[:, i], size[i], video.shape[2 + i]) for i in (0, 1))
    return jax.lax.platform_dependent(video, rows, columns, tpu=multiplied, default=gathered)


def taps(crop: Int32[Array, " B"], size: int, given: int) -> Taps:
    """What each of `size` pixels takes of the first `crop` of `given`.

    A triangle around the pixel's centre, as wide as two pixels, of the larger kind; all in units of half a
    pixel of the crop divided by `size`. The largest share makes up for the rounding.
    """
    crop, reach = crop[:, None, None], jnp.maximum(crop, size)[:, None, None]
    centres = (2 * jnp.arange(size, dtype=jnp.int32)[:, None] + 1) * crop
    first = (centres - 2 * reach - size) // (2 * size) + 1
    places = first + jnp.arange(math.ceil(2 * max(given / size, 1)), dtype=jnp.int32)
    weights = jnp.maximum(2 * reach - jnp.abs((2 * places + 1) * size - centres), 0)
    weights = jnp.where((places >= 0) & (places < crop), weights, 0)
    total = weights.sum(axis=-1, keepdims=True)
    found = (2 * _ONE * weights + total) // (2 * total)
    is_largest = jnp.arange(found.shape[-1]) == found.argmax(axis=-1, keepdims=True)
    rest = _ONE - found.sum(axis=-1, keepdims=True)
    return Taps(jnp.clip(places, 0, crop - 1), found + jnp.where(is_largest, rest, 0))


def gathered(video: UInt8[Array, "B T S Z C"], rows: Taps, columns: Taps) -> UInt8[Array, "B T H W C"]:
    """Each pixel's sums of what it takes, first along columns, then along rows."""

    def one(clip: Array, axis: int, places: Array, shares: Array) -> Array:
        shape = [-1 if i == axis else 1 for i in range(clip.ndim)]
        total = jnp.int32(_ONE // 2)  # divided by _ONE below: rounds
        for k in range(places.shape[1]):
            taken = jnp.take(clip, places[:, k], axis=axis).astype(jnp.int32)
            total = total + taken * shares[:, k].reshape(shape)
        return (total // _ONE).astype(jnp.uint8)

    lines = jax.vmap(lambda clip, taken: one(clip, 1, *taken))(video, rows)
    return jax.vmap(lambda clip, taken: one(clip, 2, *taken))(lines, columns)


def multiplied(video: UInt8[Array, "B T S Z C"], rows: Taps, columns: Taps) -> UInt8[Array, "B T H W C"]:
    """The same sums as two products of matrices."""
    batch, frames, side, other, channels = video.shape
    exact = {"preferred_element_type": jnp.float32}
    lines = video.astype(jnp.bfloat16).reshape(batch, frames, side, other * channels)
    lines = jnp.einsum("bhs,btsx->bthx", _matrix(rows, side), lines, **exact)
    lines = jnp.floor(lines + 0.5).astype(jnp.bfloat16).reshape(batch, frames, -1, other, channels)
    found = jnp.einsum("bwz,bthzc->bthwc", _matrix(columns, other), lines, **exact)
    return jnp.floor(found + 0.5).astype(jnp.uint8)


def _matrix(taken: Taps, given: int) -> BFloat16[Array, "B N S"]:
    is_there = taken.places[..., None] == jnp.arange(given)
    return (jnp.where(is_there, taken.shares[..., None], 0).sum(axis=2) / _ONE).astype(jnp.bfloat16)
