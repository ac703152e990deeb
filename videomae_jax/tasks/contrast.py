"""Contrast between two clips of a video: MoCo v3 (arXiv 2104.02057) on the encoder of VideoMAE.

The heads, the loss, the momentum and the frozen embedding are those of the image method. Its video recipe was
never published: two clips at independent times, views that are the same for all frames, and the mean of all
tokens as the representation are ours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from videomae_jax.config import Config, UserError
from videomae_jax.data.pairs import PairClips
from videomae_jax.data.sources import Source
from videomae_jax.interop import export
from videomae_jax.models import contrast, functional, tubelets, views, vit
from videomae_jax.models.layout import Layout
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.tasks import backbone, knn
from videomae_jax.training.step import Batch, Terms, TrainState, clip_keys, stream
from videomae_jax.training.task import Run, Task, Validate

_COLLAPSED = 0.1  # of the spread of features that point in all directions alike


@dataclasses.dataclass(frozen=True)
class Contrast(Task[VideoMAEConfig]):
    """MoCo v3. Clips 2 i and 2 i + 1 of a batch are the views of one video.

    Attributes:
        stride, flip, area: see `PairClips`.
        hidden, width: of the heads' layers, and of what is compared.
        temperature: of the softmax over the batch.
        momentum: of the momentum encoder at the start; it rises to 1 along a cosine.
    """

    model: VideoMAEConfig
    stride: int
    flip: bool
    area: tuple[float, float]
    hidden: int
    width: int
    temperature: float
    momentum: float
    clips_per_video: int = 2
    exported: ClassVar[tuple[str, ...]] = ("encoder",)

    @property
    def graphdef(self) -> Any:
        """The encoder without its parameters."""
        return functional.abstract(VideoMAE, self.model)[0]

    def init(self, key: Key[Array, ""]) -> dict:
        """Encoder, projector and predictor; the embedding and the attention begin as MoCo v3's do."""
        c, d = self.model, self.model.encoder.width
        keys = jax.random.split(key, 5)
        params = functional.init(VideoMAE, c, keys[0])
        encoder: Any = params["encoder"]
        voxels = math.prod(c.tubelet) * c.channels
        bound = math.sqrt(6 / (voxels + d))
        encoder["embed"] = {
            "kernel": jax.random.uniform(keys[1], (voxels, d), minval=-bound, maxval=bound),
            "bias": jnp.zeros(d),
        }
        # Three matrices that each begin as one of their own, not a fused one.
        shape = encoder["blocks"]["attention"]["qkv"].shape
        bound = math.sqrt(6 / (d + d))
        encoder["blocks"]["attention"]["qkv"] = jax.random.uniform(
            keys[2], shape, minval=-bound, maxval=bound
        )
        return {
            "encoder": encoder,
            "projector": contrast.init_mlp(keys[3], (d, self.hidden, self.hidden, self.width)),
            "predictor": contrast.init_mlp(keys[4], (self.width, self.hidden, self.width)),
        }

    def others(self, params: dict) -> dict:
        """The momentum encoder and its projector, at the start the same."""
        return {name: jax.tree.map(jnp.copy, params[name]) for name in ("encoder", "projector")}

    def follow(self, others: dict, params: dict, progress: Array) -> dict:
        """The momentum trees a step nearer to the parameters."""
        kept = 1 - 0.5 * (1 + jnp.cos(jnp.pi * progress)) * (1 - self.momentum)
        ours = {name: params[name] for name in others}
        return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, others, ours)

    @property
    def rate_factors(self) -> Callable[[Any], Any]:
        """The embedding stays as it began, which keeps training stable."""
        return _all_but_the_embedding

    def decays(self, params: dict) -> Any:
        """Weight decay for all parameters, biases and norms too."""
        return jax.tree.map(lambda _: True, params)

    def check_batch(self, config: Config, parts: int) -> None:
        """Batch norm and negatives are those of the whole batch, of two videos or more."""
        rows = config.data.batch_size // parts
        if config.optim.accumulate > 1:
            raise UserError(
                "optim.accumulate is not for task=contrast, whose batch norm and negatives are those of the "
                "whole batch: set it to 1; --config.model.remat=full needs less memory too"
            )
        if rows % 2 or config.data.batch_size < 4:
            raise UserError(
                f"data.batch_size={config.data.batch_size} gives each device {rows} clips: task=contrast "
                f"compares pairs with others, so use a multiple of {2 * parts}, at least 4"
            )

    def warning(self, values: dict[str, float]) -> str:
        """Collapse: all clips look the same."""
        if values["feature_std"] > _COLLAPSED:
            return ""
        return (
            f"warning: features collapse (their spread is {values['feature_std']:.3f} of what it may be): "
            f"lower optim.lr, or use a larger data.batch_size or a longer optim.warmup"
        )

    def terms(
        self,
        params: dict,
        others: dict,
        batch: Batch,
        root: Key[Array, ""],
        step: Int[Array, ""],
        layout: Layout,
    ) -> Terms:
        """The symmetric loss, a mean over videos; see `Task.terms`."""
        c, weight = self.model, batch["weight"][::2]
        # What never moves has no gradient to take part in clipping and in the guard either.
        fixed = jax.lax.stop_gradient(params["encoder"]["embed"])
        params = params | {"encoder": params["encoder"] | {"embed": fixed}}
        keys = clip_keys(root, "drop_path", batch["index"]) if c.drop_path > 0 else None
        pixels = self._views(batch, root)
        ours = self._project(params, pixels, weight, keys, layout)
        queries = [
            contrast.normalized(contrast.apply_mlp(params["predictor"], x, weight, c.compute.dtype, layout))
            for x in ours
        ]
        theirs = [
            contrast.normalized(jax.lax.stop_gradient(x))
            for x in self._project(others, pixels, weight, None, layout)
        ]
        how = (weight, self.temperature, layout)
        (first, first_top), (second, second_top) = (
            contrast.info_nce(*pair, *how) for pair in zip(queries, theirs[::-1], strict=True)
        )
        total = (weight * (first + second)).sum()
        metrics = {
            "top1": (weight * (first_top + second_top)).sum() / 2,
            "feature_std": self._spread(queries[0], weight, layout) * weight.sum(),
        }
        return Terms(total, weight.sum(), jax.lax.stop_gradient(metrics))

    def _views(self, batch: Batch, root: Key[Array, ""]) -> Float[Array, "B T H W C"]:
        """Normalised pixels of the first and the second view in turn."""
        keys = jax.random.split(stream(root, "view"), 2)
        ways = (views.FIRST, views.SECOND)
        video = batch["video"].astype(jnp.float32) / 255
        made = []
        for number, (way, key) in enumerate(zip(ways, keys, strict=True)):
            each = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"][number::2])
            # One clip after the other: blurred copies of a whole batch would not fit a device.
            draw = functools.partial(_augmented, way)
            made.append(jax.lax.map(draw, (video[number::2], each)))
        pixels = jnp.stack(made, axis=1).reshape(video.shape)
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.model.pixel_mean, self.model.pixel_std))
        return (pixels - mean) / std

    def _project(
        self, params: dict, pixels: jax.Array, weight: jax.Array, keys: jax.Array | None, layout: Layout
    ) -> tuple[jax.Array, jax.Array]:
        """What the projector makes of the first and of the second views, each with its own batch norm."""
        features = self._features(params["encoder"], pixels, keys, layout)
        how = (weight, self.model.compute.dtype, layout)
        first, second = (contrast.apply_mlp(params["projector"], features[i::2], *how) for i in range(2))
        return first, second

    def _features(
        self, encoder: dict, pixels: jax.Array, keys: jax.Array | None, layout: Layout
    ) -> Float[Array, "B D"]:
        model = nnx.merge(self.graphdef, {"encoder": encoder})
        return model.encode_pixels(pixels, keys, layout).astype(jnp.float32).mean(axis=1)

    def _spread(self, features: jax.Array, weight: jax.Array, layout: Layout) -> Float[Array, ""]:
        """Standard deviation of normalised features, 1 for features that point in all directions alike."""
        sums = [weight.sum(), weight @ features, weight @ features**2]
        count, first, second = layout.sum_over_rows(sums)
        count = jnp.maximum(count, 1.0)
        variance = jnp.maximum(second / count - (first / count) ** 2, 0.0)
        return jnp.sqrt(variance).mean() * math.sqrt(self.width)

    def pooled(self, params: dict, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """Mean of all tokens of whole clips: the representation."""
        pixels = tubelets.normalize_pixels(video, self.model.pixel_mean, self.model.pixel_std)
        return self._features(params["encoder"], pixels, None, Layout())

    @property
    def clip_transform(self) -> PairClips:
        """Record -> two clips."""
        frames, *size = self.model.clip_size
        return PairClips(frames, self.stride, (size[0], size[1]), self.flip, self.area)

    def validator(self, run: Run) -> Validate:
        """k-NN on pooled tokens; see `knn.validator`."""
        return knn.validator(self.pooled, self.stride, run)

    def finish(self, run: Run, state: TrainState) -> dict[str, Any]:
        """Nothing is left: k-NN, where it is asked for, has been looked at after the last step."""
        return {}

    def flops_per_clip(self) -> float:
        """Three passes' worth for the encoder, one for the momentum encoder; the heads left out."""
        c, tokens = self.model, math.prod(self.model.grid)
        embed = 2.0 * tokens * math.prod(c.tubelet) * c.channels * c.encoder.width
        return 4 * vit.block_flops(c.encoder, tokens) + 2 * embed

    def metadata(self) -> dict[str, Any]:
        """What is stored beside the encoder."""
        return export.metadata(VideoMAE, self.model, {"stride": self.stride, "method": "contrast"})

    def describe(self) -> str:
        """The model in half a line."""
        encoder, tokens = self.model.encoder, math.prod(self.model.grid)
        heads = f"heads {self.hidden} to {self.width}"
        return (
            f"encoder {encoder.width}x{encoder.depth}, {tokens} tubelets, {heads}, {self.model.compute.dtype}"
        )


def _all_but_the_embedding(params: dict) -> dict:
    factors = jax.tree.map(lambda _: 1.0, params)
    factors["encoder"]["embed"] = {"kernel": 0.0, "bias": 0.0}
    return factors


def _augmented(way: views.View, clip_and_key: tuple[jax.Array, jax.Array]) -> jax.Array:
    return views.augment(clip_and_key[0], way, clip_and_key[1])


def make(config: Config, _train: Source | None, _weights: str) -> Contrast:
    """The task that the settings name; see `task.Make`.

    Raises:
        UserError, ValueError: sizes and settings that do not fit together.
    """
    if config.data.clips_per_video != 2:
        raise UserError("task=contrast compares two clips of each video: set --config.data.clips_per_video=2")
    if len(config.model.pixel_mean) != 3:
        raise UserError("task=contrast changes colours, of three channels: leave model.pixel_mean as it is")
    return Contrast(
        model=VideoMAEConfig.from_dict(backbone.fields(config) | {"decoder": None}),
        stride=backbone.stride(config),
        flip=config.augment.flip,
        area=tuple(config.augment.area),
        hidden=config.contrast.hidden,
        width=config.contrast.width,
        temperature=config.contrast.temperature,
        momentum=config.contrast.momentum,
    )
