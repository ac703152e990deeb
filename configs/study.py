"""The runs of a study: every stage on generated digits, as small as its questions allow.

    ./launch/local.sh study --scale=laptop --workdir=runs/study          # all of them
    EXTRAS=study ./launch/local.sh train --config=configs/study.py:stage=pretrain --workdir=runs/mae
    EXTRAS=study ./launch/local.sh train --config=configs/study.py:stage=finetune,labels=10 \\
        --config.init_from=runs/mae --workdir=runs/ft

Arguments: stage=pretrain|contrast|latent|finetune|linear|attentive|knn; labels=N labelled videos per class
(0: all); steps=N; look=a|b: the domain (`videomae_jax.data.moving_digits`).

8 x 32 x 32 clips, 64 tubelets; pretraining sees a quarter of the places, pixels are its target. Chosen on the
validation part: see docs/evidence.md.
"""

from videomae_jax import config
from videomae_jax.models import vit

_STAGES = ("pretrain", "contrast", "latent", "finetune", "linear", "attentive", "knn")


def get_config(arg: str | None = None):
    """The settings of one stage; see the module's text."""
    arg = config.parse_arg(arg, stage="pretrain", labels="0", steps="", look="a")
    if arg.stage not in _STAGES:
        raise config.UserError(f"stage={arg.stage} is unknown: use {', '.join(_STAGES)}")
    for name in ("labels", "steps"):
        if not arg[name].isdecimal() and (arg[name] or name == "labels"):
            raise config.UserError(f"{name}={arg[name]} is no number")
    c = config.defaults()
    c.data.path = "moving_digits"
    c.data.generate.update(size=32, frames=24, videos=2048, look=arg.look)
    c.data.update(frames=8, stride=2, size=(32, 32))
    c.model.encoder.update(vars(vit.SIZES["tiny"].encoder))
    c.model.tubelet = (2, 8, 8)
    c.log.steps = 50
    if arg.stage in ("linear", "attentive", "knn"):
        _probe(c, arg.stage)
    else:
        {"pretrain": _pretrain, "contrast": _contrast, "latent": _latent, "finetune": _finetune}[arg.stage](c)
        c.optim.update(unit="steps", min_lr=0.0, clip_norm=1.0)
        c.optim.duration = int(arg.steps or c.optim.duration)
        c.optim.warmup = c.optim.duration // 20
        c.checkpoint.every = max(c.optim.duration // 4, 1)
    if arg.stage in ("finetune", "linear", "attentive", "knn"):
        c.data.max_videos_per_class = int(arg.labels)
        c.evaluate.update(segments=1, batch_videos=64)
    if arg.stage == "finetune":
        c.evaluate.update(crops=1, every=max(c.optim.duration // 4, 1))
    return c


def _pretrain(c) -> None:
    c.model.decoder.update(vars(vit.SIZES["tiny"].decoder))
    c.mask.ratio = 0.75
    c.loss.normalize_target = False
    c.log.statistics = "raw"
    # Two clips, with crops and masks of their own, of each video: decoding is half of the time here.
    c.data.update(batch_size=32, clips_per_video=2)
    c.optim.update(duration=5000, lr=0.048)


def _contrast(c) -> None:
    c.task = "contrast"
    c.contrast.update(hidden=512, width=64)
    c.data.update(clips_per_video=2, batch_size=64)
    c.augment.update(flip=False, area=(0.4, 1.0))
    c.optim.update(betas=(0.9, 0.999), duration=1200, lr=0.008)


def _latent(c) -> None:
    c.task = "latent"
    c.model.decoder.update(vars(vit.SIZES["tiny"].decoder))
    c.mask.update(kind="multi_block", ratio=0.75)
    c.loss.kind = "l1"
    c.data.batch_size = 32
    c.optim.update(duration=2500, lr=0.008)


def _finetune(c) -> None:
    c.task = "finetune"
    c.data.batch_size = 32
    c.augment.update(policy="", flip=False, area=(0.8, 1.0), erasing=0.0, mix_probability=0.0)
    c.optim.update(betas=(0.9, 0.999), duration=400, lr=0.008)


def _probe(c, kind: str) -> None:
    c.task = "probe"
    c.probe.kind = kind
    c.probe.num_heads = 4
    if kind == "attentive":
        c.probe.update(epochs=40, lr=1e-3, batch_size=64)
