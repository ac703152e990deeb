"""Colours and blur of contrastive views, the same for all frames of a clip; on the device.

As BYOL's views of images (arXiv 2006.07733), with the operations in a fixed order and a clip's own mean for
its contrast: each frame's mean would make a clip flicker.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Clip = Float[Array, "T H W 3"]

_LUMA = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class View:
    """How likely a view is changed; strengths are BYOL's.

    Attributes:
        jitter, grey, blur, solarise: probabilities.
    """

    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 1.0
    solarise: float = 0.0


FIRST = View(blur=1.0, solarise=0.0)
SECOND = View(blur=0.1, solarise=0.2)


def augment(clip: Clip, view: View, key: Key[Array, ""]) -> Clip:
    """Changes a clip of pixels in 0..1: jitter, grey, blur, solarise, each with its probability."""
    jitter_key, blur_key, choice_key = jax.random.split(key, 3)
    jitter, grey, blur, solarise = jax.random.uniform(choice_key, (4,))
    clip = jnp.where(jitter < view.jitter, _jitter(clip, jitter_key), clip)
    clip = jnp.where(grey < view.grey, jnp.broadcast_to(_grey(clip), clip.shape), clip)
    sigma = jax.random.uniform(blur_key, minval=0.1, maxval=2.0)
    clip = jnp.where(blur < view.blur, gaussian_blur(clip, sigma), clip)
    return jnp.where(solarise < view.solarise, jnp.where(clip < 0.5, clip, 1 - clip), clip)


def _grey(clip: Clip) -> Float[Array, "T H W 1"]:
    return (clip @ jnp.array(_LUMA))[..., None]


def _jitter(clip: Clip, key: Key[Array, ""]) -> Clip:
    """Brightness and contrast times 0.6..1.4, saturation times 0.8..1.2, hue by a tenth of the circle."""
    drawn = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
    brightness, contrast, saturation = 1 + jnp.array([0.4, 0.4, 0.2]) * drawn[:3]
    clip = jnp.clip(brightness * clip, 0, 1)
    mean = _grey(clip).mean()
    clip = jnp.clip(contrast * clip + (1 - contrast) * mean, 0, 1)
    clip = jnp.clip(saturation * clip + (1 - saturation) * _grey(clip), 0, 1)
    return shift_hue(clip, 0.1 * drawn[3])


def shift_hue(clip: Clip, shift: Float[Array, ""]) -> Clip:
    """Turns the hue of HSV by a share of the circle."""
    hue, chroma, value = _hue(clip)
    return _colours(hue + shift, chroma, value)


def shift_hsv(clip: Clip, shift: Float[Array, "3"]) -> Clip:
    """Turns the hue by a share of the circle and adds to saturation and value, which stay in 0..1."""
    hue, chroma, value = _hue(clip)
    saturation = jnp.clip(chroma / jnp.where(value > 0, value, 1.0) + shift[1], 0, 1)
    value = jnp.clip(value + shift[2], 0, 1)
    return _colours(hue + shift[0], saturation * value, value)


def _hue(clip: Clip) -> tuple[Float[Array, "T H W"], Float[Array, "T H W"], Float[Array, "T H W"]]:
    """Hue in circles, chroma and value."""
    red, green, blue = jnp.moveaxis(clip, -1, 0)
    value, low = clip.max(axis=-1), clip.min(axis=-1)
    chroma = value - low
    scale = 1 / jnp.where(chroma > 0, chroma, 1.0)
    of_red, of_green, of_blue = (green - blue) * scale, 2 + (blue - red) * scale, 4 + (red - green) * scale
    hue = jnp.where(value == red, of_red, jnp.where(value == green, of_green, of_blue)) / 6
    return hue, chroma, value


def _colours(hue: Float[Array, "T H W"], chroma: Float[Array, "T H W"], value: Float[Array, "T H W"]) -> Clip:
    # A channel is the value, less the chroma as far as the hue is from the channel's own.
    sector = (6 * hue[..., None] + jnp.array([5.0, 3.0, 1.0])) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(sector, 4 - sector), 0, 1)


def gaussian_blur(clip: Clip, sigma: Float[Array, ""]) -> Clip:
    """Blurs every frame; as products with banded matrices, whose rows have sum 1 at the edges too."""

    def matrix(size: int) -> Float[Array, "S S"]:
        distance = jnp.arange(size)[:, None] - jnp.arange(size)
        weights = jnp.exp(-0.5 * (distance / sigma) ** 2)
        return weights / weights.sum(axis=1, keepdims=True)

    _, height, width, _ = clip.shape
    return jnp.einsum("ij,tjwc,kw->tikc", matrix(height), clip, matrix(width))
