"""VideoMAE V2 pretraining (arXiv 2303.16727): dual masking, four clips of each decoded video.

    ./launch/local.sh train --config=configs/pretrain_v2.py:size=giant,data=hybrid.csv --workdir=runs/v2_g

Arguments: size=small|base|large|huge|giant; data=PATH (the authors' list is not public: 1.35 million clips of
Kinetics-710, SSv2, AVA, WebVid and others). Published rows; videos of a step count for the
learning rate, not their four clips:

    size    videos  lr    warm-up  epochs (x 4 clips)  clip norm  hardware
    base      1024  1e-3       20   200                        0  32 GPUs
    large     1536  1e-3       30   300                        0  48 GPUs
    huge      2048  1e-3       30   300                        0  64 GPUs
    giant     2048  6e-4       30   300                     0.02  64 GPUs

All: 90 % tube mask for the encoder, the running cell drops half of all places for the decoder, whose depth is
4 whatever the size (and 512 wide for huge: not the decoder of V1). size=small is ours, with the row of base:
the published small model was distilled.
"""

from videomae_jax import config
from videomae_jax.models import vit

# size: videos of a step, lr, warm-up, epochs, clip norm, epochs between checkpoints
_ROWS = {
    "small": (1024, 1e-3, 20, 200, 0.0, 20),
    "base": (1024, 1e-3, 20, 200, 0.0, 20),
    "large": (1536, 1e-3, 30, 300, 0.0, 20),
    "huge": (2048, 1e-3, 30, 300, 0.0, 10),
    "giant": (2048, 6e-4, 30, 300, 0.02, 5),
}
_CLIPS = 4


def get_config(arg: str | None = None):
    """The settings of one row; see the module's text."""
    arg = config.parse_arg(arg, size="base", data="data/hybrid.csv")
    if arg.size not in _ROWS:
        raise config.UserError(f"size={arg.size} is unknown: use {', '.join(_ROWS)}")
    videos, lr, warmup, epochs, clip_norm, every = _ROWS[arg.size]
    size = vit.SIZES[arg.size]
    c = config.defaults()
    c.model.tubelet = (2, size.patch, size.patch)
    c.model.encoder.update(vars(size.encoder))
    c.model.decoder.update(vars(size.decoder))
    c.model.decoder.depth = 4
    if arg.size == "huge":
        c.model.decoder.update(width=512, num_heads=8, mlp_dim=2048)
    c.model.remat = "full" if arg.size in ("huge", "giant") else "none"
    c.mask.update(ratio=0.9, decoder="running_cell", decoder_ratio=0.5)
    c.data.update(path=arg.data, stride=4, clips_per_video=_CLIPS, batch_size=_CLIPS * videos)
    c.optim.update(lr=lr, min_lr=1e-5, duration=epochs, warmup=warmup, clip_norm=clip_norm)
    c.checkpoint.every = every
    return c
