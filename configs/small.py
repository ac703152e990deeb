"""The first run: a small masked autoencoder, from nothing to a picture of what it reconstructs.

    ./launch/local.sh train --config=configs/small.py --workdir=runs/small
    ./launch/local.sh train --config=configs/small.py:data=FOLDER_OF_VIDEOS --workdir=runs/mine
    ./launch/local.sh train --config=configs/small.py:scale=gpu --workdir=runs/gpu

Arguments: data=moving_shapes (generated) or a PATH; scale=laptop or gpu.

laptop: 8 x 48 x 48 clips, 144 tubelets of which 36 are visible, pixels as target; about 6 minutes on two CPU
cores. Chosen by trying: with 64-pixel clips, finer texture or normalised targets a model of this size still
predicts the mean colour after that time; here it beats both the mean and a copy of the nearest visible
tubelet. Half the steps draw much the same, but with one of two seeds finetuning then took five epochs and
more to leave chance, which takes one or two after all of them.
gpu: 16 x 128 x 128 clips, ViT-S with tube masking 0.9 and normalised targets as published, for one GPU or one
TPU host.
"""

from videomae_jax import config
from videomae_jax.models import vit


def get_config(arg: str | None = None):
    """The settings; see the module's text."""
    arg = config.parse_arg(arg, data="moving_shapes", scale="laptop")
    c = config.defaults()
    c.data.path = arg.data
    c.optim.unit = "steps"
    if arg.scale == "laptop":
        c.model.tubelet = (2, 8, 8)
        c.model.encoder.update(width=128, depth=4, num_heads=4, mlp_dim=512)
        c.model.decoder.update(width=64, depth=2, num_heads=2, mlp_dim=256)
        c.mask.ratio = 0.75
        c.loss.normalize_target = False
        c.log.statistics = "raw"
        c.data.generate.update(size=48, frames=24, videos=2048)
        c.data.update(frames=8, stride=2, size=(48, 48), batch_size=16)
        c.optim.update(duration=4800, warmup=240, lr=0.064, min_lr=0.0, clip_norm=1.0)
        c.checkpoint.every = 1200
        c.log.steps = 20
    elif arg.scale == "gpu":
        size = vit.SIZES["small"]
        c.model.encoder.update(vars(size.encoder))
        c.model.decoder.update(vars(size.decoder))
        c.data.generate.update(size=128, frames=48, videos=16384)
        c.data.update(frames=16, stride=2, size=(128, 128), batch_size=256)
        c.optim.update(duration=20_000, warmup=1000, lr=6e-4, min_lr=0.0)
        c.checkpoint.every = 2000
        c.log.steps = 50
    else:
        raise config.UserError(f"scale={arg.scale} is unknown: use laptop or gpu")
    return c
