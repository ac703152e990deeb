"""A student that predicts what a frozen masked autoencoder makes of hidden tubelets: SALT's second stage.

    ./launch/local.sh train --config=configs/latent.py:size=base,data=k400,teacher=runs/k400 --workdir=runs/x
    ./launch/local.sh train --config=configs/latent.py:size=tiny,data=moving_shapes,teacher=runs/small \\
        --workdir=runs/latent_tiny

Arguments: teacher=WEIGHTS of any layout, of any size with the clips and tubelets of the student (a small one
will do); size=tiny|small|base|large|huge; data=k400|ssv2|ucf101|hmdb51|moving_shapes or data=PATH;
recipe=salt|mvd.

salt (arXiv 2509.24317): multi-block masks, L1, a predictor of 12 blocks, 384 wide. Its steps were 200,000 of
3,072 clips on 3.6 million videos; the durations here are epochs, ours. mvd (arXiv 2212.04500): its video
teacher alone, 90 % tube masks, smooth L1, a decoder by size, 400 epochs of 1,024 clips (huge: 800; large and
huge: of 512).

Differences: multi-block masks leave a fixed share visible (mask.ratio; docs/parity.md says how), positions
are sine and cosine, and MVD's targets are normalised too.
"""

from videomae_jax import config
from videomae_jax.models import vit

_STRIDES = {"k400": 4, "ssv2": 2, "ucf101": 4, "hmdb51": 2}
_RECIPES = ("salt", "mvd")
# Size: width, heads and depth of MVD's decoder, by the published scripts
_MVD = {
    "tiny": (384, 6, 2),
    "small": (384, 6, 2),
    "base": (768, 12, 2),
    "large": (512, 8, 4),
    "huge": (640, 8, 8),
}


def get_config(arg: str | None = None):
    """The settings; see the module's text."""
    arg = config.parse_arg(arg, size="base", data="k400", teacher="", recipe="salt")
    if arg.size not in vit.SIZES or arg.size == "giant":
        raise config.UserError(f"size={arg.size} is unknown: use tiny, small, base, large or huge")
    if arg.recipe not in _RECIPES:
        raise config.UserError(f"recipe={arg.recipe} is unknown: use {', '.join(_RECIPES)}")
    c = config.defaults()
    c.task = "latent"
    c.teacher = arg.teacher
    c.model.encoder.update(vars(vit.SIZES[arg.size].encoder))
    c.data.path = f"data/{arg.data}" if arg.data in _STRIDES else arg.data
    c.data.stride = _STRIDES.get(arg.data, 4)
    if arg.recipe == "salt":
        c.model.decoder.update(width=384, depth=12, num_heads=12, mlp_dim=1536)
        c.mask.update(kind="multi_block", ratio=0.75)
        c.loss.kind = "l1"
        c.data.batch_size = 3072
        c.optim.update(
            lr=4.375e-5, min_lr=4.375e-5, weight_decay=0.04, betas=(0.9, 0.999), duration=300, warmup=40
        )
    else:
        width, heads, depth = _MVD[arg.size]
        is_huge = arg.size == "huge"
        c.model.decoder.update(width=width, num_heads=heads, mlp_dim=4 * width, depth=depth)
        c.model.drop_path = 0.2 if is_huge else 0.1
        c.loss.kind = "smooth_l1"
        c.data.batch_size = 512 if arg.size in ("large", "huge") else 1024
        c.optim.update(
            lr=1.5e-4, min_lr=1e-5 if is_huge else 1e-4, duration=800 if is_huge else 400, warmup=40
        )
    if arg.size == "tiny":
        c.model.tubelet = (2, 8, 8)
        c.model.decoder.update(width=64, depth=2, num_heads=2, mlp_dim=256)
        c.mask.ratio = 0.75
        c.data.generate.update(size=48, frames=24, videos=2048)
        c.data.update(frames=8, stride=2, size=(48, 48), batch_size=16)
        c.optim.update(unit="steps", duration=2400, warmup=240, lr=0.032, min_lr=0.0, clip_norm=1.0)
        c.checkpoint.every = 1200
        c.log.steps = 20
    return c
