"""The table of methods: the only place that knows them all."""

from typing import Any

from videomae_jax import config as settings
from videomae_jax import hosts
from videomae_jax.config import Config, UserError
from videomae_jax.data.sources import Source
from videomae_jax.interop import weights
from videomae_jax.storage import Place
from videomae_jax.tasks import (
    backbone,
    contrast,
    detect,
    distill,
    evaluate,
    finetune,
    latent,
    pretrain,
    probe,
)
from videomae_jax.training import compute, loop
from videomae_jax.training.task import Make, Task

METHODS: dict[str, Make] = {
    "pretrain": pretrain.make,
    "latent": latent.make,
    "contrast": contrast.make,
    "finetune": finetune.make,
    "distill": distill.make,
    "detect": detect.make,
}
"""Those that train a model step by step."""


def train(config: Config, workdir: Place, started: float) -> dict[str, Any]:
    """Runs what `config.task` names; returns the summary. Raises as `loop.run` and `probe.run`."""
    config = compute.on_this_machine(settings.checked(config))
    if config.task == "probe":
        with hosts.Lock(workdir / ".lock"):
            return probe.run(config, workdir, started)
    return loop.run(config, workdir, started, make_task)


def evaluate_weights(config: Config, workdir: Place, checkpoint: str, hints: weights.Hints) -> dict[str, Any]:
    """The command `evaluate`: tests trained weights. Raises as `evaluate.run` and `detect.evaluate`."""
    if config.task == "detect":
        return detect.evaluate(config, workdir, checkpoint, hints)
    return evaluate.run(config, workdir, checkpoint, hints)


def make_task(config: Config, train: Source | None = None, weights: str = "") -> Task:
    """The task that a config names; see `task.Make`.

    Raises:
        UserError: sizes and settings that do not fit together.
    """
    if config.task not in METHODS:
        raise UserError(f"task={config.task} trains no model step by step: there is nothing to plan or try")
    try:
        task = METHODS[config.task](config, train, weights)
    except ValueError as error:
        raise UserError(str(error)) from None
    backbone.check_tensor(config, task.model)
    return task
