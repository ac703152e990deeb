"""The one tree of settings: `defaults()` has every key of `keys`, config files only edit them."""

import dataclasses
import math
import re
from typing import Any

import ml_collections

from videomae_jax.keys import KEYS, TASKS

Config = Any
"""An `ml_collections.ConfigDict`, whose keys type checkers cannot see."""


class UserError(Exception):
    """Something only the user can put right: shown as one line, exit status 2."""


def defaults() -> Config:
    """Every setting of `keys.KEYS`, locked: editing a key that does not exist raises."""
    config: Config = ml_collections.ConfigDict()
    for name, key in KEYS.items():
        *sections, last = name.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ml_collections.ConfigDict()
            node = node[section]
        node[last] = key.default
    return config.lock()


def _check_numbers(name: str, value: Any) -> None:
    """Refuses a number that is not finite or outside its key's bounds, and a wrong number of numbers."""
    key = KEYS[name]
    numbers = value if isinstance(value, list) else [value]
    default = key.default
    if isinstance(default, tuple) and len(numbers) != len(default) and not name.startswith("model.pixel_"):
        example = f"({', '.join(map(str, default))})"
        raise UserError(f"{name}={value} must be {len(default)} numbers, such as {example}")
    if isinstance(default, str | bool):
        return
    low, high = map(float, key.bounds[1:-1].split(","))
    for number in numbers:
        is_above = number > low or (key.bounds[0] == "[" and number == low)
        is_below = number < high or (key.bounds[-1] == "]" and number == high)
        if not (is_above and is_below and math.isfinite(number)):
            raise UserError(
                f"{name}={value} is out of range: use finite numbers in {key.bounds} ({key.meaning})"
            )


_SPLITS = ("test", "validation", "all")


def checked(config: Config) -> Config:
    """The settings as they are run: checked, and short and plain where `debug.overfit` asks for it.

    Refuses numbers that are out of range, and edited keys that the task does not read.

    Raises:
        UserError: naming the key.
    """
    if config.task not in TASKS:
        raise UserError(f"task={config.task!r} is unknown: use {', '.join(TASKS)}")
    values, untouched = flatten(config), flatten(defaults())
    for name, value in values.items():
        _check_numbers(name, value)
        readers = KEYS[name].read_by
        if config.task not in readers and value != untouched[name]:
            raise UserError(
                f"{name}={value} is set, but only {' and '.join(readers)} would read it, not {config.task}: "
                f"leave it at {untouched[name]!r}"
            )
    if config.augment.area[0] > config.augment.area[1]:
        raise UserError(f"augment.area={config.augment.area} must be the smaller share, then the larger")
    if config.evaluate.split not in _SPLITS:
        raise UserError(f"evaluate.split={config.evaluate.split!r} is unknown: use {', '.join(_SPLITS)}")
    if config.optim.patience and not config.evaluate.every:
        raise UserError("optim.patience counts validations: set --config.evaluate.every too")
    return _overfitting(config) if config.debug.overfit else config


def _overfitting(config: Config) -> Config:
    """The settings of a short run on `debug.overfit` clips."""
    short, videos = config.copy_and_resolve_references(), config.debug.overfit
    short.data.update(batch_size=videos, clips_per_video=1)
    short.optim.update(unit="steps", duration=300, warmup=20, accumulate=1, ema=0.0, patience=0)
    short.optim.lr = config.optim.lr * 256 / videos  # so few clips would make the rate tiny
    short.evaluate.every, short.checkpoint.every, short.checkpoint.keep_every = 50, 300, 0
    return short


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": ..., ...} for comparing and printing."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(old: dict, new: dict) -> list[str]:
    """Lines "key: old -> new" for the settings that a result depends on.

    A key that was not there yet had the effect of its default.
    """
    a, b = {name: key.default for name, key in KEYS.items()}, flatten(new)
    a = {name: list(value) if isinstance(value, tuple) else value for name, value in a.items()} | flatten(old)
    return [
        f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "absent") != b.get(key, "absent") and not (key in KEYS and KEYS[key].is_free)
    ]


def parse_arg(arg: str | None, **known: str) -> Config:
    """The part after the colon of `--config=FILE:size=base,data=PATH`, over defaults `known`.

    Raises:
        UserError: a name that is not among `known`, or text that is not name=value.
    """
    values = dict(known)
    for item in re.split(r",(?=\w+=)", arg) if arg else []:
        name, equals, value = item.partition("=")
        if not equals or name not in known:
            usage = ",".join(f"{name}={value or '...'}" for name, value in known.items())
            raise UserError(f"config argument {item!r} is not understood: use {usage}")
        values[name] = value
    return ml_collections.ConfigDict(values)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What `make_schedule` derives: steps, and learning rates after the batch-256 rule."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int
    keep_steps: int
    evaluate_steps: int
    peak_lr: float
    end_lr: float


def unknown(name: str) -> str:
    """What to say of a setting that is not where it was looked for."""
    same = [f"--config.{key}" for key in KEYS if key.rpartition(".")[2] == name]
    known = f"use {' or '.join(same)}" if same else "videomae_jax/keys.py has all there are"
    return f"there is no setting {name} there: {known}"


def make_schedule(config: Config, num_videos: int) -> Schedule:
    """Turns epochs into steps and scales the learning rates, once.

    A step takes batch_size / clips_per_video videos, an epoch floor(videos / that) steps. The learning rate
    follows the videos, not the clips, of a step, as published.

    Raises:
        UserError: an unknown unit, a duration without a step, or a warm-up that outlasts it.
    """
    optim, batch_size = config.optim, config.data.batch_size
    if batch_size % config.data.clips_per_video:
        raise UserError(
            f"data.batch_size={batch_size} counts clips: make it a multiple of data.clips_per_video="
            f"{config.data.clips_per_video}"
        )
    batch_videos = batch_size // config.data.clips_per_video
    if optim.unit not in ("epochs", "steps"):
        raise UserError(f"optim.unit={optim.unit!r} is unknown: use epochs or steps")
    per_epoch = num_videos // batch_videos
    if optim.unit == "epochs" and per_epoch == 0:
        raise UserError(
            f"a step takes {batch_videos} videos (data.batch_size={batch_size} clips), an epoch has "
            f"{num_videos}: set --config.data.batch_size={num_videos * config.data.clips_per_video} or less, "
            f"or count in steps (--config.optim.unit=steps)"
        )
    unit = per_epoch if optim.unit == "epochs" else 1
    total, warmup = int(optim.duration * unit), int(optim.warmup * unit)
    if not 0 <= warmup <= total or total == 0:
        raise UserError(
            f"optim.warmup={optim.warmup} and optim.duration={optim.duration} {optim.unit} give {warmup} of "
            f"{total} steps: the duration must be positive and not below the warm-up"
        )
    if total * batch_size >= 2**32:
        raise UserError(f"{total} steps of {batch_size} clips pass the limit of 2^32 clips in a run")
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if every <= 0 or keep_every % every:
        raise UserError(
            f"checkpoint.every={every} must be positive and divide checkpoint.keep_every={keep_every}"
        )
    scale = batch_videos / 256
    return Schedule(
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        checkpoint_steps=max(int(every * unit), 1),
        keep_steps=int(keep_every * unit),
        evaluate_steps=max(int(config.evaluate.every * unit), 1) if config.evaluate.every else 0,
        peak_lr=optim.lr * scale,
        end_lr=optim.min_lr * scale,
    )
