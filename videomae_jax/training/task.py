"""The seam between methods and the machinery of steps: all that a method says of itself."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from videomae_jax.config import Config, Schedule
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.models.layout import Layout
from videomae_jax.models.vit import AnyConfig
from videomae_jax.storage import Place
from videomae_jax.training import optim, splits
from videomae_jax.training.splits import Splits
from videomae_jax.training.step import Batch, Terms, TrainState

Validate = Callable[[Any, int], dict[str, float]]
"""(parameters, steps done) -> figures, named `validation_...` or as the method has them."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run was told, and what it works on."""

    config: Config
    workdir: Place
    videos: Splits
    schedule: Schedule
    mesh: Mesh


class Task(abc.ABC, Generic[AnyConfig]):
    """A method at work on one model; a frozen dataclass of plain values, which compiled functions close over.

    Attributes:
        model: sizes and arithmetic of the model that is trained.
        clips_per_video: clips that the loader makes of each video.
        needs_labels: whether training and validation read labels.
        exported: parts of the parameters that make the model that others load; (): all of them.
        last_phase: what `finish` does, in the seconds of summary.json.
    """

    model: AnyConfig
    clips_per_video: int
    needs_labels: ClassVar[bool] = False
    exported: ClassVar[tuple[str, ...]] = ()
    last_phase: ClassVar[str] = "end"

    def open_videos(self, config: Config) -> Splits:
        """The videos of a run.

        Raises:
            UserError, SourceError: as `splits.open_splits`.
        """
        return splits.open_splits(config, self.needs_labels)

    @abc.abstractmethod
    def init(self, key: Key[Array, ""]) -> dict:
        """Parameters from nothing: a nested dict of float32 arrays, whose names STATE_RULES know."""

    def others(self, params: dict) -> Any:
        """Trees beside the parameters before the first step: placed, stored, donated, without gradient."""
        return None

    def start(self, config: Config, names: list[str]) -> dict[str, np.ndarray]:
        """Values that training starts from, by the names of the state ("params/...", "others/...").

        Args:
            names: of all parameters and others.

        Raises:
            UserError: weights that do not fit.
        """
        return {}

    @abc.abstractmethod
    def terms(
        self,
        params: dict,
        others: Any,
        batch: Batch,
        root: Key[Array, ""],
        step: Int[Array, ""],
        layout: Layout,
    ) -> Terms:
        """What this device's rows add to the loss.

        Args:
            batch: `video` uint8 [B, T, H, W, C], `weight` float32 [B] (0: not decoded), `index` uint32 [B]
                (global example index), and the fields that `clip_transform` adds.
            root: of everything random; see `step.stream` and `step.clip_keys`.
        """

    def follow(self, others: Any, params: dict, progress: Array) -> Any:
        """The trees beside the parameters after an update; `progress` is the share of all steps done."""
        return others

    @property
    def rate_factors(self) -> Callable[[Any], Any] | None:
        """(parameters) -> factor of each leaf's learning rate; None: 1 for all."""
        return None

    def decays(self, params: Any) -> Any:
        """Whether weight decay applies to each leaf."""
        return optim.decay_mask(params)

    def warning(self, values: dict[str, float]) -> str:
        """What a user should hear of the metrics of a step, once; "": nothing."""
        return ""

    def check_batch(self, config: Config, parts: int) -> None:
        """Refuses a batch that the method cannot work with; `parts` are devices times microbatches.

        Raises:
            UserError: naming a size that would do.
        """

    @property
    @abc.abstractmethod
    def clip_transform(self) -> pipeline.ClipTransform:
        """Record -> training clips."""

    @property
    def best_by(self) -> str:
        """The validation figure, without `validation_`, whose best weights are kept; "": none are."""
        return ""

    @abc.abstractmethod
    def validator(self, run: Run) -> Validate:
        """Validation every `evaluate.every`, and where there is a best at the end.

        Raises:
            UserError: videos that it cannot work with.
        """

    @abc.abstractmethod
    def finish(self, run: Run, state: TrainState) -> dict[str, Any]:
        """What is left to do after the last step; returns what it adds to the summary."""

    @abc.abstractmethod
    def flops_per_clip(self) -> float:
        """Floating-point operations of a clip's forward and backward pass; see `vit.block_flops`."""

    @abc.abstractmethod
    def metadata(self) -> dict[str, Any]:
        """What is stored beside the parameters."""

    @abc.abstractmethod
    def describe(self) -> str:
        """The model in half a line."""


Make = Callable[[Config, Source | None, str], Task]
"""(settings, training videos, weights) -> the task.

Without videos only settings are checked; weights are what a backbone is taken from ("": a fresh one).
"""
