"""What frozen features know: k-NN, a linear layer, or one attending query on a trained backbone.

    ./launch/local.sh train --config=configs/probe.py:kind=linear,size=tiny,data=moving_shapes \\
        --config.init_from=runs/small --workdir=runs/probe

Arguments: kind=knn|linear|attentive; size=tiny (8 x 48 x 48 clips) or base (16 x 224 x 224, any backbone);
data=k400|ssv2|ucf101|hmdb51|moving_shapes or data=PATH. The backbone is that of init_from, whatever its size.

Features are computed once and kept in the work folder; the rest takes seconds. Published, linear on SSv2:
38.9 top-1 (ViT-B, 800 epochs), by SGD with lr 0.1, 100 epochs, batch 1024, with augmentation, which frozen
features that are kept cannot have: expect less.
"""

from videomae_jax import config

_STRIDES = {"k400": 4, "ssv2": 0, "ucf101": 4, "hmdb51": 2}

_KINDS = ("linear", "attentive", "knn")


def get_config(arg: str | None = None):
    """The settings; see the module's text."""
    arg = config.parse_arg(arg, kind="linear", size="base", data="k400")
    if arg.kind not in _KINDS:
        raise config.UserError(f"kind={arg.kind} is unknown: use {', '.join(_KINDS)}")
    c = config.defaults()
    c.task = "probe"
    c.probe.kind = arg.kind
    c.data.path = f"data/{arg.data}" if arg.data in _STRIDES else arg.data
    c.data.held_out = 100_000  # a tenth, where there is no part for it
    if arg.size == "tiny":
        c.data.generate.update(size=48, frames=24, videos=2048)
        c.data.update(frames=8, stride=3, size=(48, 48))
        c.evaluate.update(segments=2, batch_videos=16)
    elif arg.size == "base":
        c.data.stride = _STRIDES.get(arg.data, 4)
        c.evaluate.segments = 2 if arg.data == "ssv2" else 3
    else:
        raise config.UserError(f"size={arg.size} is unknown: use tiny or base")
    if arg.kind == "attentive":
        c.probe.update(epochs=20, lr=1e-3, batch_size=256)
    return c
