"""A small video classifier that learns from a large one: consistent teaching, on the same mixed clips.

    ./launch/local.sh train --config=configs/distill.py:size=small,data=k400,teacher=GIANT --workdir=runs/x
    ./launch/local.sh train --config=configs/distill.py:size=tiny,data=moving_shapes,teacher=runs/ft \\
        --workdir=runs/distilled_tiny

Arguments: teacher=WEIGHTS of a classifier of the same classes, of any layout, size and number of frames;
size=tiny|small|base; data=k400|k600|k710|ssv2|ucf101|hmdb51|moving_shapes
or data=PATH. Set --config.init_from to a pretrained
backbone.

VideoMAE V2 distilled its giant model into small (K400 83.7) and base (86.6) while it finetuned on
Kinetics-710; it published neither temperature nor duration. These follow its base row for finetuning,
temperature 1 and no labels (--config.distill.hard_weight adds them, --config.distill.feature_weight compares
layers too).
"""

from videomae_jax import config
from videomae_jax.models import vit

# stride, segments of the test, whether clips are mirrored
_DATA = {
    **dict.fromkeys(("k400", "k600", "k710", "ucf101"), (4, 5, True)),
    "ssv2": (0, 2, False),
    "hmdb51": (2, 5, True),
}
_SIZES = ("tiny", "small", "base")


def get_config(arg: str | None = None):
    """The settings; see the module's text."""
    arg = config.parse_arg(arg, size="small", data="k400", teacher="")
    if arg.size not in _SIZES:
        raise config.UserError(f"size={arg.size} is unknown: use {', '.join(_SIZES)}")
    stride, segments, flip = _DATA.get(arg.data, _DATA["k400"])
    c = config.defaults()
    c.task, c.teacher = "distill", arg.teacher
    c.model.encoder.update(vars(vit.SIZES[arg.size].encoder))
    c.data.path = f"data/{arg.data}" if arg.data in _DATA else arg.data
    c.data.update(stride=stride, clips_per_video=2, batch_size=1024, held_out=100_000)
    c.augment.flip = flip
    c.model.drop_path = 0.1
    c.optim.update(betas=(0.9, 0.999), lr=7e-4, min_lr=1e-6, duration=90, warmup=5, layer_decay=0.75)
    c.checkpoint.every = 1
    c.evaluate.update(every=1, segments=segments)
    if arg.size == "tiny":
        c.model.tubelet = (2, 8, 8)
        c.model.drop_path = 0.0
        c.data.generate.update(size=48, frames=24, videos=2048)
        c.data.update(frames=8, stride=3, size=(48, 48), batch_size=32, clips_per_video=1)
        c.augment.update(policy="", flip=False, area=(0.8, 1.0), erasing=0.0, mix_probability=0.0)
        c.optim.update(lr=0.024, min_lr=0.0, duration=25, warmup=1, clip_norm=1.0, layer_decay=1.0)
        c.evaluate.update(segments=2, crops=1, batch_videos=16)
    return c
