"""VideoMAE in JAX: self-supervised video pretraining on TPU pods, GPUs, or a laptop."""

from videomae_jax.interop.export import load, save
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.models.masking import frame_mask, random_mask, tube_mask
from videomae_jax.models.vit import SIZES

__all__ = [
    "SIZES",
    "VideoMAE",
    "VideoMAEConfig",
    "frame_mask",
    "load",
    "random_mask",
    "save",
    "tube_mask",
]
