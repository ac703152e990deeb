"""Finetuning a video classifier, and its multi-view test, by the published recipes.

    ./launch/local.sh train    --config=configs/finetune.py:size=tiny,data=moving_shapes \\
        --config.init_from=runs/small --workdir=runs/ft
    ./launch/local.sh evaluate --config=configs/finetune.py:size=tiny,data=moving_shapes --workdir=runs/ft
    ./launch/local.sh train    --config=configs/finetune.py:size=base,data=k400 \\
        --config.data.path=/data/kinetics400 --config.init_from=runs/k400_base --workdir=runs/k400_ft
    ./launch/local.sh train    --config=configs/finetune.py:size=base,data=FOLDER,preset=small_data \\
        --config.init_from=WEIGHTS --workdir=runs/mine

Arguments: size=tiny|small|base|large|huge; data=k400|ssv2|ucf101|hmdb51|moving_shapes, or data=PATH: class
folders, or lists, of your own, with the Kinetics recipe; preset=published|small_data. Without init_from the
same recipe trains from scratch (the paper's baselines take longer: 200 epochs for K400, 100 for SSv2).

Published rows (top-1 of the multi-view test; videos of a step, not clips, count for the learning rate):

    data     size    videos  lr      epochs  clips  decay  drop path  dropout  views  hardware  top-1
    k400     small      384  5e-4       150      2   0.75        0.1        0    5x3  32 GPUs    79.0
    k400     base       384  5e-4        75      2   0.75        0.1        0    5x3  64 GPUs    81.5
    k400     large      128  2e-3        35      2   0.75        0.1        0    5x3  64 GPUs    85.2
    k400     huge       512  1e-3        50      2   0.75        0.2      0.5    5x3  64 GPUs    86.6
    ssv2     small      384  1e-3        40      2   0.70        0.1        0    2x3  32 GPUs    66.8
    ssv2     base       384  5e-4        30      2   0.75        0.1        0    2x3  64 GPUs    70.8
    ssv2     large      512  5e-4        30      2   0.75        0.2      0.5    2x3  paper's    74.3
    ucf101   base       128  5e-4       100      2   0.70        0.2      0.5    5x3   8 GPUs    91.3
    hmdb51   base       128  1e-3        50      2   0.70        0.2      0.5   10x3  paper's    62.6

"paper's": no script was released, the row is from the paper's tables. Other pairs take the data set's
views and the size's row of Kinetics-400. preset=small_data is for hundreds of videos of one's own: the lower
half of the blocks frozen, more dropout and drop path, early stopping, milder crops.

size=tiny, data=moving_shapes is what `configs/small.py` pretrains: six minutes on two CPU cores. Nothing is
mirrored (left is a class of its own), and the crops are mild, for frames of 48 pixels.
"""

from videomae_jax import config
from videomae_jax.models import vit

# (data, size): videos of a step, lr, epochs, layer decay, drop path, head dropout, min lr
_ROWS = {
    ("k400", "small"): (384, 5e-4, 150, 0.75, 0.1, 0.0, 1e-6),
    ("k400", "base"): (384, 5e-4, 75, 0.75, 0.1, 0.0, 1e-6),
    ("k400", "large"): (128, 2e-3, 35, 0.75, 0.1, 0.0, 1e-6),
    ("k400", "huge"): (512, 1e-3, 50, 0.75, 0.2, 0.5, 1e-5),
    ("ssv2", "small"): (384, 1e-3, 40, 0.70, 0.1, 0.0, 1e-6),
    ("ssv2", "base"): (384, 5e-4, 30, 0.75, 0.1, 0.0, 1e-6),
    ("ssv2", "large"): (512, 5e-4, 30, 0.75, 0.2, 0.5, 1e-6),
    ("ucf101", "base"): (128, 5e-4, 100, 0.70, 0.2, 0.5, 1e-5),
    ("hmdb51", "base"): (128, 1e-3, 50, 0.70, 0.2, 0.5, 1e-6),
}
# data: stride (0: one frame of each of 16 parts), segments of the test, whether clips are mirrored
_DATA = {"k400": (4, 5, True), "ssv2": (0, 2, False), "ucf101": (4, 5, True), "hmdb51": (2, 10, True)}
_PRESETS = ("published", "small_data")


def get_config(arg: str | None = None):
    """The settings of one row; see the module's text."""
    arg = config.parse_arg(arg, size="base", data="k400", preset="published")
    if arg.preset not in _PRESETS:
        raise config.UserError(f"preset={arg.preset} is unknown: use {', '.join(_PRESETS)}")
    c = config.defaults()
    c.task = "finetune"
    c.optim.update(betas=(0.9, 0.999), warmup=5)
    c.evaluate.every = 1
    c.checkpoint.every = 1
    c.data.held_out = 100_000  # a tenth, where there is no part for validation
    if arg.size == "tiny":
        _tiny(c, arg.data)
    elif arg.size in ("small", "base", "large", "huge"):
        _published(c, arg.size, arg.data)
    else:
        raise config.UserError(f"size={arg.size} is unknown: use tiny, small, base, large or huge")
    if arg.preset == "small_data":
        c.optim.freeze_blocks = c.model.encoder.depth // 2
        c.optim.patience = 10
        c.model.drop_path = 0.2
        c.head.dropout = 0.5
        c.augment.area = (0.25, 1.0)
    return c


def _published(c, size: str, data: str) -> None:
    stride, segments, flip = _DATA.get(data, _DATA["k400"])
    row = _ROWS.get((data, size)) or _ROWS["k400", size]
    videos, lr, epochs, layer_decay, drop_path, dropout, min_lr = row
    c.model.encoder.update(vars(vit.SIZES[size].encoder))
    c.model.drop_path = drop_path
    c.model.remat = "full" if size == "huge" or data == "ucf101" else "none"
    c.head.dropout = dropout
    c.augment.flip = flip
    c.data.path = f"data/{data}" if data in _DATA else data
    c.data.update(stride=stride, clips_per_video=2, batch_size=2 * videos)
    c.optim.update(lr=lr, min_lr=min_lr, duration=epochs, layer_decay=layer_decay)
    c.evaluate.segments = segments


def _tiny(c, data: str) -> None:
    size = vit.SIZES["tiny"]
    c.model.tubelet = (2, 8, 8)
    c.model.encoder.update(vars(size.encoder))
    c.data.path = data
    c.data.generate.update(size=48, frames=24, videos=2048)
    c.data.update(frames=8, stride=3, size=(48, 48), batch_size=32)
    c.augment.update(policy="", flip=False, area=(0.8, 1.0), erasing=0.0, mix_probability=0.0)
    # From twice the pretraining rate no layer may lag: what tells the classes is not in the features yet.
    c.optim.update(lr=0.024, min_lr=0.0, duration=25, warmup=1, clip_norm=1.0)
    c.evaluate.update(segments=2, crops=1, batch_videos=16)
