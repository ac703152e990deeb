"""The command `evaluate`: the multi-view test of a trained classifier, as published."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from videomae_jax import config as settings
from videomae_jax import hosts, storage
from videomae_jax.apps import predictions
from videomae_jax.config import Config, UserError
from videomae_jax.data import sources
from videomae_jax.interop import export, weights
from videomae_jax.keys import CLASSIFIERS
from videomae_jax.models.detector import DetectorConfig
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.storage import Place
from videomae_jax.tasks import backbone, classify, finetune
from videomae_jax.training import compute, report, splits, testing


def run(
    config: Config, workdir: Place, checkpoint: str, hints: weights.Hints | None = None
) -> dict[str, Any]:
    """Tests a classifier on `evaluate.split` and writes evaluation.json, predictions.csv and confusion.png.

    Args:
        checkpoint: export, checkpoint, work folder, or file; "" for WORKDIR/best, or WORKDIR without one.
        hints: what a file does not tell.

    Raises:
        UserError: no classifier, videos that cannot be decoded (unless allowed), or settings that do not fit.
        SourceError: videos of a class that the classifier does not know.
        OutputError: outputs that are not finite, naming the first video.
    """
    config = compute.on_this_machine(settings.checked(config))
    if config.task not in CLASSIFIERS:
        raise UserError(f"evaluate tests classifiers and detectors, not task={config.task}: use their config")
    is_best = not checkpoint and (workdir / "best").is_dir()
    path = checkpoint or str(workdir / "best" if is_best else workdir)
    hints = backbone.hints(config, hints)
    made = _checked(weights.read_config(path, hints), config, path)
    try:
        planned = finetune.make(config, None, "")
    except ValueError as error:
        raise UserError(str(error)) from None
    source, part = hosts.agreed(lambda: _source(config, made, path))
    hosts.check_agreement(config, [source], workdir, checkpoint=str(path))
    # The weights decide what they are; the settings, how large clips are and how they are computed.
    use = {name: getattr(planned.model, name) for name in ("clip_size", "position_resize", "compute")}
    use["position_grid"] = backbone.trained_grid(config, made)
    task = dataclasses.replace(planned, model=dataclasses.replace(made, **use))
    mesh = compute.make_mesh(config)
    if trouble := storage.trouble(storage.at(workdir)):
        raise UserError(f"{trouble}: choose another --workdir")
    _warn_of_differences(made, weights.read_recipe(path, hints), config, path)
    views = task.test_views(config.evaluate.segments, config.evaluate.crops)
    report.say(
        f"evaluate: {len(source)} videos, {views.segments} x {views.crops} views, {path}, {task.describe()}"
    )
    params: Any = jax.device_get(nnx.to_pure_dict(nnx.state(weights.read(path, hints), nnx.Param)))
    hosts.check_weights(params)
    outputs = testing.Evaluator(task.outputs, source, views, config, mesh).run(params)
    allowed = config.evaluate.allow_failed
    result = classify.summarize(outputs, source, views, made.head, path, allowed) | {
        "checkpoint": str(path),
        "split": part,
    }
    if hosts.is_writer():
        workdir.mkdir(parents=True, exist_ok=True)
        predictions.write(workdir, result, outputs.scores(source, made.head), source)
    report.say(f"{predictions.line(result)}; see {workdir / 'evaluation.json'}")
    return result


def _checked(made: export.ModelConfig, config: Config, path: str) -> ClassifierConfig:
    """The config of the model in `path`, if it is a classifier as the settings say."""
    if isinstance(made, DetectorConfig):
        raise UserError(f"{path} holds a detector, not a classifier: test it with --config=configs/detect.py")
    if not isinstance(made, ClassifierConfig):
        raise UserError(
            f"{path} holds a pretraining model, which has no trained head: finetune it first (train "
            f"--config=configs/finetune.py --config.init_from={path})"
        )
    if made.head != config.head.kind:
        raise UserError(
            f"the model in {path} has a {made.head} head, the settings say {config.head.kind}: set "
            f"--config.head.kind={made.head}"
        )
    return made


def _warn_of_differences(made: ClassifierConfig, recipe: dict[str, Any], config: Config, path: str) -> None:
    """Says where a test is not as the training was."""
    if made.position_resize == "interpolate" != config.model.position_resize:
        report.say(
            f"warning: {path} was trained with an interpolated position table and is tested with a "
            f"recomputed one: --config.model.position_resize=interpolate tests it as it was trained"
        )
    trained = recipe.get("stride", config.data.stride)
    if trained != config.data.stride:
        report.say(
            f"warning: {path} was trained with data.stride={trained} (0: one frame of each part) and is "
            f"tested with {config.data.stride}: --config.data.stride={trained} tests it as it was trained"
        )


def _source(config: Config, made: ClassifierConfig, path: str) -> tuple[sources.Source, str]:
    """The videos to test, labelled by the classes of the model; and the part that they are."""
    part = config.evaluate.split
    if part == "all":
        source = splits.open_all(config)
    else:
        videos = splits.open_splits(config)
        source = videos.test if part == "test" else videos.validation
        part = videos.tested if part == "test" else part
    missing = set(source.classes) - set(made.classes)
    if missing and len(source.classes) != len(made.classes) and config.evaluate.split != "all":
        raise UserError(
            f"{config.data.path} has {len(source.classes)} classes, the model in {path} "
            f"{len(made.classes)}, and {min(missing)!r} is not among them: use the data set of its training"
        )
    return sources.relabel(source, made.classes, f"the model in {path}"), part
