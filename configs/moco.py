"""MoCo v3 (arXiv 2104.02057) on videos: the baseline that VideoMAE's paper compares with.

    ./launch/local.sh train --config=configs/moco.py:size=base,data=k400 --workdir=runs/moco
    ./launch/local.sh train --config=configs/moco.py:size=tiny,data=moving_shapes --workdir=runs/moco_tiny

Arguments: size=tiny|small|base|large; data=k400|ssv2|ucf101|hmdb51|moving_shapes or data=PATH. The paper
trains 300 epochs on SSv2 and says no more of its video recipe, so this one is ours: the image method's heads,
loss, views, optimizer and momentum, two clips of a video at independent times, the mean of all tokens as
representation.
docs/parity.md lists it line by line. --config.evaluate.every=10 looks at neighbours meanwhile (knn_top1).

size=tiny is for generated data on a laptop, and looks at neighbours: no mirroring and mild crops, for classes
are directions.
"""

from videomae_jax import config
from videomae_jax.models import vit

# stride, whether clips are mirrored
_DATA = {"k400": (4, True), "ssv2": (2, False), "ucf101": (4, True), "hmdb51": (2, True)}
_SIZES = ("tiny", "small", "base", "large")


def get_config(arg: str | None = None):
    """The settings; see the module's text."""
    arg = config.parse_arg(arg, size="base", data="k400")
    if arg.size not in _SIZES:
        raise config.UserError(f"size={arg.size} is unknown: use {', '.join(_SIZES)}")
    stride, flip = _DATA.get(arg.data, _DATA["k400"])
    c = config.defaults()
    c.task = "contrast"
    c.model.encoder.update(vars(vit.SIZES[arg.size].encoder))
    c.data.path = f"data/{arg.data}" if arg.data in _DATA else arg.data
    c.data.update(stride=stride, clips_per_video=2, batch_size=2 * 4096)
    c.augment.update(flip=flip, area=(0.08, 1.0))
    c.optim.update(betas=(0.9, 0.999), lr=1.5e-4, min_lr=0.0, weight_decay=0.1, duration=300, warmup=40)
    if arg.size == "tiny":
        c.model.tubelet = (2, 8, 8)
        c.contrast.update(hidden=512, width=64)
        c.data.generate.update(size=48, frames=24, videos=2048)
        c.data.update(frames=8, stride=2, size=(48, 48), batch_size=64)
        c.augment.update(flip=False, area=(0.4, 1.0))
        c.optim.update(lr=4e-3, weight_decay=0.05, duration=10, warmup=1)
        c.evaluate.update(every=2, batch_videos=16)
        c.checkpoint.every = 2
    return c
