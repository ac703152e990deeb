"""A clip as tubelets: cutting, joining, pixel normalisation and the reconstruction target.

Order is fixed everywhere: token `n = (t * H' + h) * W' + w`, voxel `((dt * p + dy) * p + dx) * C + c`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num, UInt8

LOSSES = ("mse", "l1", "smooth_l1")

Grid = tuple[int, int, int]
"""Tubelets per axis of a clip (T', H', W'); also the voxels per axis of one tubelet (t, p, p)."""


def grid_of(clip_size: Grid, tubelet: Grid) -> Grid:
    """Returns the tubelet grid (T', H', W') of a clip of `clip_size` (T, H, W).

    Raises:
        ValueError: the tubelet does not divide the clip.

    >>> grid_of((16, 224, 224), (2, 16, 16))
    (8, 14, 14)
    """
    if any(size <= 0 or size % step for size, step in zip(clip_size, tubelet, strict=True)):
        raise ValueError(
            f"a clip of (T, H, W) = {tuple(clip_size)} cannot be cut into tubelets of "
            f"{tuple(tubelet)}: make every axis a positive multiple of the tubelet's"
        )
    t, h, w = (size // step for size, step in zip(clip_size, tubelet, strict=True))
    return t, h, w


def patchify(video: Num[Array, "B T H W C"], tubelet: Grid) -> Num[Array, "B N P"]:
    """Cuts clips into flat tubelets, in raster order (t, h, w); any dtype.

    Raises:
        ValueError: the tubelet does not divide the clip.
    """
    b, *clip_size, c = video.shape
    t, h, w = grid_of((clip_size[0], clip_size[1], clip_size[2]), tubelet)
    dt, dy, dx = tubelet
    x = video.reshape(b, t, dt, h, dy, w, dx, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, t * h * w, dt * dy * dx * c)


def unpatchify(tubelets: Num[Array, "B N P"], grid: Grid, tubelet: Grid) -> Num[Array, "B T H W C"]:
    """The inverse of `patchify`.

    Raises:
        ValueError: N is not the grid's size, or P is not a multiple of the tubelet's.
    """
    (t, h, w), (dt, dy, dx) = grid, tubelet
    b, n, p = tubelets.shape
    if n != t * h * w or p % (dt * dy * dx):
        raise ValueError(f"tubelets {tubelets.shape} do not fill grid {grid} with voxels {tubelet}")
    c = p // (dt * dy * dx)
    x = tubelets.reshape(b, t, h, w, dt, dy, dx, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, t * dt, h * dy, w * dx, c)


def take(tokens: Num[Array, "B N P"], indices: Num[Array, "B K"]) -> Num[Array, "B K P"]:
    """Gathers the tokens at `indices`, example by example; the batch stays where it is sharded."""
    return jnp.take_along_axis(tokens, indices[..., None], axis=1)


def normalize_pixels(
    pixels: Num[Array, "*S P"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "*S P"]:
    """Raw 0..255 voxels (of tubelets or clips), channel fastest, to `(x / 255 - mean) / std` in float32."""
    voxels = pixels.shape[-1] // len(mean)
    x = pixels.astype(jnp.float32) / 255
    return (x - jnp.tile(jnp.array(mean), voxels)) / jnp.tile(jnp.array(std), voxels)


def erase(
    pixels: Float[Array, "B T H W C"], boxes: Int[Array, "B 4"], keys: Key[Array, " B"]
) -> Float[Array, "B T H W C"]:
    """Random erasing of normalised pixels: each clip's box, the same in all frames, becomes normal noise.

    Args:
        boxes: (top, left, height, width) in pixels; height or width 0 erases nothing.
        keys: one per clip.
    """
    _, _, height, width, _ = pixels.shape
    top, left, tall, wide = (boxes[:, i, None] for i in range(4))
    rows = (jnp.arange(height) >= top) & (jnp.arange(height) < top + tall)
    columns = (jnp.arange(width) >= left) & (jnp.arange(width) < left + wide)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None, :, :, None]
    noise = jax.vmap(lambda key: jax.random.normal(key, pixels.shape[1:], pixels.dtype))(keys)
    return jnp.where(inside, noise, pixels)


def statistics(
    pixels: Float[Array, "B K P"], channels: int
) -> tuple[Float[Array, "B K P"], Float[Array, "B K P"]]:
    """Mean and divisor of each tubelet and channel, repeated over its voxels.

    The divisor is `sqrt(var) + 1e-6` with the unbiased variance: VideoMAE normalises each channel by
    itself and adds epsilon outside the root, unlike the image MAE.
    """
    x = pixels.reshape(*pixels.shape[:-1], -1, channels)
    mean = x.mean(axis=-2, keepdims=True)
    std = jnp.sqrt(jnp.sum((x - mean) ** 2, axis=-2, keepdims=True) / (x.shape[-2] - 1)) + 1e-6
    return (
        jnp.broadcast_to(mean, x.shape).reshape(pixels.shape),
        jnp.broadcast_to(std, x.shape).reshape(pixels.shape),
    )


def reconstruction_target(
    tubelets: Num[Array, "B K P"], channels: int, normalize: bool
) -> Float[Array, "B K P"]:
    """What the decoder should predict for raw 0..255 tubelets, float32.

    Pixels scaled to 0..1; with `normalize`, each tubelet and channel to zero mean and unit (unbiased)
    variance, as the published code does. An all-constant tubelet becomes zeros.
    """
    pixels = tubelets.astype(jnp.float32) / 255
    if not normalize:
        return pixels
    mean, std = statistics(pixels, channels)
    return (pixels - mean) / std


def reconstruction_targets(
    video: UInt8[Array, "B T H W C"], indices: Int[Array, "B K"], tubelet: Grid, normalize: bool
) -> Float[Array, "B K P"]:
    """`reconstruction_target` of the tubelets at `indices`, with statistics of whole frames but on TPUs.

    Sums over rows of pixels as they lie in memory, of every tubelet, take a GPU a tenth of the time of sums
    over gathered tubelets. They are integers, so one pass is exact: `sum (x - m)^2` of any integer m. A TPU
    would write those integers to memory (docs/performance.md).

    Raises:
        ValueError: a tubelet of more than 16,512 pixels, whose sums int32 may not hold.
    """
    raw = take(patchify(video, tubelet), indices)
    if not normalize:
        return raw.astype(jnp.float32) / 255
    b, *clip_size, c = video.shape
    t, h, w = grid_of((clip_size[0], clip_size[1], clip_size[2]), tubelet)
    count = math.prod(tubelet)
    if count > 16512:
        raise ValueError(f"tubelets of {tubelet} have {count} pixels: at most 16,512 can be normalised")

    def of_frames(raw: UInt8[Array, "B K P"], video: UInt8[Array, "B T H W C"]) -> Float[Array, "B K P"]:
        rows = video.astype(jnp.int32).reshape(b, t, tubelet[0], h, tubelet[1], -1)

        def per_tubelet(x: Int[Array, "B T dt H dy WC"]) -> Int[Array, "B K C"]:
            x = x.sum((2, 4)).reshape(b, t, h, w, tubelet[2], c).sum(4)
            return take(x.reshape(b, t * h * w, c), indices)

        sums, squares = per_tubelet(rows), per_tubelet(rows**2)
        near = sums // count
        rest = (sums - near * count).astype(jnp.float32)
        squared = (squares - 2 * near * sums + count * near**2).astype(jnp.float32)
        variance = (squared - rest**2 / count) / (count - 1)
        mean, divisor = near + rest / count, jnp.sqrt(variance) + 255e-6
        voxels = raw.astype(jnp.float32).reshape(*raw.shape[:-1], -1, c)
        return ((voxels - mean[:, :, None]) / divisor[:, :, None]).reshape(raw.shape)

    def of_tubelets(raw: UInt8[Array, "B K P"], video: UInt8[Array, "B T H W C"]) -> Float[Array, "B K P"]:
        return reconstruction_target(raw, video.shape[-1], normalize=True)

    return jax.lax.platform_dependent(raw, video, tpu=of_tubelets, default=of_frames)


def reconstruction_error(
    prediction: Float[Array, "B M P"], target: Float[Array, "B M P"], kind: str
) -> Float[Array, "B M"]:
    """Mean error of each tubelet over its voxels, float32.

    Args:
        kind: "mse" (published), "l1", or "smooth_l1" (beta 1), the ablations of the paper's table.

    Raises:
        ValueError: an unknown kind.
    """
    difference = prediction.astype(jnp.float32) - target
    if kind == "mse":
        error = difference**2
    elif kind == "l1":
        error = jnp.abs(difference)
    elif kind == "smooth_l1":
        size = jnp.abs(difference)
        error = jnp.where(size < 1, 0.5 * difference**2, size - 0.5)
    else:
        raise ValueError(f"unknown loss {kind!r}: use one of {LOSSES}")
    return error.mean(axis=2)


def check_video(video: Any, channels: int) -> None:
    """Raises ValueError unless `video` is an array, uint8 [B, T, H, W, channels]."""
    if not isinstance(video, jax.Array | np.ndarray):
        raise ValueError(f"video is a {type(video).__name__}: pass an array of uint8 pixels")
    if video.ndim != 5 or video.shape[-1] != channels:
        raise ValueError(
            f"video has shape {tuple(video.shape)}: expected [B, T, H, W, {channels}], channels last"
        )
    if video.dtype != jnp.uint8:
        raise ValueError(
            f"video has dtype {video.dtype}: pass raw 0..255 pixels as uint8, the model normalises them"
        )
