"""Distillation: a classifier that learns from the outputs of another, on the same mixed clips.

Consistent teaching (arXiv 2106.05237), as VideoMAE V2 made its small models; temperature, epochs and learning
rate of these were not published.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, Key

from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.interop import weights
from videomae_jax.models import functional, layers, vit
from videomae_jax.models.heads import ClassifierConfig, VideoClassifier
from videomae_jax.models.layout import Layout
from videomae_jax.models.tubelets import Grid
from videomae_jax.tasks import backbone, classify, losses
from videomae_jax.training import report
from videomae_jax.training.step import Batch, Terms

_ALIGNED = 6  # layers whose features are compared, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(classify.Classify):
    """A student whose outputs are drawn to those of a frozen teacher.

    Attributes:
        teacher: any classifier of the same classes; clips are made for the larger of both, and each sees them
            in its own size and number of frames.
        temperature: that both outputs are divided by; the loss is multiplied by its square.
        hard_weight: of the loss with the labels.
        feature_weight: of the distance of mean tokens, over layers at like depths: 2 - 2 cosine.
    """

    teacher: ClassifierConfig
    temperature: float
    hard_weight: float
    feature_weight: float

    @property
    def _teacher_parts(self) -> tuple[Any, dict]:
        return functional.abstract(VideoClassifier, self.teacher)

    @property
    def _aligned(self) -> list[tuple[int, int]]:
        """(layer of the student, layer of the teacher) at the same share of the depth, the last ones too."""
        ours, theirs = self.model.encoder.depth, self.teacher.encoder.depth
        count = min(_ALIGNED, ours, theirs)
        return [((i + 1) * ours // count - 1, (i + 1) * theirs // count - 1) for i in range(count)]

    def init(self, key: Key[Array, ""]) -> dict:
        """A classifier, and where features are compared a matrix from each layer to the teacher's."""
        classifier_key, align_key = jax.random.split(key)
        params = super().init(classifier_key)
        if self.feature_weight > 0:
            shape = (self.model.encoder.width, self.teacher.encoder.width)
            keys = jax.random.split(align_key, len(self._aligned))
            params |= {
                f"align{i}": {"kernel": layers.XAVIER(key, shape, jnp.float32)} for i, key in enumerate(keys)
            }
        return params

    def others(self, params: dict) -> dict:
        """Room for the teacher, which `start` fills."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._teacher_parts[1])
        return {"teacher": zeros}

    def start(self, config: Config, names: list[str]) -> dict[str, np.ndarray]:
        """The teacher, and the student's own start."""
        model = weights.read(config.teacher, backbone.hints(config))
        report.say(f"teacher: {config.teacher}")
        params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        found: dict[str, Any] = flatten_dict(params, sep="/")
        theirs = {f"others/teacher/{name}": np.asarray(value) for name, value in found.items()}
        return super().start(config, names) | theirs

    @property
    def _seen(self) -> Grid:
        """Frames, height and width of the clips that are made: enough for both."""
        t, h, w = map(max, zip(self.model.clip_size, self.teacher.clip_size, strict=True))
        return t, h, w

    @property
    def clip_transform(self) -> pipeline.FinetuneClip:
        """Record -> training clips, as long in time as the student's."""
        frames, *size = self._seen
        stride = self.stride * self.model.clip_size[0] // frames
        how = (self.policy, self.flip, self.erasing, self.area, self.clips_per_video)
        return pipeline.FinetuneClip(frames, stride, (size[0], size[1]), *how)

    def terms(
        self,
        params: dict,
        others: dict,
        batch: Batch,
        root: Key[Array, ""],
        step: Int[Array, ""],
        layout: Layout,
    ) -> Terms:
        """The distance to the teacher, a mean over clips; see `Task.terms`."""
        pixels, targets = self.mixed(batch, root, step, layout)
        model = self.module(params)
        drop_path = self.drop_path_keys(batch, root)
        ours = fit(pixels, self.model.clip_size)
        features, ours_by_layer = model.pooled_and_layers(ours, drop_path, layout, self.layers.frozen)
        outputs = self.logits(model, features, batch, root)
        wanted, theirs_by_layer = self._teach(others, pixels, layout)
        soft = jax.nn.softmax(wanted / self.temperature)
        divergence = soft * (
            jnp.log(jnp.maximum(soft, 1e-30)) - jax.nn.log_softmax(outputs / self.temperature)
        )
        clip_losses = self.temperature**2 * divergence.sum(axis=1)
        if self.hard_weight > 0:
            clip_losses += self.hard_weight * losses.output_losses(outputs, targets, "softmax", None)
        if self.feature_weight > 0:
            pairs = [
                (ours_by_layer[mine] @ params[f"align{i}"]["kernel"], theirs_by_layer[other])
                for i, (mine, other) in enumerate(self._aligned)
            ]
            clip_losses += self.feature_weight * sum(2 - 2 * _cosine(*pair) for pair in pairs) / len(pairs)
        agree = (outputs.argmax(axis=1) == wanted.argmax(axis=1)).astype(jnp.float32)
        weight = batch["weight"]
        return Terms((weight * clip_losses).sum(), weight.sum(), {"agreement": (weight * agree).sum()})

    def _teach(
        self, others: dict, pixels: Float[Array, "B T H W C"], layout: Layout
    ) -> tuple[Float[Array, "B K"], Float[Array, "L B D"]]:
        """The teacher's logits in the student's order of classes, and the mean tokens of its layers."""
        ours, theirs = ((np.array(c.pixel_mean), np.array(c.pixel_std)) for c in (self.model, self.teacher))
        if self.teacher.pixel_mean != self.model.pixel_mean or self.teacher.pixel_std != self.model.pixel_std:
            pixels = pixels * (ours[1] / theirs[1]) + (ours[0] - theirs[0]) / theirs[1]
        model = nnx.merge(self._teacher_parts[0], others["teacher"])
        features, by_layer = model.pooled_and_layers(fit(pixels, self.teacher.clip_size), None, layout)
        order = np.array([self.teacher.classes.index(name) for name in self.model.classes])
        return jax.lax.stop_gradient((model.head(features)[:, order], by_layer))

    def flops_per_clip(self) -> float:
        """Those of the student, and one forward pass of the teacher; see `vit.block_flops`."""
        t, h, w = self.teacher.grid
        return super().flops_per_clip() + vit.block_flops(self.teacher.encoder, t * h * w)

    def describe(self) -> str:
        """The models in half a line."""
        theirs = self.teacher.encoder
        return f"{super().describe()}, teacher {theirs.width}x{theirs.depth}"


def fit(pixels: Float[Array, "B T H W C"], size: Grid) -> Float[Array, "B t h w C"]:
    """The same clips with fewer frames, evenly taken, and smaller ones."""
    batch, frames, *_, channels = pixels.shape
    pixels = pixels[:, :: frames // size[0]]
    if pixels.shape[1:4] == tuple(size):
        return pixels
    return jax.image.resize(pixels, (batch, *size, channels), "linear", antialias=True)


def _cosine(a: Float[Array, "B D"], b: Float[Array, "B D"]) -> Float[Array, " B"]:
    lengths = jnp.sqrt(jnp.maximum((a**2).sum(axis=1) * (b**2).sum(axis=1), 1e-24))
    return (a * b).sum(axis=1) / lengths


def make(config: Config, train: Source | None, path: str) -> Distill:
    """The task that the settings name; see `task.Make`.

    Raises:
        UserError, ValueError: sizes and settings that do not fit together.
    """
    fields = classify.fields(config, train, path)
    model: ClassifierConfig = fields["model"]
    teacher: ClassifierConfig = backbone.read_teacher(config, ClassifierConfig)
    if model.head != "softmax" or teacher.head != "softmax":
        raise UserError("distillation is for classes: head.kind=softmax of teacher and student")
    if train is None:  # its classes are not known yet
        fields["model"] = model = dataclasses.replace(model, classes=teacher.classes)
    if sorted(teacher.classes) != sorted(model.classes):
        different = min(set(teacher.classes) ^ set(model.classes))
        raise UserError(
            f"the teacher in {config.teacher} has {len(teacher.classes)} classes and the data "
            f"{len(model.classes)}, and {different!r} is not in both: use a teacher of the same classes"
        )
    task = Distill(
        **fields,
        teacher=dataclasses.replace(teacher, compute=model.compute),
        temperature=config.distill.temperature,
        hard_weight=config.distill.hard_weight,
        feature_weight=config.distill.feature_weight,
    )
    frames = task._seen[0]
    for name, size in (("teacher", teacher.clip_size), ("student", model.clip_size)):
        if frames % size[0] or task.stride * model.clip_size[0] % frames:
            raise UserError(
                f"clips of {frames} frames at a stride of {task.stride} x {model.clip_size[0]} / {frames} do "
                f"not divide into those of the {name}, {size[0]}: choose data.frames and data.stride that do"
            )
    return task
