"""Finetuning a video classifier, or training it from scratch: the published recipe for labelled videos."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from videomae_jax import hosts, sharding
from videomae_jax.apps import predictions
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline, randaugment, sources
from videomae_jax.evaluation import classification
from videomae_jax.interop import export
from videomae_jax.models import heads, tubelets, vit
from videomae_jax.models.heads import ClassifierConfig, VideoClassifier
from videomae_jax.storage import Place
from videomae_jax.training import losses, mixup, report, testing
from videomae_jax.training.splits import Splits
from videomae_jax.training.step import Batch, TrainState, clip_keys, stream

KEY_METRIC = {"softmax": "top1", "multilabel": "mean_average_precision", "regression": "r2"}
"""What the best weights are chosen by, for each kind of head; larger is better."""


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Classification of clips (arXiv 2203.12602), all weights trained or the upper ones only.

    Attributes:
        stride: frames of the file from one frame of a clip to the next; 0: one of each equal part.
        policy, flip, erasing, area, clips_per_video: see `pipeline.FinetuneClip`.
        mix: mixup and CutMix; None: neither.
        smoothing: of the labels' distributions (softmax).
        class_weights: factor of each class's part of the loss; None: all 1.
        frozen: the embedding and this many blocks stay as they are; 0: nothing does.
        by_heart: no augmentation, dropout or smoothing: a check that the clips can be learnt at all.
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
    frozen: int
    by_heart: bool = False

    @functools.cached_property
    def graphdef(self) -> Any:
        """The module without its parameters."""
        return nnx.graphdef(nnx.eval_shape(lambda: VideoClassifier(self.model, rngs=nnx.Rngs(0))))

    def init(self, key: Key[Array, ""]) -> dict:
        """Parameters of a classifier from scratch, a nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(VideoClassifier(self.model, rngs=nnx.Rngs(params=key)), nnx.Param))

    def clip_losses(
        self, params: dict, batch: Batch, root: Key[Array, ""], step: Int[Array, ""]
    ) -> Float[Array, " B"]:
        """Loss of each augmented, erased and mixed clip.

        Args:
            batch: `video` uint8 [B, T, H, W, C], `label` int32 [B] or `target` float32 [B, K], `weight`
                float32 [B], `index` uint32 [B] (global example index), `erase` int32 [B, 4].
        """
        model, c = nnx.merge(self.graphdef, params), self.model
        pixels = tubelets.normalize_pixels(batch["video"], c.pixel_mean, c.pixel_std)
        smoothing = 0.0 if self.by_heart else self.smoothing
        if c.head == "softmax":
            targets = losses.smoothed(batch["label"], len(c.classes), smoothing)
        else:
            targets = batch["target"]
        if self.by_heart:
            features = model.pooled(pixels, None, self.frozen)
            return losses.output_losses(model.head(features), targets, c.head, self.class_weights)
        if self.erasing > 0:
            pixels = tubelets.erase(pixels, batch["erase"], clip_keys(root, "erase", batch["index"]))
        if self.mix:
            key = jax.random.fold_in(stream(root, "mix"), step)
            drawn = mixup.draw(self.mix, pixels.shape[2], pixels.shape[3], key)
            pixels, targets = mixup.mix_clips(pixels, targets, batch["weight"], drawn)
        features = model.pooled(pixels, clip_keys(root, "drop_path", batch["index"]), self.frozen)
        features = heads.dropout(features, c.head_dropout, clip_keys(root, "dropout", batch["index"]))
        return losses.output_losses(model.head(features), targets, c.head, self.class_weights)

    def flops_per_clip(self) -> float:
        """Floating-point operations of a clip's forward and backward pass; see `vit.block_flops`."""
        c, tokens = self.model, math.prod(self.model.grid)
        embed = 2.0 * tokens * math.prod(c.tubelet) * c.channels * c.encoder.width
        block = vit.block_flops(c.encoder, tokens) / c.encoder.depth
        # What is frozen is computed once, forward; the gradient costs twice as much again.
        moving = (embed if not self.frozen else 0.0) + (c.encoder.depth - self.frozen) * block
        return 3 * moving + self.frozen * block + (embed if self.frozen else 0.0)

    def outputs(self, params: dict, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B K"]:
        """The head's outputs for plain clips."""
        return nnx.merge(self.graphdef, params).logits(video)

    @property
    def _clip(self) -> tuple[int, int, tuple[int, int]]:
        frames, height, width = self.model.clip_size
        return frames, self.stride, (height, width)

    @property
    def clip_transform(self) -> pipeline.FinetuneClip | pipeline.ValidationClip:
        """Record -> training clips."""
        if self.by_heart:
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
        frozen = f", {self.frozen} blocks frozen" if self.frozen else ""
        return (
            f"encoder {encoder.width}x{encoder.depth}{frozen}, {tokens} tubelets, "
            f"{len(self.model.classes)} classes ({self.model.head}), {self.model.compute.dtype}"
        )

    def validator(
        self, _train: sources.Source, validation: sources.Source, config: Config, mesh: Mesh
    ) -> Callable[[Any], dict[str, float]]:
        """(params) -> validation figures on the middle clip of each video, named `validation_...`."""
        clip = pipeline.ValidationClip(*self._clip)
        evaluator = testing.Evaluator(self.outputs, validation, clip, config, mesh)
        said: set[str] = set()

        def validate(params: Any) -> dict[str, float]:
            outputs = evaluator.run(params)
            for video in outputs.failed.keys() - said:
                report.say(f"bad video, validated without it: {outputs.failed[video]}")
            said.update(outputs.failed)
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
            is_luck = self.model.head == "softmax" and classification.is_at_chance(
                found["validation_top1"], scores.labels
            )
            return found | {"validation_at_chance": float(is_luck)}

        return validate

    def finish(
        self, state: TrainState, splits: Splits, config: Config, workdir: Place, mesh: Mesh
    ) -> dict[str, Any]:
        """The multi-view test of the best weights and of the last, as the paper tests them.

        Writes evaluation.json, predictions.csv and confusion.png of the best ones, which are tested first.

        Raises:
            UserError: there are no best weights.
            OutputError: weights whose outputs are not finite.
        """
        if self.by_heart:
            return {"learnt_by_heart": self._check_by_heart(state, splits, config, mesh)}
        views = self.test_views(config.evaluate.segments, config.evaluate.crops)
        evaluator = testing.Evaluator(self.outputs, splits.test, views, config, mesh)
        if not (workdir / "best").exists():
            raise UserError(
                f"no weights of this run can be tested: its validation was never finite, so there is no "
                f"{workdir / 'best'}: lower optim.lr or set optim.clip_norm, in another --workdir"
            )
        best: Any = nnx.to_pure_dict(nnx.state(export.load(workdir / "best"), nnx.Param))
        best = sharding.replicate(jax.device_get(best), mesh)
        result = {}
        for name, params in {"best": best, "last": state.params, "last_average": state.ema}.items():
            if params is not None:
                outputs = evaluator.run(params)
                whose = f"{name.replace('_', ' ')} weights"
                result[name] = summarize(outputs, splits.test, views, self.model.head, whose)
                report.say(f"test of the {whose}: {predictions.line(result[name])}")
                if name == "best" and hosts.is_writer():
                    scores = outputs.scores(splits.test, self.model.head)
                    predictions.write(workdir, result[name], scores, splits.test)
        return {"test": result}

    def _check_by_heart(
        self, state: TrainState, splits: Splits, config: Config, mesh: Mesh
    ) -> dict[str, float]:
        found = self.validator(splits.train, splits.train, config, mesh)(state.params)
        metric = KEY_METRIC[self.model.head]
        value, wanted = found[f"validation_{metric}"], 0.95 if metric == "r2" else 1.0
        if not value >= wanted:  # NaN too
            raise UserError(
                f"debug.overfit={config.debug.overfit}: the training clips are not learnt by heart ({metric} "
                f"{value:.3f}, not {wanted}): raise optim.lr, or look for labels that cannot be told apart"
            )
        return found


def summarize(
    outputs: testing.Outputs, source: sources.Source, views: pipeline.TestViews, head: str, whose: str
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        whose: what the outputs come from, in errors.

    Raises:
        UserError: no video could be decoded, or none of them has a label.
        OutputError: outputs that are not finite.
    """
    if not len(outputs.records):
        raise UserError(f"none of the {len(source)} videos in {source.root} can be decoded")
    if head == "softmax" and max(source.labels) < 0:
        raise UserError(f"no video in {source.root} has a label: list them with their labels")
    classification.check_finite(outputs.values, [source.ids[record] for record in outputs.records], whose)
    if outputs.short and views.segments > 1:
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
