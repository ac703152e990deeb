"""The one tree of settings: `defaults()` names every key with its unit, config files only edit them."""

import dataclasses
import math
import re
from typing import Any

import ml_collections

Config = Any
"""An `ml_collections.ConfigDict`, whose keys type checkers cannot see."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


TASKS = ("pretrain", "finetune", "probe")


class UserError(Exception):
    """Something only the user can put right: shown as one line, exit status 2."""


def defaults() -> Config:
    """Every setting there is, locked: editing a key that does not exist raises."""
    c: Config = ml_collections.ConfigDict()
    c.task = "pretrain"  # pretrain | finetune | probe
    c.seed = 0  # of initialisation, data order, augmentation, masks
    c.init_from = ""  # export, checkpoint or work folder whose backbone training starts from; "": none

    c.model = ml_collections.ConfigDict()
    c.model.tubelet = (2, 16, 16)  # voxels (t, p, p)
    c.model.encoder = dict(width=768, depth=12, num_heads=12, mlp_dim=3072)
    c.model.decoder = dict(width=384, depth=4, num_heads=6, mlp_dim=1536)
    c.model.pixel_mean = IMAGENET_MEAN  # per channel, of pixels in 0..1
    c.model.pixel_std = IMAGENET_STD
    c.model.position_resize = "recompute"  # table for other clip sizes: recompute | interpolate
    c.model.norm_epsilon = 1e-6
    c.model.layer_scale = 0.0  # initial factor; 0: none
    c.model.drop_path = 0.0  # largest rate, of the last block
    c.model.dtype = "auto"  # of matmuls: float32 | bfloat16 | auto (bfloat16 on GPU and TPU)
    c.model.unroll = 1  # blocks per loop iteration; the depth: fastest step, slowest compile
    c.model.remat = (
        "none"  # computed again in the backward pass, to save memory: none | dots (all but matmuls) | full
    )
    c.model.attention = "auto"  # xla | blocks (CPU) | cudnn (NVIDIA, bfloat16) | auto (what works best here)

    c.head = ml_collections.ConfigDict()
    c.head.kind = "softmax"  # softmax (one class a video) | multilabel | regression
    c.head.pooling = "mean"  # of tokens: mean | first
    c.head.dropout = 0.0
    c.head.scale = 0.001  # factor of its initial weights

    c.mask = ml_collections.ConfigDict()
    c.mask.kind = "tube"  # tube | random | frame
    c.mask.ratio = 0.9  # share of places hidden

    c.loss = ml_collections.ConfigDict()
    c.loss.kind = "mse"  # mse | l1 | smooth_l1
    c.loss.normalize_target = True  # per tubelet and channel; False: pixels in 0..1
    c.loss.smoothing = 0.1  # of the labels' distributions
    c.loss.class_weights = "none"  # none | balanced (inverse to the classes' numbers of videos)

    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # folder of videos, CSV list, prepared data, or moving_shapes
    c.data.root = ""  # folder where relative paths of a list start; "": the list's
    c.data.allow_missing = False  # leave out videos that a list names and that are not there
    c.data.frames = 16  # per clip
    c.data.stride = 4  # frames of the file from one frame of the clip to the next; 0: one of each equal part
    c.data.size = (224, 224)  # clip height and width, pixels
    c.data.batch_size = 256  # clips per step, over all hosts
    c.data.held_out = 16  # videos kept for validation, at most a tenth; unless there is a part for it
    c.data.max_videos_per_class = 0  # of the training videos, the first by name; 0: all
    c.data.max_bad_fraction = 0.001  # of the set's videos that may fail to decode before the run stops
    c.data.clips_per_video = 1  # crops, with masks of their own, of the same decoded frames
    c.data.workers = -1  # loader processes per host; 0: threads only; -1: by the usable cores
    c.data.threads = -1  # loader threads per process; -1: by the usable cores
    c.data.generate = dict(size=64, frames=32, videos=2048, seed=0)  # of moving_shapes

    c.augment = ml_collections.ConfigDict()
    c.augment.policy = "rand-m7-n4-mstd0.5-inc1"  # of RandAugment; "": none
    c.augment.flip = True  # mirror half of the clips; not where left and right matter
    c.augment.area = (0.08, 1.0)  # share of a frame that a crop takes
    c.augment.erasing = 0.25  # probability that a box of a clip becomes noise
    c.augment.mixup = 0.8  # parameter of the Beta distribution; 0: none
    c.augment.cutmix = 1.0  # likewise
    c.augment.mix_probability = 1.0  # that a batch is mixed
    c.augment.mix_switch = 0.5  # probability of CutMix where both are on

    c.optim = ml_collections.ConfigDict()
    c.optim.unit = "epochs"  # of duration, warmup and every other `every`: epochs | steps
    c.optim.duration = 800
    c.optim.warmup = 40
    c.optim.lr = 1.5e-4  # per 256 videos: the rate used is lr * (videos in a step) / 256, as published
    c.optim.min_lr = 1e-5  # per 256 videos, likewise
    c.optim.betas = (0.9, 0.95)
    c.optim.epsilon = 1e-8
    c.optim.weight_decay = 0.05
    c.optim.clip_norm = 0.0  # limit on the global gradient norm; 0: none
    c.optim.max_skipped = 20  # steps in a row without a usable gradient before the run stops
    c.optim.accumulate = 1  # microbatches that a batch is cut into: less memory, the same update
    c.optim.layer_decay = 1.0  # factor of the learning rate from a layer to the one below
    c.optim.freeze_blocks = 0  # the embedding and this many blocks stay as they are; 0: nothing
    c.optim.ema = 0.0  # decay of the average of the weights, which is then what counts; 0: none
    c.optim.patience = 0  # evaluations without improvement before training ends early; 0: never

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = (
        -1
    )  # devices that have copies of the state, each with rows of its own; -1: all that are left
    c.mesh.fsdp = 1  # devices that share one copy of the state, each with rows of its own
    c.mesh.tensor = 1  # devices that share a clip's heads and hidden units
    c.mesh.mapping = "jit"  # jit | pmap (one host, data only)
    c.mesh.step_limit = (
        1800  # seconds that a step may take before the process ends with a stack dump; 0: no limit
    )

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 20  # in optim.unit
    c.checkpoint.keep_last = 2  # checkpoints
    c.checkpoint.keep_every = 0  # in optim.unit: these are kept for ever; 0: none

    c.evaluate = ml_collections.ConfigDict()
    c.evaluate.every = 0  # in optim.unit; 0: only at the end. Pretraining: k-NN on labelled videos
    c.evaluate.split = "test"  # that the command tests: test | validation | all (of a path without parts)
    c.evaluate.segments = 5  # test clips spread over a video
    c.evaluate.crops = 3  # of each, spread over the frame's long side
    c.evaluate.batch_videos = 8  # over all hosts; rounded up to the devices
    c.evaluate.allow_failed = False  # report "N of M" instead of stopping where videos cannot be decoded
    c.evaluate.neighbours = 20  # of k-NN
    c.evaluate.temperature = 0.07  # of k-NN's votes
    c.evaluate.knn_videos = 4096  # training videos that k-NN looks among while pretraining, at most

    c.probe = ml_collections.ConfigDict()
    c.probe.kind = "linear"  # knn | linear | attentive
    c.probe.epochs = 100  # of linear and attentive
    c.probe.lr = 0.1  # per 256 videos
    c.probe.batch_size = 1024  # videos; at most all
    c.probe.num_heads = 12  # of attentive

    c.debug = ml_collections.ConfigDict()
    c.debug.overfit = 0  # learn this many videos by heart, without augmentation; must reach 100 %. 0: off

    c.log = ml_collections.ConfigDict()
    c.log.steps = 10  # steps from one logged step to the next
    c.log.profile = ""  # FIRST:LAST steps that a profile in WORKDIR/profile covers; "": none
    c.log.pictures = 4  # held-out clips drawn at the end
    c.log.statistics = "true"  # of those pictures: true | visible | raw (pixel targets: raw only)
    return c.lock()


# What may differ when a work folder is resumed: nothing that a result depends on.
_FREE_KEYS = re.compile(
    r"(log|checkpoint|mesh)\..*"
    r"|init_from|evaluate\.(split|batch_videos|allow_failed)"
    r"|model\.(unroll|remat|attention)"
    r"|data\.(path|root|allow_missing|workers|threads|max_bad_fraction)"  # a fingerprint compares the videos
    r"|optim\.max_skipped"
)


# Intervals that values lie in, every number of those that have several; "(" and ")" leave the end out.
_BOUNDS = {
    "(0, inf)": (
        *("model.norm_epsilon", "model.pixel_std", "optim.duration", "optim.lr", "optim.epsilon", "probe.lr"),
        *("checkpoint.every", "evaluate.temperature"),
    ),
    "[0, inf)": (
        *(
            "model.layer_scale",
            "head.scale",
            "augment.mixup",
            "augment.cutmix",
            "optim.warmup",
            "optim.min_lr",
        ),
        *("optim.weight_decay", "optim.clip_norm", "checkpoint.keep_every", "evaluate.every"),
        *(
            "data.stride",
            "data.held_out",
            "data.max_videos_per_class",
            "optim.freeze_blocks",
            "optim.patience",
        ),
        *("debug.overfit", "mesh.step_limit"),
    ),
    "[1, inf)": (
        *("model.tubelet", "model.encoder", "model.decoder", "model.unroll", "data.frames", "data.size"),
        *("data.batch_size", "data.clips_per_video", "data.generate.size", "data.generate.frames"),
        *("data.generate.videos", "mesh.fsdp", "mesh.tensor", "checkpoint.keep_last", "log.steps"),
        *("optim.max_skipped", "optim.accumulate", "evaluate.segments", "evaluate.crops", "log.pictures"),
        *("evaluate.batch_videos", "evaluate.neighbours", "evaluate.knn_videos", "probe.epochs"),
        *("probe.batch_size", "probe.num_heads"),
    ),
    "[-1, inf)": ("data.workers", "data.threads", "mesh.data"),
    "[0, 2147483647]": ("seed", "data.generate.seed"),
    "(0, 1)": ("mask.ratio",),
    "(0, 1]": ("augment.area", "optim.layer_decay"),
    "[0, 1)": ("model.drop_path", "head.dropout", "loss.smoothing", "optim.betas", "optim.ema"),
    "[0, 1]": (
        *("data.max_bad_fraction", "augment.erasing", "augment.mix_probability", "augment.mix_switch"),
    ),
}


def _check_numbers(values: dict[str, Any], untouched: dict[str, Any]) -> None:
    """Refuses a number that is not finite or lies outside its key's interval, and a wrong number of numbers.

    Raises:
        UserError: naming the key and what it may be.
    """
    intervals = {key: interval for interval, keys in _BOUNDS.items() for key in keys}
    for key, value in values.items():
        default = untouched[key]
        numbers = value if isinstance(value, list) else [value]
        if isinstance(default, list) and len(numbers) != len(default) and not key.startswith("model.pixel_"):
            example = f"({', '.join(map(str, default))})"
            raise UserError(f"{key}={value} must be {len(default)} numbers, such as {example}")
        if isinstance(default, str | bool):
            continue
        interval = intervals.get(key) or intervals.get(key.rpartition(".")[0], "(-inf, inf)")
        low, high = map(float, interval[1:-1].split(","))
        for number in numbers:
            is_above = number > low or (interval[0] == "[" and number == low)
            is_below = number < high or (interval[-1] == "]" and number == high)
            if not (is_above and is_below and math.isfinite(number)):
                raise UserError(f"{key}={value} is out of range: use finite numbers in {interval}")


_SPLITS = ("test", "validation", "all")

# Keys that only some tasks read; edited for another task they would say something that is not so.
_ONLY_FOR = (
    (r"model\.decoder\..*|mask\..*|loss\.(kind|normalize_target)|log\.(pictures|statistics)", ("pretrain",)),
    (r"head\.(dropout|scale)|augment\..*|loss\.(smoothing|class_weights)|debug\..*", ("finetune",)),
    (r"optim\.(layer_decay|freeze_blocks|ema|patience)", ("finetune",)),
    (r"head\..*|data\.max_videos_per_class|evaluate\.(segments|crops)", ("finetune", "probe")),
    (r"probe\..*", ("probe",)),
    (r"evaluate\.(neighbours|temperature)", ("pretrain", "probe")),
    (r"evaluate\.knn_videos", ("pretrain",)),
    (
        r"model\.(layer_scale|drop_path|remat)|optim\..*|checkpoint\..*|evaluate\.every",
        ("pretrain", "finetune"),
    ),
    (r"data\.(batch_size|clips_per_video)|mesh\.mapping|log\.profile", ("pretrain", "finetune")),
)


def resolve(config: Config) -> Config:
    """The settings as they are run: checked, and short and plain where `debug.overfit` asks for it.

    Refuses numbers that are out of range, and edited keys that the task does not read.

    Raises:
        UserError: naming the key.
    """
    if config.task not in TASKS:
        raise UserError(f"task={config.task!r} is unknown: use {', '.join(TASKS)}")
    values, untouched = flatten(config), flatten(defaults())
    _check_numbers(values, untouched)
    for pattern, tasks in _ONLY_FOR:
        for key in values:
            if re.fullmatch(pattern, key) and config.task not in tasks and values[key] != untouched[key]:
                raise UserError(
                    f"{key}={values[key]} is set, but only {' and '.join(tasks)} would read it, not "
                    f"{config.task}: leave it at {untouched[key]!r}"
                )
    if config.augment.area[0] > config.augment.area[1]:
        raise UserError(f"augment.area={config.augment.area} must be the smaller share, then the larger")
    if config.evaluate.split not in _SPLITS:
        raise UserError(f"evaluate.split={config.evaluate.split!r} is unknown: use {', '.join(_SPLITS)}")
    if not config.debug.overfit:
        return config
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
    """Lines "key: old -> new" for the settings that a result depends on."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "absent") != b.get(key, "absent") and not _FREE_KEYS.fullmatch(key)
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
    """What `finalize` derives: steps, and learning rates after the batch-256 rule."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    checkpoint_steps: int
    keep_steps: int
    evaluate_steps: int
    peak_lr: float
    end_lr: float


def finalize(config: Config, num_videos: int) -> Schedule:
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
            f"data.batch_size={batch_size} takes more than the {num_videos} videos of an epoch: lower it, or "
            f"count in steps (--config.optim.unit=steps)"
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
