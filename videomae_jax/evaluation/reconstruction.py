"""How good a reconstruction is: predictors to compare with, statistics to show with, PSNR over hidden voxels.

A model trained on normalised targets does not predict the mean and contrast of a tubelet. To see pixels,
they must come from somewhere, and a picture says where: its statistics mode.

* "true": from the hidden tubelet itself, as the published pictures do; even zeros then show the right
  low-resolution picture.
* "visible": from the visible tubelets, each as near as possible; nothing hidden is used.
* "raw": the prediction as it is; pixels for a model trained on pixels, else normalised values drawn as
  0.5 + value / 6.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from videomae_jax.models import tubelets
from videomae_jax.models.tubelets import Grid

STATISTICS = ("true", "visible", "raw")


def nearest_visible(visible: Int[Array, "B V"], hidden: Int[Array, "B M"], grid: Grid) -> Int[Array, "B M"]:
    """For each hidden token the place (0..V-1) of the visible token nearest to it on the grid.

    Distance is Euclidean in tubelets, time included; of equally near ones the first in raster order.
    """

    def coordinates(token: Int[Array, "B K"]) -> Float[Array, "B K 3"]:
        return jnp.stack(jnp.unravel_index(token, grid), axis=-1).astype(jnp.float32)

    a, b = coordinates(hidden), coordinates(visible)
    dots = jnp.einsum("bmk,bvk->bmv", a, b)
    return jnp.argmin((a**2).sum(-1)[:, :, None] + (b**2).sum(-1)[:, None, :] - 2 * dots, axis=-1)


def trivial_predictions(
    raw_visible: Num[Array, "B V P"],
    nearest: Int[Array, "B M"],
    channels: int,
    normalize_target: bool,
) -> dict[str, Float[Array, "B M P"]]:
    """What needs no learning, in the space of the target: {"mean", "nearest_visible"}.

    The mean is zeros for a normalised target and the clip's visible mean colour for pixels; the other is
    a copy of the nearest visible tubelet's target.
    """
    target = tubelets.reconstruction_target(raw_visible, channels, normalize_target)
    near = tubelets.take(target, nearest)
    if normalize_target:
        mean = jnp.zeros_like(near)
    else:
        colour = target.reshape(target.shape[0], -1, channels).mean(axis=1)
        mean = jnp.broadcast_to(jnp.tile(colour, near.shape[-1] // channels)[:, None], near.shape)
    return {"mean": mean, "nearest_visible": near}


def to_pixels(
    values: Float[Array, "B M P"],
    raw_hidden: Num[Array, "B M P"],
    raw_visible: Num[Array, "B V P"],
    nearest: Int[Array, "B M"],
    channels: int,
    normalize_target: bool,
    statistics: str,
) -> Float[Array, "B M P"]:
    """Values in the space of the target as pixels in 0..1 (not clipped), in a statistics mode.

    Args:
        raw_hidden: true 0..255 voxels of the hidden tubelets; only "true" looks at them.
        nearest: see `nearest_visible`.

    Raises:
        ValueError: an unknown mode, or one that makes no sense for a model trained on pixels.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"unknown statistics {statistics!r}: use {', '.join(STATISTICS)}")
    if not normalize_target:
        if statistics != "raw":
            raise ValueError(
                f"statistics={statistics} is for models trained on normalised tubelets; this one predicts "
                f"pixels: use statistics=raw"
            )
        return values
    if statistics == "raw":
        return 0.5 + values / 6
    if statistics == "true":
        mean, std = tubelets.statistics(raw_hidden.astype(jnp.float32) / 255, channels)
    else:
        mean, std = tubelets.statistics(raw_visible.astype(jnp.float32) / 255, channels)
        mean, std = tubelets.take(mean, nearest), tubelets.take(std, nearest)
    return values * std + mean


def squared_errors(prediction: Float[Array, "B M P"], target: Float[Array, "B M P"]) -> Float[Array, "B"]:
    """Mean squared error of each clip between pixels clipped to 0..1; `psnr` of their mean is in dB."""
    return jnp.mean((jnp.clip(prediction, 0, 1) - jnp.clip(target, 0, 1)) ** 2, axis=(1, 2))


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of pixels in 0..1.

    >>> round(psnr(0.01), 3)
    20.0
    """
    return float(-10 * jnp.log10(max(mean_squared_error, 1e-12)))
