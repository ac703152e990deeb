"""Finetuning a video classifier, or training it from scratch (arXiv 2203.12602)."""

import dataclasses

from jaxtyping import Array, Float, Int, Key

from videomae_jax.config import Config
from videomae_jax.data.sources import Source
from videomae_jax.models.layout import Layout
from videomae_jax.tasks import classify, losses
from videomae_jax.training.step import Batch, Terms


@dataclasses.dataclass(frozen=True)
class Finetune(classify.Classify):
    """Labels alone teach."""

    def terms(
        self,
        params: dict,
        others: None,
        batch: Batch,
        root: Key[Array, ""],
        step: Int[Array, ""],
        layout: Layout,
    ) -> Terms:
        """The loss of augmented, erased and mixed clips, a mean over clips; see `Task.terms`."""
        clip_losses = self.clip_losses(params, batch, root, step, layout)
        return Terms((batch["weight"] * clip_losses).sum(), batch["weight"].sum(), {})

    def clip_losses(
        self, params: dict, batch: Batch, root: Key[Array, ""], step: Int[Array, ""], layout: Layout
    ) -> Float[Array, " B"]:
        """The loss of each clip; see `Classify.mixed` for the fields of the batch."""
        model = self.module(params)
        pixels, targets = self.mixed(batch, root, step, layout)
        features = model.pooled(pixels, self.drop_path_keys(batch, root), layout, self.layers.frozen)
        outputs = self.logits(model, features, batch, root)
        return losses.output_losses(outputs, targets, self.model.head, self.class_weights)


def make(config: Config, train: Source | None, weights: str) -> Finetune:
    """The task that the settings name; see `task.Make`.

    Raises:
        UserError, ValueError: sizes and settings that do not fit together.
    """
    return Finetune(**classify.fields(config, train, weights))
