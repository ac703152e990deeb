"""Any weights to a model, and a model to any layout: Orbax exports, official files, Hugging Face folders."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from videomae_jax.interop import export, torch_file, torch_weights
from videomae_jax.interop.export import ExportError, Model, ModelConfig
from videomae_jax.interop.torch_file import TorchFileError
from videomae_jax.interop.torch_weights import WeightsError
from videomae_jax.models.heads import ClassifierConfig, VideoClassifier
from videomae_jax.models.mae import VideoMAE

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of every published VideoMAE
_CONTAINERS = ("model", "module", "state_dict")
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def load(
    path: str | os.PathLike,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    position_resize: str = "recompute",
) -> Model:
    """Reads a model from whatever holds one; nothing in a file is ever run.

    Args:
        path: an Orbax export, checkpoint or work folder; an official `.pth` or `.safetensors` file; a Hugging
            Face folder.
        num_heads, decoder_num_heads: for files that do not tell (official ones), of unpublished widths.
        position_resize: table for other clip sizes, "recompute" (published) or "interpolate"; our own exports
            keep their own.

    Raises:
        ExportError: it is none of these, or ambiguous.
        TorchFileError: a damaged file, or one that asks for more than tensors.
        WeightsError: tensors that are not exactly those of a VideoMAE; the text names the first.
    """
    if not _is_torch(pathlib.Path(path)):
        _check_folder(pathlib.Path(path))
        return export.load(path)
    config, layout, tensors = _open(pathlib.Path(path), num_heads, decoder_num_heads)
    try:
        config = dataclasses.replace(config, position_resize=position_resize)
    except ValueError as error:
        raise ExportError(str(error)) from None
    kind: Any = VideoClassifier if isinstance(config, ClassifierConfig) else VideoMAE
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    leaves: dict[tuple[str, ...], Any] = flatten_dict(nnx.to_pure_dict(state))  # pyright: ignore
    shapes = {"/".join(key): leaf.shape for key, leaf in leaves.items()}
    try:
        params = torch_weights.to_ours(tensors, config, layout, shapes)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    tree = {tuple(name.split("/")): jnp.asarray(value) for name, value in params.items()}
    return nnx.merge(graphdef, unflatten_dict(tree))


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The config of the model that `load` would read. Raises as `load`."""
    if not _is_torch(pathlib.Path(path)):
        _check_folder(pathlib.Path(path))
        return export.read_config(path)
    return _open(pathlib.Path(path), None, None)[0]


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """How the model in `path` was trained; PyTorch files do not tell, so for them the published recipe."""
    if _is_torch(pathlib.Path(path)):
        return {"mask": "tube", "mask_ratio": 0.9, "normalize_target": True, "stride": 4}
    return export.read_metadata(path)["recipe"]


def export_torch(model: Model, path: str | os.PathLike, layout: str = "hf", dtype: str = "float32") -> None:
    """Writes a model for PyTorch: "hf" a Hugging Face folder, "official" one .safetensors file.

    Args:
        dtype: of the tensors, "float32", "float16" or "bfloat16".

    Raises:
        ExportError: the path exists, or an unknown dtype.
        WeightsError: an unknown layout, or a model that it has no names for.
    """
    place = pathlib.Path(path)
    if place.exists():
        raise ExportError(f"{place} exists: choose another path or remove it")
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}")
    if layout == "official" and place.suffix != ".safetensors":
        raise ExportError(f"{place}: the official layout is one file, name it .safetensors")
    params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat = {"/".join(key): np.asarray(value) for key, value in flatten_dict(params).items()}
    tensors = torch_weights.to_theirs(flat, model.config, layout)
    if dtype != "float32":
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    if layout == "official":
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place)
        return
    place.mkdir(parents=True)
    about = _hf_config(model.config) | {"dtype": dtype}
    (place / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    save_file(tensors, place / "model.safetensors", {"format": "pt"})


def convert(
    source: str, target: str, layout: str, dtype: str = "float32", position_resize: str = "recompute"
) -> Model:
    """Reads any weights and writes them as "orbax" (always float32), "hf" or "official".

    An Orbax export keeps `position_resize`, and where it comes from: path and SHA-256 of a file.

    Raises:
        ExportError, TorchFileError, WeightsError: see `load` and `export_torch`.
    """
    model = load(source, position_resize=position_resize)
    if layout != "orbax":
        export_torch(model, target, layout, dtype)
        return model
    if dtype != "float32":
        raise ExportError(f"an Orbax export holds float32: {dtype} is for --layout=hf and official")
    place = pathlib.Path(source)
    origin = {"source": str(place), "sha256": _digest(place) if place.is_file() else ""}
    export.save(model, target, read_recipe(source) | {"origin": origin})
    return model


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_torch(path: pathlib.Path) -> bool:
    """Whether a path is a file, or a folder of Hugging Face's and not a work folder."""
    return path.is_file() or ((path / "config.json").is_file() and not (path / "checkpoints").is_dir())


def _check_folder(path: pathlib.Path) -> None:
    """Refuses a folder of weight files that are not one model."""
    files = sorted(file.name for ending in _SUFFIXES for file in path.glob(f"*{ending}"))
    if files:
        raise ExportError(f"{path} holds weight files and no config.json: name one of {', '.join(files[:5])}")


def _open(
    path: pathlib.Path, num_heads: int | None, decoder_num_heads: int | None
) -> tuple[ModelConfig, str, dict[str, np.ndarray]]:
    """(config, layout, tensors) of a PyTorch model."""
    # Files do not tell the clip size: it is the published one, and the recomputed position table fits any.
    fields: dict[str, Any] = {
        "clip_size": (16, 224, 224),
        "pixel_mean": _MEAN,
        "pixel_std": _STD,
        "classes": None,
    }
    if path.is_file():
        tensors = _read_file(path)
    else:
        hf = json.loads((path / "config.json").read_text())
        if hf.get("model_type") != "videomae":
            raise ExportError(f"{path} holds a model of type {hf.get('model_type')}, not videomae")
        tensors = _read_folder(path)
        fields |= _hf_fields(hf)
        num_heads, decoder_num_heads = fields.pop("num_heads"), fields.pop("decoder_num_heads")
    try:
        cleaned = torch_weights.clean(tensors)
        return torch_weights.infer(cleaned, num_heads, decoder_num_heads, fields)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (safetensors.SafetensorError, OSError, TypeError) as error:
            raise TorchFileError(f"{path} is damaged ({error}): download it again") from None
    if not torch_file.is_torch_file(path):
        raise ExportError(
            f"{path} is no model: pass a .pth or .safetensors file, a Hugging Face folder, or an Orbax export"
        )
    content = torch_file.read(path)
    named = [
        name for name in _CONTAINERS if isinstance(content, dict) and isinstance(content.get(name), dict)
    ]
    content = content[named[0]] if named else content
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return {str(name): value for name, value in content.items()}


def _read_folder(path: pathlib.Path) -> dict[str, np.ndarray]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any("/" in name or not (path / name).is_file() for name in names):
            raise ExportError(f"{index} names files that are not there: download them again")
        return {name: tensor for file in names for name, tensor in _read_file(path / file).items()}
    found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if not found:
        raise ExportError(f"{path} holds no model.safetensors: download it whole")
    return _read_file(found[0])


def _hf_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """What a Hugging Face config says of our config."""
    size = hf.get("image_size", 224)
    labels = hf.get("id2label", {})
    heads = hf.get("num_attention_heads", 12)
    if hf.get("hidden_size") == 384 and heads == 16:
        heads = 6  # the recipe of the published small model says 16, its weights were trained with 6
    return {
        "clip_size": (hf.get("num_frames", 16), size, size),
        "norm_epsilon": hf.get("layer_norm_eps", 1e-12),
        "final_norm_epsilon": 1e-5,  # theirs, whatever layer_norm_eps says
        "classes": tuple(labels[key] for key in sorted(labels, key=int)) or None,
        "num_heads": heads,
        "decoder_num_heads": hf.get("decoder_num_attention_heads", 6),
    }


def _hf_config(config: ModelConfig) -> dict[str, Any]:
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
        "norm_pix_loss": True,
        "use_mean_pooling": config.pooling == "mean" if is_classifier else not config.encoder_norm,
    }
    if isinstance(config, ClassifierConfig):
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
