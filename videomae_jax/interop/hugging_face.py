"""What stands beside the weights in Hugging Face's VideoMAE folders, in and out."""

import json
import os
import pathlib
from typing import Any

from videomae_jax.interop.export import ExportError
from videomae_jax.interop.torch_weights import WeightsError
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.mae import VideoMAEConfig

PREPROCESSOR = "preprocessor_config.json"
_HEADS = {
    "single_label_classification": "softmax",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}  # by their problem_type


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """What the config.json of a folder says.

    Raises:
        ExportError: it is broken, or of another model.
    """
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} is damaged ({type(error).__name__}): download it again") from None
    kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
    if kind != "videomae":
        raise ExportError(f"{file} holds a model of type {kind}, not videomae")
    return found


def fields(hf: dict[str, Any], folder: str | os.PathLike) -> tuple[dict[str, Any], int, int]:
    """(what a config says of ours, heads of the encoder, heads of the decoder).

    Raises:
        ExportError: a value that makes no sense, or an activation other than the exact GELU.
    """

    def number(name: str, default: Any, kind: type = int) -> Any:
        value = hf.get(name, default)
        if type(value) not in (kind, int) or not value > 0:
            raise ExportError(f"{folder}: config.json {name}={value!r} is no {kind.__name__} above 0")
        return value

    activation = hf.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ExportError(f"{folder}: hidden_act={activation!r}: only the exact gelu is known")
    size = hf.get("image_size", 224)
    is_pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    height, width = size if is_pair else [number("image_size", 224)] * 2
    labels = hf.get("id2label") or {}
    if not isinstance(labels, dict) or not all(key.isdecimal() for key in labels):
        raise ExportError(
            f"{folder}: config.json has id2label={str(labels)[:60]}, which names no classes by number"
        )
    problem = hf.get("problem_type") or "single_label_classification"
    if problem not in _HEADS:
        raise ExportError(f"{folder}: config.json problem_type={problem!r} is none of {', '.join(_HEADS)}")
    heads = number("num_attention_heads", 12)
    if hf.get("hidden_size") == 384 and heads == 16:
        heads = 6  # the recipe of the published small model says 16, its weights were trained with 6
    told = {
        "clip_size": (number("num_frames", 16), height, width),
        "norm_epsilon": number("layer_norm_eps", 1e-12, float),
        "final_norm_epsilon": 1e-5,  # theirs, whatever layer_norm_eps says
        "classes": tuple(str(labels[key]) for key in sorted(labels, key=int)) or None,
        "head": _HEADS[problem],
        **_statistics(pathlib.Path(folder, PREPROCESSOR)),
    }
    return told, heads, number("decoder_num_attention_heads", 6)


def _statistics(file: pathlib.Path) -> dict[str, tuple[float, ...]]:
    """How pixels are normalised, where a folder tells it."""
    if not file.is_file():
        return {}
    names = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
    try:
        found = json.loads(file.read_text())
        is_normalized = found.get("do_normalize", True)
        told = {ours: tuple(map(float, found[name])) for ours, name in names.items() if name in found}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{file} is damaged ({type(error).__name__}): download it again") from None
    if not is_normalized:
        raise ExportError(f"{file}: do_normalize is false, and a VideoMAE takes normalised pixels")
    return told


def preprocessor_of(config: VideoMAEConfig | ClassifierConfig) -> dict[str, Any]:
    """The preprocessor_config.json with which Hugging Face's processor makes what the model takes."""
    _, height, width = config.clip_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": height},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
    }


def config_of(config: VideoMAEConfig | ClassifierConfig) -> dict[str, Any]:
    """The config.json that Hugging Face needs beside the weights."""
    frames, height, width = config.clip_size
    if height != width:
        raise WeightsError(f"Hugging Face's VideoMAE is square, this one {height} x {width}")
    is_classifier = isinstance(config, ClassifierConfig)
    names = ("VideoMAEForPreTraining", "VideoMAEForVideoClassification")
    found: dict[str, Any] = {
        "architectures": [names[is_classifier]],
        "model_type": "videomae",
        "image_size": height,
        "num_frames": frames,
        "patch_size": config.tubelet[1],
        "tubelet_size": config.tubelet[0],
        "num_channels": config.channels,
        "hidden_size": config.encoder.width,
        "num_hidden_layers": config.encoder.depth,
        "num_attention_heads": config.encoder.num_heads,
        "intermediate_size": config.encoder.mlp_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_epsilon,
        "qkv_bias": True,
        "use_mean_pooling": config.pooling == "mean" if is_classifier else not config.encoder_norm,
    }
    if isinstance(config, ClassifierConfig):
        found["problem_type"] = next(name for name, head in _HEADS.items() if head == config.head)
        found["id2label"] = {str(i): name for i, name in enumerate(config.classes)}
        found["label2id"] = {name: i for i, name in enumerate(config.classes)}
    elif config.decoder is not None:
        found |= {
            "decoder_hidden_size": config.decoder.width,
            "decoder_num_hidden_layers": config.decoder.depth,
            "decoder_num_attention_heads": config.decoder.num_heads,
            "decoder_intermediate_size": config.decoder.mlp_dim,
        }
    return found
