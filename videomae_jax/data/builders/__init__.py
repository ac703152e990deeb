"""Known data sets, from official annotation files and a local folder of videos: no downloads."""

from videomae_jax.data.builders.ava import ava
from videomae_jax.data.builders.ava_kinetics import ava_kinetics
from videomae_jax.data.builders.boxes import boxes
from videomae_jax.data.builders.hmdb51 import hmdb51
from videomae_jax.data.builders.kinetics import kinetics
from videomae_jax.data.builders.ssv2 import ssv2
from videomae_jax.data.builders.ucf101 import ucf101
from videomae_jax.data.builders.video_folder import video_folder

__all__ = ["BUILDERS", "video_folder"]

BUILDERS = {
    "kinetics400": kinetics(400),
    "kinetics600": kinetics(600),
    "kinetics700": kinetics(700),
    "ssv2": ssv2,
    **{f"ucf101_{number}": ucf101(number) for number in (1, 2, 3)},
    **{f"hmdb51_{number}": hmdb51(number) for number in (1, 2, 3)},
    "ava": ava,
    "ava_kinetics": ava_kinetics,
    "boxes": boxes,
}
"""Name -> function of (annotations, folder of videos) -> Collection."""
