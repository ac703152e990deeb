"""Models with an answer per clip: the finetuned classifier, and the attentive probe on frozen tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from videomae_jax.models import attention, functional, layers, tubelets, vit
from videomae_jax.models.layout import WHOLE, Layout

POOLING = ("mean", "first")
HEADS = ("softmax", "multilabel", "regression")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(vit.BackboneConfig):
    """Everything that fixes a VideoClassifier: the backbone's fields, and what its outputs mean.

    Attributes:
        classes: name of each output, in order.
        head: "softmax" (one class a clip), "multilabel" (any number, sigmoid) or "regression".
        pooling: "mean" of all tokens, then LayerNorm (published), or "first": LayerNorm of token 0.
        head_dropout: of the pooled features, in training.
        head_scale: factor of the head's initial weights.
    """

    classes: tuple[str, ...]
    head: str = "softmax"
    pooling: str = "mean"
    head_dropout: float = 0.0
    head_scale: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        for name, value, known in (("head", self.head, HEADS), ("pooling", self.pooling, POOLING)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use {', '.join(known)}")
        if not self.classes:
            raise ValueError("a classifier needs at least one class")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout {self.head_dropout} must be at least 0 and below 1")


class VideoClassifier(nnx.Module):
    """A video ViT with a linear head on its pooled tokens (finetuning of arXiv 2203.12602).

    `clf(video)` and `clf.features(video)` compile themselves; inside a larger jitted function use
    `pooled` and `head` with normalised pixels.
    """

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        width = config.encoder.width
        self.config = config
        self.encoder = vit.Trunk(config, rngs, layers.NORMAL)
        # The published fc_norm, or with pooling "first" the trunk's final norm; small enough for float32.
        epsilon = config.final_norm_epsilon or config.norm_epsilon
        self.norm = layers.LayerNorm(width, epsilon, "float32")
        self.head = layers.Linear(width, len(config.classes), "float32", rngs, layers.NORMAL)
        self.head.kernel[...] = self.head.kernel[...] * config.head_scale

    def pooled(
        self,
        pixels: Float[Array, "B T H W C"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
        frozen: int = 0,
    ) -> Float[Array, "B D"]:
        """Features of normalised clips, after the norm, float32.

        Args:
            keys: one per clip make drop path active.
            frozen: no gradient for the embedding and this many blocks; 0 freezes nothing.
        """
        return self._pool(self._encode(pixels, keys, layout, frozen))

    def pooled_and_layers(
        self,
        pixels: Float[Array, "B T H W C"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
        frozen: int = 0,
    ) -> tuple[Float[Array, "B D"], Float[Array, "L B D"]]:
        """As `pooled`, and the mean token that leaves each block, float32."""
        tokens, layers = self.encoder.with_layers(*self.encoder.cut(pixels), keys, layout, frozen)
        return self._pool(tokens.astype(jnp.float32)), layers.astype(jnp.float32)

    def _pool(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        # Of the first token alone the norm is the same as of all tokens before taking it.
        return self.norm(tokens.mean(axis=1) if self.config.pooling == "mean" else tokens[:, 0])

    def _encode(
        self,
        pixels: Float[Array, "B T H W C"],
        keys: Key[Array, " B"] | None = None,
        layout: Layout = WHOLE,
        frozen: int = 0,
    ) -> Float[Array, "B N D"]:
        return self.encoder(*self.encoder.cut(pixels), keys, layout, frozen).astype(jnp.float32)

    def tokens(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B N D"]:
        """Every token after the norm, float32; for use inside `jax.jit`."""
        c = self.config
        return self.norm(self._encode(tubelets.normalize_pixels(video, c.pixel_mean, c.pixel_std)))

    def logits(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B K"]:
        """As `__call__`, for use inside `jax.jit`."""
        return self.head(self.raw_features(video))

    def raw_features(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """As `features`, for use inside `jax.jit`."""
        tubelets.check_video(video, self.config.channels)
        c = self.config
        return self.pooled(tubelets.normalize_pixels(video, c.pixel_mean, c.pixel_std))

    def __call__(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B K"]:
        """The head's outputs, float32: logits of `config.classes`, or predicted values (regression).

        Args:
            video: raw 0..255 RGB pixels; the model normalises them.

        Raises:
            ValueError: another dtype or channel count, or a size that the tubelet does not divide.
        """
        tubelets.check_video(video, self.config.channels)
        return functional.jitted("logits")(*nnx.split(self), video)

    def features(self, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """What the head sees, float32: pooled tokens after the norm. Raises as `__call__`."""
        tubelets.check_video(video, self.config.channels)
        return functional.jitted("raw_features")(*nnx.split(self), video)


def dropout(x: Float[Array, "B D"], rate: float, keys: Key[Array, " B"] | None) -> Float[Array, "B D"]:
    """Zeroes features with probability `rate`, else scales by 1 / (1 - rate); the identity without keys."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (x.shape[1],)))(keys)
    return x * keep / (1 - rate)


class AttentiveProbe(nnx.Module):
    """Classes from frozen tokens: one learned query attends to them in several heads, then a linear head."""

    def __init__(self, width: int, num_heads: int, classes: int, *, rngs: nnx.Rngs):
        if width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the width {width}")
        self.num_heads = num_heads
        self.norm = layers.LayerNorm(width, 1e-6, "float32")
        self.query = nnx.Param(layers.NORMAL(rngs.params(), (1, width), jnp.float32))
        self.key_value = layers.Linear(width, 2 * width, "float32", rngs, layers.XAVIER)
        self.out = layers.Linear(width, width, "float32", rngs, layers.XAVIER)
        self.head = layers.Linear(width, classes, "float32", rngs, layers.NORMAL)

    def __call__(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B K"]:
        b, n, d = tokens.shape
        heads = (b, n, 2, self.num_heads, d // self.num_heads)
        keys, values = self.key_value(self.norm(tokens)).reshape(heads).transpose(2, 0, 3, 1, 4)
        query = self.query[...].reshape(1, self.num_heads, 1, -1)
        answer = attention.attend(jnp.broadcast_to(query, (b, *query.shape[1:])), keys, values)
        return self.head(self.out(answer.reshape(b, d)))
