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
from videomae_jax.data.sources import Source
from videomae_jax.interop import export, weights
from videomae_jax.models import functional, masking, resizing, tubelets, vit
from videomae_jax.models.layout import Layout
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.tasks import backbone, masked
from videomae_jax.tasks.masked import Masked
from videomae_jax.training import report
from videomae_jax.training.step import Batch, Terms, TrainState, clip_keys
from videomae_jax.training.task import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Masked):
    """Prediction of a teacher's tokens at hidden places from the visible tubelets.

    The loss is to the teacher's tokens, each with mean 0 and variance 1.

    Attributes:
        model: encoder, and the predictor as its decoder.
        teacher: of the frozen encoder, which sees all tubelets.
    """

    teacher: VideoMAEConfig
    exported: ClassVar[tuple[str, ...]] = ("encoder",)

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
        visible, hidden = self.masks(batch, root)
        keys = clip_keys(root, "drop_path", batch["index"]) if self.model.drop_path > 0 else None
        predicted = model.predict(video, visible, hidden, keys, layout)
        target = tubelets.take(jax.lax.stop_gradient(self.targets(others, video, layout)), hidden)
        losses = tubelets.reconstruction_error(predicted, target, self.loss_kind)
        weight = batch["weight"]
        return Terms((weight[:, None] * losses).sum(), weight.sum() * hidden.shape[1], {})

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
    shared = masked.fields(config, train)
    teacher: VideoMAEConfig = backbone.read_teacher(config, VideoMAEConfig)
    teacher = dataclasses.replace(teacher, decoder=None)
    model = VideoMAEConfig.from_dict(
        backbone.fields(config)
        | {"decoder": config.model.decoder.to_dict(), "target_width": teacher.encoder.width}
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
        **shared,
    )
    masking.counts(task.mask, task.model.grid, task.mask_ratio)
    return task
