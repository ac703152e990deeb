"""VideoMAE pretraining by the published recipes.

    ./launch/local.sh train --config=configs/pretrain.py:size=base,data=k400 \\
        --config.data.path=/data/kinetics400/train.csv --workdir=runs/k400_base

Arguments: size=small|base|large|huge and data=k400|ssv2|ucf101|hmdb51, or data=PATH (a folder or list of
your own, with the Kinetics recipe); epochs=800: a shorter run. Published rows (finetuned top-1 with the
paper's protocol; V1 code):

    data     size   batch  epochs  mask  stride  hardware   top-1
    k400     small   1024    1600   0.9       4  32 GPUs     79.0
    k400     base    2048    1600   0.9       4  64 V100     81.5   (epochs=800: 80.0, about 27 h)
    k400     large    512    1600   0.9       4  64 GPUs     85.2
    k400     huge    1024    1600   0.9       4  64 GPUs     86.6
    ssv2     small   2048    2400   0.9       2  64 GPUs     66.8
    ssv2     base    2048    2400   0.9       2  64 GPUs     70.8   (epochs=800: 69.6)
    ucf101   base     192    3200   0.75      4  8 GPUs      91.3   (about 30 h)
    hmdb51   base     192    4800   0.75      2  8 GPUs      62.6   (from the paper's text: no script)

Other pairs take the data set's recipe with the size's batch. As in the scripts, durations are one epoch
longer than their name says (1601 for 1600). The learning rate is optim.lr * batch / 256. The published code
neither flips nor clips gradients.
"""

from videomae_jax import config
from videomae_jax.models import vit

_BATCH = {"small": 1024, "base": 2048, "large": 512, "huge": 1024}  # on Kinetics-400
_DATA = {
    "k400": dict(path="data/k400", stride=4, ratio=0.9, epochs=1601, every=20, lr=1.5e-4),
    "ssv2": dict(path="data/ssv2", stride=2, ratio=0.9, epochs=2401, every=20, lr=1.5e-4),
    "ucf101": dict(path="data/ucf101", stride=4, ratio=0.75, epochs=3201, every=100, lr=3e-4),
    "hmdb51": dict(path="data/hmdb51", stride=2, ratio=0.75, epochs=4800, every=100, lr=3e-4),
}


def get_config(arg: str | None = None):
    """The settings of one row; see the module's text."""
    arg = config.parse_arg(arg, size="base", data="k400", epochs="")
    if arg.size not in _BATCH:
        raise config.UserError(f"size={arg.size} is unknown: use {', '.join(_BATCH)}")
    recipe = _DATA.get(arg.data, {**_DATA["k400"], "path": arg.data})
    if arg.epochs not in ("", "800") or (arg.epochs and arg.data in ("ucf101", "hmdb51")):
        raise config.UserError(f"epochs={arg.epochs} is unknown: 800 is for k400, ssv2 and data of your own")
    size = vit.SIZES[arg.size]
    batch_size = _BATCH[arg.size]
    if arg.data == "ssv2" and arg.size == "small":
        batch_size = 2048  # 64 x 32 in the script, though its comment says 32 GPUs
    if arg.data in ("ucf101", "hmdb51"):
        batch_size = 192

    c = config.defaults()
    c.model.encoder.update(vars(size.encoder))
    c.model.decoder.update(vars(size.decoder))
    c.model.remat = "full" if arg.size == "huge" else "none"
    c.mask.ratio = recipe["ratio"]
    c.data.update(path=recipe["path"], stride=recipe["stride"], batch_size=batch_size)
    c.optim.update(lr=recipe["lr"], min_lr=1e-5, duration=801 if arg.epochs else recipe["epochs"], warmup=40)
    c.checkpoint.every = recipe["every"]
    return c
