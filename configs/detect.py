"""Action detection: what each boxed person does, by the published recipe for AVA or a better one.

    ./launch/local.sh train    --config=configs/detect.py:size=tiny,data=moving_shapes \\
        --config.init_from=runs/small --workdir=runs/det
    ./launch/local.sh evaluate --config=configs/detect.py:size=tiny,data=moving_shapes --workdir=runs/det
    ./launch/local.sh train    --config=configs/detect.py:size=base,data=FOLDER --config.init_from=WEIGHTS \\
        --workdir=runs/mine

FOLDER has classes.csv, train.csv, validation.csv and videos/ (docs/detect.md). Arguments:
size=tiny|small|base|large|huge; data=moving_shapes or data=FOLDER; recipe=published|mmaction;
start=pretrained|finetuned, what init_from holds; normalise=imagenet|official.

Tested every ten epochs, as published: --config.evaluate.every=1 for small collections.

Published rows (mAP on AVA 2.2 of Kinetics-400 weights, 16 x 4 frames, clips of 224 pixels, tests of whole
frames with a short side of 256):

    size   start        clips  lr      layer decay  epochs  mAP
    small  pretrained     128  1e-3           0.60      30  22.5
    small  finetuned      128  5e-4           0.60      30  28.4
    base   pretrained     128  2.5e-4         0.75      30  26.7
    base   finetuned      128  5e-4           0.75      30  31.8
    large  pretrained     128  2.5e-4         0.75      30  34.3
    large  finetuned      128  5e-4           0.80      20  37.0
    huge   either         128  5e-4           0.80      20  36.5, 39.5

recipe=mmaction is what MMAction2 found better, 33.6 for base from finetuned weights (trained there on
AVA-Kinetics): aligned pooling of 8 x 8, short sides of 256 to 320 and clips of 256, 64 clips, lr 5e-4 per 256
(1.25e-4), 20 epochs, gradients clipped at 40. Its background class, dropout and proposals are not taken over.

normalise=official is the published code's own (RGB mean 122.77, 115.95, 102.98 and 57.375 for all), which is
not what the backbone was trained with; imagenet is.

size=tiny, data=moving_shapes: minutes on two CPU cores after configs/small.py.
"""

from videomae_jax import config
from videomae_jax.models import detector, vit

# (size, start): lr, layer decay, epochs
_ROWS = {
    ("small", "pretrained"): (1e-3, 0.6, 30),
    ("small", "finetuned"): (5e-4, 0.6, 30),
    ("base", "pretrained"): (2.5e-4, 0.75, 30),
    ("base", "finetuned"): (5e-4, 0.75, 30),
    ("large", "pretrained"): (2.5e-4, 0.75, 30),
    ("large", "finetuned"): (5e-4, 0.8, 20),
    ("huge", "pretrained"): (5e-4, 0.8, 20),
    ("huge", "finetuned"): (5e-4, 0.8, 20),
}


def get_config(arg: str | None = None):
    """The settings of one row; see the module's text."""
    arg = config.parse_arg(
        arg, size="base", data="moving_shapes", recipe="published", start="pretrained", normalise="imagenet"
    )
    for name, known in (
        ("recipe", ("published", "mmaction")),
        ("start", ("pretrained", "finetuned")),
        ("normalise", ("imagenet", "official")),
    ):
        if getattr(arg, name) not in known:
            raise config.UserError(f"{name}={getattr(arg, name)} is unknown: use {' or '.join(known)}")
    if arg.size == "tiny" and (arg.recipe, arg.start) != ("published", "pretrained"):
        raise config.UserError("size=tiny has a recipe of its own: leave out recipe= and start=")
    c = config.defaults()
    c.task = "detect"
    c.data.path = arg.data
    c.model.position_resize = "interpolate"  # test frames have other grids; as published
    c.optim.update(betas=(0.9, 0.999), warmup=5, min_lr=1e-6)
    c.evaluate.every, c.checkpoint.every = 10, 1
    if arg.normalise == "official":
        c.model.update(pixel_mean=detector.PUBLISHED_MEAN, pixel_std=detector.PUBLISHED_STD)
    if arg.size == "tiny":
        _tiny(c)
        return c
    if (arg.size, arg.start) not in _ROWS:
        raise config.UserError(f"size={arg.size} is unknown: use tiny, small, base, large or huge")
    lr, layer_decay, epochs = _ROWS[arg.size, arg.start]
    c.model.encoder.update(vars(vit.SIZES[arg.size].encoder))
    c.model.drop_path = 0.2
    c.model.remat = "full" if arg.size in ("large", "huge") else "none"
    c.data.update(stride=4, batch_size=128)
    c.detect.boxes = 100
    c.optim.update(lr=lr, layer_decay=layer_decay, duration=epochs)
    if arg.recipe == "mmaction":
        c.data.update(size=(256, 256), batch_size=64)
        c.detect.update(bins=8, aligned=True, short=(256, 320), colours=False, boxes=32)
        c.optim.update(lr=5e-4, layer_decay=0.75, duration=20, min_lr=0.0, clip_norm=40.0)
    return c


def _tiny(c) -> None:
    c.model.tubelet = (2, 8, 8)
    c.model.encoder.update(vars(vit.SIZES["tiny"].encoder))
    c.data.generate.update(size=48, frames=24, videos=2048)
    c.data.update(frames=8, stride=2, size=(48, 48), batch_size=32)
    c.detect.update(boxes=4, short=(48, 52), test_short=48)
    c.augment.flip = False
    c.evaluate.update(every=1, batch_videos=32)
    c.optim.update(lr=0.012, min_lr=0.0, duration=8, warmup=1, clip_norm=1.0)
