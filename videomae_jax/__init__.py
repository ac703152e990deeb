"""VideoMAE in JAX: self-supervised video pretraining on TPU pods, GPUs, or a laptop."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from videomae_jax.interop.export import save
    from videomae_jax.interop.weights import export_torch, load
    from videomae_jax.models.heads import ClassifierConfig, VideoClassifier
    from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
    from videomae_jax.models.masking import frame_mask, random_mask, tube_mask
    from videomae_jax.models.vit import SIZES

__all__ = [
    "SIZES",
    "ClassifierConfig",
    "VideoClassifier",
    "VideoMAE",
    "VideoMAEConfig",
    "export_torch",
    "frame_mask",
    "load",
    "random_mask",
    "save",
    "tube_mask",
]

_HOME = {
    "save": "interop.export",
    **dict.fromkeys(("export_torch", "load"), "interop.weights"),
    **dict.fromkeys(("ClassifierConfig", "VideoClassifier"), "models.heads"),
    **dict.fromkeys(("VideoMAE", "VideoMAEConfig"), "models.mae"),
    **dict.fromkeys(("frame_mask", "random_mask", "tube_mask"), "models.masking"),
    "SIZES": "models.vit",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used: processes that only read videos never import JAX."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
