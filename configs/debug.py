"""A model of a few thousand parameters on 64 generated videos: everything happens, in seconds.

    ./launch/local.sh train --config=configs/debug.py --workdir=runs/debug

For tests, and for seeing a change run before it runs for hours. Arguments: data=PATH and
task=pretrain|latent|contrast|finetune|distill|detect|probe; teacher=RUN for latent and distill.
"""

from videomae_jax import config


def get_config(arg: str | None = None):
    """The settings; see the module's text."""
    arg = config.parse_arg(arg, data="moving_shapes", task="pretrain", teacher="")
    c = config.defaults()
    c.task, c.teacher = arg.task, arg.teacher
    c.model.tubelet = (2, 8, 8)
    c.model.encoder.update(width=32, depth=2, num_heads=2, mlp_dim=64)
    c.data.path = arg.data
    c.data.generate.update(size=32, frames=16, videos=64)
    c.data.update(frames=8, stride=1, size=(32, 32))
    c.log.steps = 1
    if arg.task == "probe":
        c.probe.update(epochs=5, num_heads=2)
        c.evaluate.update(segments=2)
        return c
    c.data.batch_size = 8
    c.optim.update(unit="steps", duration=20, warmup=4, lr=0.032, min_lr=0.0)
    c.checkpoint.every = 5
    if arg.task == "contrast":
        c.contrast.update(hidden=32, width=16)
        c.data.update(clips_per_video=2, batch_size=16)
        c.augment.flip = False
    elif arg.task in ("pretrain", "latent"):
        c.model.decoder.update(width=16, depth=1, num_heads=1, mlp_dim=32)
        c.mask.ratio = 0.75
    elif arg.task == "detect":
        c.augment.flip = False
        c.detect.update(boxes=4, bins=3, short=(32, 36), test_short=32)
        c.evaluate.every = 10
    else:
        c.model.drop_path, c.head.dropout = 0.1, 0.1
        c.optim.layer_decay = 0.8
        c.augment.flip = False
        if arg.task == "distill":
            c.distill.update(hard_weight=0.1, feature_weight=0.1)
        c.evaluate.update(every=5, segments=2, crops=2)
    return c
