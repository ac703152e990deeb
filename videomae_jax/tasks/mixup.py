"""Mixup and CutMix of a whole batch on the device, as published (arXiv 1710.09412, 1905.04899).

One draw for the batch: CutMix or mixup, and how much. Clip i is mixed with clip B - 1 - i, so the batch is
even, and so are the labels' distributions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from videomae_jax.models.layout import WHOLE, Layout


@dataclasses.dataclass(frozen=True)
class Mix:
    """How often and how much clips are mixed.

    Attributes:
        mixup, cutmix: parameter of the symmetric Beta distribution of the clip's own share; 0: never.
        probability: that a batch is mixed at all.
        switch: probability of CutMix where both are possible.
    """

    mixup: float
    cutmix: float
    probability: float
    switch: float

    @property
    def is_active(self) -> bool:
        """Whether any batch is ever mixed."""
        return self.probability > 0 and max(self.mixup, self.cutmix) > 0


class Draw(NamedTuple):
    """What a batch is mixed by: each clip's own share, and (top, bottom, left, right) of CutMix's box.

    `is_box` decides: CutMix, whose share follows from the box; else mixup.
    """

    share: Float[Array, ""]
    box: Int[Array, "4"]
    is_box: Bool[Array, ""]


def draw(mix: Mix, height: int, width: int, key: Key[Array, ""]) -> Draw:
    """Draws how one batch of frames of this size is mixed.

    CutMix: sides are int(side * sqrt(1 - share)), the centre is any pixel, the box is cut off at the frame's
    edge and the share becomes what it leaves.
    """
    mix_key, switch_key, box_key, mixup_key, cutmix_key = jax.random.split(key, 5)
    switch = 0.0 if mix.cutmix == 0 else 1.0 if mix.mixup == 0 else mix.switch
    is_box = jax.random.bernoulli(switch_key, switch)
    mixup, cutmix = (a or 1.0 for a in (mix.mixup, mix.cutmix))  # one that is off is drawn and not used
    kept = jax.random.beta(cutmix_key, cutmix, cutmix)
    box = cut_box(kept, jax.random.randint(box_key, (2,), 0, jnp.array([height, width])), height, width)
    share = jnp.where(
        is_box,
        1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width),
        jax.random.beta(mixup_key, mixup, mixup),
    )
    is_mixed = jax.random.bernoulli(mix_key, mix.probability)
    return Draw(jnp.where(is_mixed, share, 1.0), box, is_box & is_mixed)


def cut_box(share: Float[Array, ""], centre: Int[Array, "2"], height: int, width: int) -> Int[Array, "4"]:
    """(top, bottom, left, right) of the box around `centre` that CutMix replaces to leave `share`."""
    edges = []
    for place, side in zip(centre, (height, width), strict=True):
        half = (side * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        edges += [jnp.clip(place - half, 0, side), jnp.clip(place + half, 0, side)]
    return jnp.stack(edges)


def mix_clips(
    pixels: Float[Array, "B T H W C"],
    targets: Float[Array, "B K"],
    weight: Float[Array, " B"],
    chosen: Draw,
    layout: Layout = WHOLE,
) -> tuple[Float[Array, "B T H W C"], Float[Array, "B K"]]:
    """Mixes each clip and its target with its partner's, wherever that is; the global batch is even.

    A clip whose partner has weight 0 (it could not be decoded) stays as it is: nothing is mixed with zeros.
    """
    has_partner = layout.mirrored(weight) > 0
    share = jnp.where(has_partner, chosen.share, 1.0)
    top, bottom, left, right = chosen.box
    rows, columns = jnp.arange(pixels.shape[2]), jnp.arange(pixels.shape[3])
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    # What of each pixel is the clip's own: nothing or all of it in CutMix.
    own = jnp.where(chosen.is_box, 1.0 - inside, chosen.share)
    own = jnp.where(has_partner[:, None, None], own, 1.0)[:, None, :, :, None].astype(pixels.dtype)
    mixed = own * pixels + (1 - own) * layout.mirrored(pixels)
    return mixed, share[:, None] * targets + (1 - share)[:, None] * layout.mirrored(targets)
