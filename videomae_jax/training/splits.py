"""The videos of a run: training, validation and test, and what training on their labels needs of them."""

import dataclasses
import pathlib

import numpy as np

from videomae_jax import storage
from videomae_jax.config import Config, UserError
from videomae_jax.data import generated, moving_digits, moving_shapes, prepared, processes, sources
from videomae_jax.data.sources import Source, SourceError
from videomae_jax.keys import KEYS, PROBES
from videomae_jax.training import report


@dataclasses.dataclass(frozen=True)
class Splits:
    """Videos by use, labelled by `train.classes`; without a labelled part `test` is `validation`."""

    train: Source
    validation: Source
    test: Source

    @property
    def tested(self) -> str:
        """The part that `test` is: "test", or the one in its place."""
        if self.test is not self.validation:
            return "test"
        return "train" if self.validation is self.train else "validation"


def open_splits(config: Config, needs_labels: bool = True) -> Splits:
    """The videos of `data.path`; generates those that have a name, says what is left out.

    Where there is no validation part, it is taken from the training videos, for the test part must not choose
    weights; a set too small for that has its training videos in its place.

    Raises:
        SourceError: nothing to read, or a class that the training videos lack.
        UserError: no path; labels that are missing though they are needed.
    """
    data, path = config.data, _path(config)
    train = _open(config, path, "train", needs_labels)
    if prepared.has_split(path, "validation"):
        validation = _open(config, path, "validation", needs_labels)
    elif prepared.has_split(path, "test") and config.task in PROBES:  # which choose nothing by it
        validation = _open(config, path, "test")
    else:
        train, validation = sources.hold_out(train, data.held_out)
        if not len(validation):
            instead = "pictures show training clips" if not needs_labels else "training videos validate"
            few = f"{len(train)} videos are too few to hold any out"
            report.say(f"{few if data.held_out else 'data.held_out=0'}: {instead}")
            validation = train
        elif needs_labels:
            report.say(f"{path} has no validation part: {len(validation)} training videos are kept for it")
    if not needs_labels:
        return Splits(train, validation, validation)
    if not train.targets and max(train.labels) < 0:
        raise UserError(
            f"{path}: no training video has a label: put each video into the folder of its class, or list it "
            f"with its label"
        )
    if not validation.targets and max(validation.labels) < 0:
        raise UserError(f"{path}: no validation video has a label: validation needs some that do")
    has_test = prepared.has_split(path, "test")
    if not has_test:
        why = "no video of the test part is there" if prepared.is_empty(path, "test") else "no test part"
        part = "training" if validation is train else "validation"
        report.say(f"{path}: {why}, so the {part} videos are tested, by which the best weights are chosen")
    test = _open(config, path, "test") if has_test else validation
    if not test.targets and max(test.labels) < 0:
        report.say(f"{path}: the test part has no labels, so the validation part is tested")
        test = validation
    train = _few(train, data.max_videos_per_class)
    if config.debug.overfit:
        train = train.select(spread(len(train), config.debug.overfit))
        validation = test = train
    elif config.head.kind != "regression":
        _check_labels(path, train)
    for part, source in {"validation": validation, "test": test}.items():
        if config.head.kind == "multilabel" and not np.any(source.targets):
            raise UserError(f"{path}: no {part} video has a class, so there is no figure of that part")
    parts = Splits(train, sources.relabel(validation, train.classes), sources.relabel(test, train.classes))
    return dataclasses.replace(parts, test=parts.validation) if test is validation else parts


def open_all(config: Config) -> Source:
    """Every video of a `data.path` without parts. Raises as `open_splits`."""
    path = _path(config)
    if prepared.has_split(path, "train"):
        raise UserError(f"{path} is divided: evaluate.split=all is for a folder or list that is not")
    return _open(config, path, "train")


def _open(config: Config, path: str, split: str, needs_labels: bool = True) -> Source:
    """A part of the videos; says what the user should know of it."""
    how = (config.data.root, config.data.allow_missing)
    try:
        source = prepared.open_source(path, split, config.head.kind, *how)
    except SourceError as error:
        if needs_labels:
            raise
        source = prepared.open_source(path, split, "", *how)  # raises again what is not of labels
        report.say(f"{path}: its labels are not read, which are not one class a video ({error})")
    for note in source.notes:
        report.say(note)
    return source


def _path(config: Config) -> str:
    if not config.data.path:
        raise UserError(
            "data.path is empty: name a folder of videos, a CSV list, prepared data, moving_shapes or "
            "moving_digits"
        )
    is_generated = config.data.path in generated.NAMES
    return str(_generated(config.data.path, config.data.generate)) if is_generated else config.data.path


def shapes(generate: Config) -> moving_shapes.MovingShapes:
    """What to generate of moving_shapes, for any task.

    Raises:
        ValueError: settings that it does not have.
    """
    if generate.look != KEYS["data.generate.look"].default:
        raise ValueError(f"look={generate.look!r} is of moving_digits: moving_shapes has one look")
    return moving_shapes.MovingShapes(generate.size, generate.frames, generate.videos, generate.seed)


def spread(total: int, count: int) -> list[int]:
    """At most `count` of `total` places, evenly spread, so that every class folder has its share."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def _few(train: Source, per_class: int) -> Source:
    """At most `per_class` videos of each class, chosen by the hash of their ids; all for 0.

    Raises:
        UserError: videos of several classes or of none.
    """
    if not per_class:
        return train
    if train.targets:
        raise UserError("data.max_videos_per_class is for head.kind=softmax, where a video has one class")
    labels, hashes = np.asarray(train.labels), train.hashes()
    kept: list[int] = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        kept += of_class[np.argsort(hashes[of_class], kind="stable")[:per_class]].tolist()
    return train.select(sorted(kept))


def _check_labels(path: str, train: Source) -> None:
    """Refuses training videos without labels, and classes without training videos."""
    if train.targets:
        used = {name for name, *column in zip(train.classes, *train.targets, strict=True) if any(column)}
    else:
        if min(train.labels) < 0:
            first = train.ids[train.labels.index(-1)]
            raise UserError(
                f"{path}: {train.labels.count(-1)} of {len(train)} training videos have no label, the first "
                f"is {first}: put each video into the folder of its class, or list it with its label"
            )
        used = {train.classes[label] for label in train.labels}
    empty = sorted(set(train.classes) - used)
    if empty:
        raise UserError(
            f"{path}: {len(empty)} of {len(train.classes)} classes have no training video, the first is "
            f"{empty[0]!r}: add videos, or leave the class out"
        )
    if len(train.classes) == 1 and not train.targets:
        raise UserError(f"{path} has one class, {train.classes[0]!r}: a classifier needs two or more")


def _generated(name: str, generate: Config) -> pathlib.Path:
    folder, cores = storage.cache(), processes.usable_cores()
    report.say(f"{name}: {generate.videos} training videos, cached in {folder}")
    try:
        if name == "moving_digits":
            return moving_digits.generate(moving_digits.MovingDigits(**generate), folder, cores)
        return moving_shapes.generate(shapes(generate), folder, cores)
    except ValueError as error:
        raise UserError(f"data.generate: {error}") from None
