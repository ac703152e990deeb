"""What people do, box by box: a video ViT whose tokens are pooled in boxes (finetuning on AVA)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from videomae_jax.models import layers, roi, tubelets, vit
from videomae_jax.models.layout import WHOLE, Layout

PUBLISHED_MEAN = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
PUBLISHED_STD = (57.375 / 255,) * 3
"""Of pixels, as the published detectors were trained; their backbones were with ImageNet's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig(vit.BackboneConfig):
    """Everything that fixes an ActionDetector: the backbone's fields, and what becomes of its tokens.

    Attributes:
        classes: name of each action, in order.
        bins: parts of a box along each axis.
        aligned: whether pixel centres are half a pixel in, see `roi.roi_align`; the published one is not.
        head_scale: factor of the head's initial weights.
    """

    classes: tuple[str, ...]
    bins: int = 7
    aligned: bool = False
    head_scale: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        if not self.classes:
            raise ValueError("a detector needs at least one class")
        if self.bins < 1:
            raise ValueError(f"bins {self.bins} must be at least 1")


class ActionDetector(nnx.Module):
    """Logits of actions for boxes: mean of tokens over time, RoIAlign, maximum over its bins, linear head."""

    def __init__(self, config: DetectorConfig, *, rngs: nnx.Rngs):
        width = config.encoder.width
        self.config = config
        self.encoder = vit.Trunk(config, rngs, layers.NORMAL)
        # Of every token, not of their mean as in a classifier.
        self.norm = layers.LayerNorm(width, config.final_norm_epsilon or config.norm_epsilon, "float32")
        self.head = layers.Linear(width, len(config.classes), "float32", rngs, layers.NORMAL)
        self.head.kernel[...] = self.head.kernel[...] * config.head_scale

    def feature_map(
        self,
        pixels: Float[Array, "B T H W C"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
        frozen: int = 0,
    ) -> Float[Array, "B h w D"]:
        """Normalised tokens of normalised clips of any size in whole tubelets, their mean over time, float32.

        Args:
            keys: one per clip make drop path active.
            frozen: no gradient for the embedding and this many blocks; 0 freezes nothing.
        """
        b, t, h, w, _ = pixels.shape
        grid = tubelets.grid_of((t, h, w), self.config.tubelet)
        return self._tokens(pixels, keys, layout, frozen).reshape(b, *grid, -1).mean(axis=1)

    def features(
        self, feature_map: Float[Array, "B h w D"], boxes: Float[Array, "B R 4"]
    ) -> Float[Array, "B R D"]:
        """What the head sees of each box.

        Args:
            boxes: left, top, right, bottom in pixels of the clip, the last pixel included (AVA's published
                code); aligned pooling takes the edge behind it.
        """
        c = self.config
        edges = boxes + jnp.array([0.0, 0.0, 1.0, 1.0]) if c.aligned else boxes
        samples = roi.samples_of((feature_map.shape[1], feature_map.shape[2]), c.bins)
        pooled = roi.roi_align(feature_map, edges / c.tubelet[1], c.bins, c.aligned, samples)
        return pooled.max(axis=(2, 3))

    def tokens(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B N D"]:
        """Every token after the norm, float32; for use inside `jax.jit`."""
        tubelets.check_video(video, self.config.channels)
        return self._tokens(self.normalized(video))

    def raw_features(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """Mean of all tokens, float32; for use inside `jax.jit`."""
        return self.tokens(video).mean(axis=1)

    def normalized(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        """Raw 0..255 pixels as the model takes them."""
        return tubelets.normalize_pixels(video, self.config.pixel_mean, self.config.pixel_std)

    def _tokens(
        self,
        pixels: Float[Array, "B T H W C"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
        frozen: int = 0,
    ) -> Float[Array, "B N D"]:
        return self.norm(self.encoder(*self.encoder.cut(pixels), keys, layout, frozen).astype(jnp.float32))

    def logits(
        self, pixels: Float[Array, "B T H W C"], boxes: Float[Array, "B R 4"]
    ) -> Float[Array, "B R K"]:
        """Of each action for each box, for use inside `jax.jit`; see `features`."""
        return self.head(self.features(self.feature_map(pixels), boxes))
