"""What trains a video classifier, whatever its loss: clips, augmentation, validation, multi-view test."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from videomae_jax import hosts, sharding
from videomae_jax.apps import predictions
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline, randaugment, sources
from videomae_jax.data.sources import Source
from videomae_jax.evaluation import classification
from videomae_jax.interop import export
from videomae_jax.models import functional, heads, tubelets
from videomae_jax.models.heads import ClassifierConfig, VideoClassifier
from videomae_jax.models.layout import Layout
from videomae_jax.tasks import backbone, losses, mixup
from videomae_jax.tasks.mixup import Mix
from videomae_jax.training import optim, report, testing
from videomae_jax.training.step import Batch, TrainState, clip_keys, stream
from videomae_jax.training.task import Run, Task, Validate

KEY_METRIC = {"softmax": "top1", "multilabel": "mean_average_precision", "regression": "r2"}
"""What the best weights are chosen by, for each kind of head; larger is better."""

_AT_CHANCE = (
    "warning: after {step} steps validation top1 {top1:.3f} is no better than always naming the most "
    "frequent class: check labels, optim.lr, init_from and data.stride; --config.debug.overfit=8 shows "
    "whether anything can be learnt"
)


@dataclasses.dataclass(frozen=True)
class Classify(Task[ClassifierConfig]):
    """A classifier in training, by the published recipe for labelled videos; its loss is what methods add.

    Attributes:
        stride: frames of the file from one frame of a clip to the next; 0: one of each equal part.
        policy, flip, erasing, area, clips_per_video: see `pipeline.FinetuneClip`.
        mix: mixup and CutMix; None: neither.
        smoothing: of the labels' distributions (softmax).
        class_weights: factor of each class's part of the loss; None: all 1.
        layers: learning rates by depth, and what stays as it is.
        overfit: no augmentation, dropout or smoothing: a check that the clips can be learnt at all.
    """

    model: ClassifierConfig
    stride: int
    policy: randaugment.Policy | None
    flip: bool
    erasing: float
    area: tuple[float, float]
    clips_per_video: int
    mix: mixup.Mix | None
    smoothing: float
    class_weights: tuple[float, ...] | None
    layers: optim.Layers = dataclasses.field(default_factory=optim.Layers)
    overfit: bool = False
    needs_labels: ClassVar[bool] = True
    exported: ClassVar[tuple[str, ...]] = ("encoder", "norm", "head")
    last_phase: ClassVar[str] = "test"

    @property
    def graphdef(self) -> Any:
        """The module without its parameters."""
        return functional.abstract(VideoClassifier, self.model)[0]

    def init(self, key: Key[Array, ""]) -> dict:
        """Parameters of a classifier from scratch, a nested dict of float32 arrays."""
        return functional.init(VideoClassifier, self.model, key)

    def module(self, params: dict) -> VideoClassifier:
        """The classifier that the parameters, or some of them, belong to."""
        return nnx.merge(self.graphdef, {name: params[name] for name in self.exported})

    @property
    def best_by(self) -> str:
        """What the best weights are chosen by."""
        return KEY_METRIC[self.model.head]

    def start(self, config: Config, names: list[str]) -> dict[str, np.ndarray]:
        """The backbone of `init_from`, and its head where the classes are the same; see `transfer.read`."""
        return backbone.start(config, self.model, names)

    @property
    def rate_factors(self) -> Callable[[Any], Any]:
        """Layer-wise decay, and 0 for what is frozen."""
        return functools.partial(optim.layer_scales, layers=self.layers)

    def check_batch(self, config: Config, parts: int) -> None:
        """Mixup pairs the clips of a microbatch."""
        rows = config.data.batch_size // parts
        if self.mix and config.optim.accumulate > 1 and rows % 2:
            raise UserError(
                f"data.batch_size={config.data.batch_size} gives each device microbatches of {rows} clips, "
                f"and mixup pairs clips: use a multiple of {2 * parts}"
            )

    def mixed(
        self, batch: Batch, root: Key[Array, ""], step: Int[Array, ""], layout: Layout
    ) -> tuple[Float[Array, "B T H W C"], Float[Array, "B K"]]:
        """Normalised clips and their targets, erased and mixed.

        Args:
            batch: `label` int32 [B] or `target` float32 [B, K], and `erase` int32 [B, 4], too.
        """
        c = self.model
        pixels = tubelets.normalize_pixels(batch["video"], c.pixel_mean, c.pixel_std)
        if c.head == "softmax":
            smoothing = 0.0 if self.overfit else self.smoothing
            targets = losses.smoothed(batch["label"], len(c.classes), smoothing)
        else:
            targets = batch["target"]
        if self.overfit:
            return pixels, targets
        if self.erasing > 0:
            pixels = tubelets.erase(pixels, batch["erase"], clip_keys(root, "erase", batch["index"]))
        if self.mix:
            key = jax.random.fold_in(stream(root, "mix"), step)
            drawn = mixup.draw(self.mix, pixels.shape[2], pixels.shape[3], key)
            pixels, targets = mixup.mix_clips(pixels, targets, batch["weight"], drawn, layout)
        return pixels, targets

    def logits(
        self, model: VideoClassifier, features: Float[Array, "B D"], batch: Batch, root: Key[Array, ""]
    ) -> Float[Array, "B K"]:
        """The head's outputs in training, with dropout before it."""
        if not self.overfit:
            keys = clip_keys(root, "dropout", batch["index"])
            features = heads.dropout(features, self.model.head_dropout, keys)
        return model.head(features)

    def drop_path_keys(self, batch: Batch, root: Key[Array, ""]) -> Key[Array, " B"] | None:
        """A key for each clip; None where nothing is dropped."""
        return None if self.overfit else clip_keys(root, "drop_path", batch["index"])

    def flops_per_clip(self) -> float:
        """Floating-point operations of a clip's forward and backward pass; see `vit.block_flops`."""
        return backbone.adapted_flops(self.model, self.layers.frozen)

    def outputs(self, params: dict, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B K"]:
        """The head's outputs for plain clips."""
        return self.module(params).logits(video)

    @property
    def _clip(self) -> tuple[int, int, tuple[int, int]]:
        frames, height, width = self.model.clip_size
        return frames, self.stride, (height, width)

    @property
    def clip_transform(self) -> pipeline.FinetuneClip | pipeline.ValidationClip:
        """Record -> training clips."""
        if self.overfit:
            return pipeline.ValidationClip(*self._clip)
        how = (self.policy, self.flip, self.erasing, self.area, self.clips_per_video)
        return pipeline.FinetuneClip(*self._clip, *how)

    def test_views(self, segments: int, crops: int) -> pipeline.TestViews:
        """Record -> its test views."""
        return pipeline.TestViews(*self._clip, segments, crops)

    def metadata(self) -> dict[str, Any]:
        """What is stored beside the parameters."""
        return export.metadata(VideoClassifier, self.model, {"stride": self.stride})

    def describe(self) -> str:
        """The model in half a line."""
        encoder, tokens = self.model.encoder, math.prod(self.model.grid)
        frozen = f", {self.layers.frozen} blocks frozen" if self.layers.frozen else ""
        return (
            f"encoder {encoder.width}x{encoder.depth}{frozen}, {tokens} tubelets, "
            f"{len(self.model.classes)} classes ({self.model.head}), {self.model.compute.dtype}"
        )

    def validator(self, run: Run) -> Validate:
        """Figures on the middle clip of each validation video."""
        validation = run.videos.validation
        if not self.overfit:
            self._tester(run)  # what does not fit into memory is refused now, not after the last step
        clip = pipeline.ValidationClip(*self._clip)
        evaluator = testing.Evaluator(self.outputs, validation, clip, run.config, run.mesh)
        said: set[str] = set()

        def say_once(name: str, text: str) -> None:
            if name not in said:
                said.add(name)
                report.say(text)

        def validate(params: Any, step: int) -> dict[str, float]:
            outputs = evaluator.run(params)
            for video, reason in outputs.failed.items():
                say_once(video, f"bad video, validated without it: {reason}")
            if not len(outputs.records):
                raise UserError(f"none of the {len(validation)} validation videos can be decoded")
            scores = outputs.scores(validation, self.model.head)
            lost = [validation.ids[record] for record in scores.not_finite]
            if lost:
                report.say(
                    f"warning: the scores of {len(lost)} of {len(scores.records)} validation videos are not "
                    f"finite, the first is {lost[0]}: they count as wrong; such weights are never the best"
                )
            figures = scores.metrics(self.model.head) | {"not_finite": float(len(lost))}
            found = {f"validation_{name}": x for name, x in figures.items()}
            if self.model.head == "softmax" and step >= run.schedule.warmup_steps:
                top1 = found["validation_top1"]
                if classification.is_at_chance(top1, scores.labels):
                    say_once("at chance", _AT_CHANCE.format(step=step, top1=top1))
            return found

        return validate

    def _tester(self, run: Run) -> testing.Evaluator:
        config = run.config
        views = self.test_views(config.evaluate.segments, config.evaluate.crops)
        return testing.Evaluator(self.outputs, run.videos.test, views, config, run.mesh)

    def finish(self, run: Run, state: TrainState) -> dict[str, Any]:
        """The multi-view test of the best weights and of the last, as the paper tests them.

        Writes evaluation.json, predictions.csv and confusion.png of the best ones, which are tested first.

        Raises:
            UserError: there are no best weights; as `summarize`.
            OutputError: weights whose outputs are not finite.
        """
        if self.overfit:
            return {"learnt_by_heart": self._check_overfit(run, state)}
        config, workdir, test = run.config, run.workdir, run.videos.test
        views = self.test_views(config.evaluate.segments, config.evaluate.crops)
        evaluator = self._tester(run)
        best = sharding.replicate(backbone.best_weights(workdir), run.mesh)
        result = {}
        for name, params in {"best": best, "last": state.params, "last_average": state.ema}.items():
            if params is not None:
                outputs = evaluator.run(params)
                whose = f"{name.replace('_', ' ')} weights"
                allowed = config.evaluate.allow_failed
                result[name] = summarize(outputs, test, views, self.model.head, whose, allowed)
                report.say(f"test of the {whose}: {predictions.line(result[name])}")
                if name == "best" and hosts.is_writer():
                    predictions.write(workdir, result[name], outputs.scores(test, self.model.head), test)
        return {"test": result}

    def _check_overfit(self, run: Run, state: TrainState) -> dict[str, float]:
        found = self.validator(run)(state.params, int(state.step))
        value, wanted = found[f"validation_{self.best_by}"], 0.95 if self.best_by == "r2" else 1.0
        if not value >= wanted:  # NaN too
            raise UserError(
                f"debug.overfit={run.config.debug.overfit}: the training clips are not learnt by heart "
                f"({self.best_by} {value:.3f}, not {wanted}): raise optim.lr, or look for labels that cannot "
                f"be told apart"
            )
        return found


def summarize(
    outputs: testing.Outputs,
    source: sources.Source,
    views: pipeline.TestViews,
    head: str,
    whose: str,
    allow_failed: bool,
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        whose: what the outputs come from, in errors.
        allow_failed: count videos that cannot be decoded, rather than refuse them.

    Raises:
        UserError: videos that cannot be decoded, none that can, or none with a label.
        OutputError: outputs that are not finite.
    """
    if outputs.num_failed and not allow_failed:
        first = next(iter(outputs.failed.values()), "")
        raise UserError(
            f"{outputs.num_failed} of {len(source)} videos cannot be decoded, the first is {first}: mend or "
            f"remove them, or report the others with --config.evaluate.allow_failed=true"
        )
    if not len(outputs.records):
        raise UserError(f"none of the {len(source)} videos in {source.root} can be decoded")
    if head == "softmax" and max(source.labels) < 0:
        raise UserError(f"no video in {source.root} has a label: list them with their labels")
    if head == "multilabel" and not np.any(source.targets):
        raise UserError(f"no video in {source.root} has a class, so there is nothing to find")
    classification.check_finite(outputs.values, [source.ids[record] for record in outputs.records], whose)
    if outputs.short and views.stride == 0:
        report.say(
            f"{len(outputs.short)} videos have fewer than {views.frames} frames, such as {outputs.short[0]}: "
            f"their first frame is repeated"
        )
    elif outputs.short and views.segments > 1:
        report.say(
            f"{len(outputs.short)} videos are shorter than a clip of {views.frames} frames at stride "
            f"{views.stride}, such as {outputs.short[0]}: their last frame is repeated and all segments are "
            f"the same; a smaller --config.data.stride avoids it"
        )
    scores = outputs.scores(source, head)
    return {
        **scores.metrics(head),
        "videos": len(outputs.records),
        "videos_failed": outputs.num_failed,
        "videos_shorter_than_a_clip": len(outputs.short),
        "failed": dict(sorted(outputs.failed.items())),
        "views": {"segments": views.segments, "crops": views.crops},
    }


def fields(config: Config, train: Source | None, path: str) -> dict[str, Any]:
    """The fields of a `Classify` that the settings give; see `task.Make`.

    Raises:
        UserError, ValueError: sizes and settings that do not fit together.
    """
    head, augment, loss = config.head, config.augment, config.loss
    model = ClassifierConfig.from_dict(
        backbone.fields(config)
        | {
            "classes": train.classes if train else ("unknown",),
            "head": head.kind,
            "pooling": head.pooling,
            "head_dropout": head.dropout,
            "head_scale": head.scale,
        }
        | backbone.kept(config, path)
    )
    mix = Mix(augment.mixup, augment.cutmix, augment.mix_probability, augment.mix_switch)
    is_mixed = mix.is_active and head.kind == "softmax" and not config.debug.overfit
    _check_mix(config, mix, is_mixed)
    if loss.class_weights not in ("none", "balanced"):
        raise UserError(f"loss.class_weights={loss.class_weights!r} is unknown: use none or balanced")
    weights_of_classes = None
    if loss.class_weights == "balanced":
        if head.kind != "softmax":
            raise UserError("loss.class_weights=balanced is for head.kind=softmax: set it to none")
        if train and not config.debug.overfit:  # of whose few videos a class may have none
            weights_of_classes = losses.balanced_weights(
                [train.labels.count(label) for label in range(len(train.classes))]
            )
    return dict(
        model=model,
        stride=config.data.stride,
        policy=randaugment.parse(augment.policy) if augment.policy else None,
        flip=augment.flip,
        erasing=augment.erasing,
        area=tuple(augment.area),
        clips_per_video=config.data.clips_per_video,
        mix=mix if is_mixed else None,
        smoothing=loss.smoothing,
        class_weights=weights_of_classes,
        layers=backbone.layers(config, model),
        overfit=config.debug.overfit > 0,
    )


def _check_mix(config: Config, mix: Mix, is_mixed: bool) -> None:
    if mix.is_active and config.head.kind != "softmax":
        raise UserError(
            f"augment.mixup and cutmix mix classes and are not for head.kind={config.head.kind}: set "
            f"--config.augment.mixup=0 --config.augment.cutmix=0"
        )
    if is_mixed and config.data.batch_size % 2:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is odd, and mixup pairs clips: make it even, or set "
            f"--config.augment.mix_probability=0"
        )
