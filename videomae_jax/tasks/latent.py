"""Latent targets: predicting what a frozen teacher makes of the hidden tubelets.

The second stage of SALT (arXiv 2509.24317), whose teacher is a masked autoencoder as `pretrain` makes them,
and with the settings of its config the video half of MVD (arXiv 2212.04500).
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, Key, UInt8

from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.interop import export, weights
from videomae_jax.models import functional, masking, resizing, tubelets, vit
from videomae_jax.models.layout import Layout
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.tasks import backbone, knn
from videomae_jax.training import report
from videomae_jax.training.step import Batch, Terms, TrainState, clip_keys
from videomae_jax.training.task import Run, Task, Validate


@dataclasses.dataclass(frozen=True)
class Latent(Task[VideoMAEConfig]):
    """Prediction of a teacher's tokens at hidden places from the visible tubelets.

    Attributes:
        model: encoder, and the predictor as its decoder.
        teacher: of the frozen encoder, which sees all tubelets.
        mask, mask_ratio, stride, clips_per_video, short_side: as those of `Pretrain`.
        loss_kind: "l1", "mse" or "smooth_l1" to the teacher's tokens, each with mean 0 and variance 1.
    """

    model: VideoMAEConfig
    teacher: VideoMAEConfig
    mask: str
    mask_ratio: float
    loss_kind: str
    stride: int
    clips_per_video: int = 1
    short_side: int = 0
    exported: ClassVar[tuple[str, ...]] = ("encoder",)

    @property
    def graphdef(self) -> Any:
        """The student without its parameters."""
        return functional.abstract(VideoMAE, self.model)[0]

    def init(self, key: Key[Array, ""]) -> dict:
        """Encoder and predictor from nothing."""
        return functional.init(VideoMAE, self.model, key)

    @property
    def _teacher_parts(self) -> tuple[Any, dict]:
        return functional.abstract(VideoMAE, self.teacher)

    def others(self, params: dict) -> dict:
        """Room for the teacher, which `start` fills."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._teacher_parts[1])
        return {"teacher": zeros}

    def start(self, config: Config, names: list[str]) -> dict[str, np.ndarray]:
        """The teacher's encoder."""
        model = weights.read(config.teacher, backbone.hints(config))
        params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        report.say(f"teacher: the encoder of {config.teacher}")
        found = flatten_dict({"encoder": params["encoder"]}, sep="/")
        return {f"others/teacher/{name}": np.asarray(value) for name, value in found.items()}

    def targets(
        self, others: dict, video: UInt8[Array, "B T H W C"], layout: Layout
    ) -> Float[Array, "B N D"]:
        """The teacher's tokens of whole clips, each normalised without parameters, float32."""
        model = nnx.merge(self._teacher_parts[0], others["teacher"])
        pixels = tubelets.normalize_pixels(video, self.teacher.pixel_mean, self.teacher.pixel_std)
        tokens = model.encode_pixels(pixels, None, layout).astype(jnp.float32)
        centred = tokens - tokens.mean(axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)

    def terms(
        self,
        params: dict,
        others: dict,
        batch: Batch,
        root: Key[Array, ""],
        step: Int[Array, ""],
        layout: Layout,
    ) -> Terms:
        """The error of predicted tokens, a mean over hidden places; see `Task.terms`."""
        model, video = nnx.merge(self.graphdef, params), resizing.clips(batch, self.model.clip_size[1:])
        mask_keys = clip_keys(root, "mask", batch["index"])
        visible, hidden = masking.indices(mask_keys, self.mask, self.model.grid, self.mask_ratio)
        keys = clip_keys(root, "drop_path", batch["index"]) if self.model.drop_path > 0 else None
        predicted = model.predict(video, visible, hidden, keys, layout)
        target = tubelets.take(jax.lax.stop_gradient(self.targets(others, video, layout)), hidden)
        losses = tubelets.reconstruction_error(predicted, target, self.loss_kind)
        weight = batch["weight"]
        return Terms((weight[:, None] * losses).sum(), weight.sum() * hidden.shape[1], {})

    def pooled(self, params: dict, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B D"]:
        """Mean of all tokens of whole clips: what k-NN looks at."""
        return nnx.merge(self.graphdef, params).raw_features(video)

    @property
    def clip_transform(self) -> pipeline.PretrainClip:
        """Record -> training clip."""
        frames, *size = self.model.clip_size
        how = (self.clips_per_video, self.short_side)
        return pipeline.PretrainClip(frames, self.stride, (size[0], size[1]), *how)

    def validator(self, run: Run) -> Validate:
        """k-NN on pooled tokens; see `knn.validator`."""
        return knn.validator(self.pooled, self.stride, run)

    def finish(self, run: Run, state: TrainState) -> dict[str, Any]:
        """Nothing is left: there are no pixels to draw."""
        return {}

    def flops_per_clip(self) -> float:
        """Three passes' worth for the student, one for the teacher; see `vit.block_flops`."""
        c, decoder = self.model, self.model.decoder
        assert decoder is not None
        visible, hidden = masking.counts(self.mask, c.grid, self.mask_ratio)
        voxels, width = math.prod(c.tubelet) * c.channels, c.encoder.width
        forward = 2 * visible * width * (voxels + decoder.width)
        forward += 2 * hidden * decoder.width * self.teacher.encoder.width
        forward += vit.block_flops(c.encoder, visible) + vit.block_flops(decoder, visible + hidden)
        return 3.0 * forward + vit.block_flops(self.teacher.encoder, visible + hidden)

    def metadata(self) -> dict[str, Any]:
        """What is stored beside the student's encoder."""
        recipe = {"mask": self.mask, "mask_ratio": self.mask_ratio, "stride": self.stride, "method": "latent"}
        return export.metadata(
            VideoMAE, dataclasses.replace(self.model, decoder=None, target_width=None), recipe
        )

    def describe(self) -> str:
        """The models in half a line."""
        c, theirs = self.model, self.teacher.encoder
        assert c.decoder is not None
        visible, hidden = masking.counts(self.mask, c.grid, self.mask_ratio)
        return (
            f"encoder {c.encoder.width}x{c.encoder.depth}, predictor {c.decoder.width}x{c.decoder.depth}, "
            f"teacher {theirs.width}x{theirs.depth}, {visible} visible and {hidden} hidden tubelets, "
            f"{c.compute.dtype}"
        )


def make(config: Config, train: Source | None, _weights: str) -> Latent:
    """The task that the settings name; see `task.Make`.

    Raises:
        UserError, ValueError: sizes and settings that do not fit together.
    """
    if config.data.stride < 1:
        raise UserError("data.stride=0 (one frame of each part) is for finetuning: use at least 1")
    fields = backbone.fields(config)
    teacher: VideoMAEConfig = backbone.read_teacher(config, VideoMAEConfig)
    teacher = dataclasses.replace(teacher, decoder=None)
    model = VideoMAEConfig.from_dict(
        fields | {"decoder": config.model.decoder.to_dict(), "target_width": teacher.encoder.width}
    )
    ours, theirs = ((c.clip_size, c.tubelet, c.channels) for c in (model, teacher))
    if ours != theirs:
        raise UserError(
            f"the teacher in {config.teacher} sees clips of {theirs[0]} in tubelets of {theirs[1]}, the "
            f"student {ours[0]} in {ours[1]}: use the clip size of the teacher"
        )
    task = Latent(
        model=model,
        teacher=dataclasses.replace(teacher, compute=model.compute),
        mask=config.mask.kind,
        mask_ratio=config.mask.ratio,
        loss_kind=config.loss.kind,
        stride=config.data.stride,
        clips_per_video=config.data.clips_per_video,
        short_side=train.short_side if train is not None and config.data.resize == "device" else 0,
    )
    masking.counts(task.mask, task.model.grid, task.mask_ratio)
    if task.loss_kind not in tubelets.LOSSES:
        raise UserError(f"loss.kind={task.loss_kind!r} is unknown: use {', '.join(tubelets.LOSSES)}")
    return task
