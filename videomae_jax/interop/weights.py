"""Any weights to a model, and a model to any layout: Orbax exports, official files, Hugging Face folders."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from videomae_jax import storage
from videomae_jax.interop import export, hugging_face, torch_file, torch_weights
from videomae_jax.interop.export import ExportError, Model, ModelConfig
from videomae_jax.interop.torch_file import TorchFileError
from videomae_jax.interop.torch_weights import PublishedConfig, WeightsError
from videomae_jax.models import functional
from videomae_jax.models.detector import ActionDetector, DetectorConfig
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.mae import VideoMAEConfig
from videomae_jax.storage import Place

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of every published VideoMAE
_STRIDE = "frame_stride"  # in a config.json; Hugging Face's own have none
_CONTAINERS = ("model", "module", "state_dict")
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_MODELS: dict[type[ModelConfig], Any] = {config: model for model, config in export.KINDS.values()}
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Hints:
    """What PyTorch files do not tell; None: not given either, so as published where that is certain.

    Attributes:
        num_heads, decoder_num_heads: of unpublished widths.
        clip_size: (T, H, W); published: (16, 224, 224).
        classes: names, in order; else they are numbers.
        stride: frames from one frame of a clip to the next; 0: one of each equal part.
        heads_by_width: heads of a stack that is so wide, where neither given nor published.
        needs_decoder: else a decoder whose heads are not told is read with one.
    """

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    clip_size: tuple[int, int, int] | None = None
    classes: tuple[str, ...] | None = None
    stride: int | None = None
    heads_by_width: Mapping[int, int] = dataclasses.field(default_factory=dict)
    needs_decoder: bool = True


def load(
    path: str | os.PathLike,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    position_resize: str | None = None,
    clip_size: tuple[int, int, int] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Model:
    """Reads a model from whatever holds one; nothing in a file is ever run.

    Args:
        path: an Orbax export, checkpoint or work folder; an official `.pth` or `.safetensors` file; a Hugging
            Face folder.
        num_heads, decoder_num_heads, clip_size, classes: for files that do not tell, see `Hints`.
        position_resize: table for other clip sizes, "recompute" or "interpolate"; None: as published, the
            first, of detectors the second. Our own exports keep their own.

    Raises:
        ExportError: it is none of these, or ambiguous.
        TorchFileError: a damaged file, or one that asks for more than tensors.
        WeightsError: tensors that are not exactly those of a VideoMAE; the text names the first.
    """
    return read(path, Hints(num_heads, decoder_num_heads, clip_size, classes), position_resize)


def read(path: str | os.PathLike, hints: Hints, position_resize: str | None = None) -> Model:
    """As `load`, with what files do not tell in one."""
    if not _is_torch(storage.at(path)):
        _check_folder(storage.at(path))
        _check_hints(path, export.read_config(path), hints)
        return export.load(path)
    config, layout, tensors = _open(_local(path), hints)
    try:
        config = dataclasses.replace(config, position_resize=position_resize or config.position_resize)
    except ValueError as error:
        raise ExportError(str(error)) from None
    graphdef, abstract = functional.abstract(_MODELS[type(config)], config)
    leaves: dict[str, Any] = flatten_dict(abstract, sep="/")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    try:
        params = torch_weights.to_ours(tensors, config, layout, shapes)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    tree = {tuple(name.split("/")): jnp.asarray(value) for name, value in params.items()}
    return nnx.merge(graphdef, unflatten_dict(tree))


def read_config(path: str | os.PathLike, hints: Hints | None = None) -> ModelConfig:
    """The config of the model that `read` would read. Raises as `load`."""
    hints = hints or Hints()
    if not _is_torch(storage.at(path)):
        _check_folder(storage.at(path))
        config = export.read_config(path)
        _check_hints(path, config, hints)
        return config
    return _open(_local(path), hints)[0]


def _check_hints(path: str | os.PathLike, config: ModelConfig, hints: Hints) -> None:
    """Refuses to be told otherwise what an export tells itself."""
    stacks = {"num_heads": config.encoder, "decoder_num_heads": getattr(config, "decoder", None)}
    told = {name: stack.num_heads for name, stack in stacks.items() if stack}
    told |= {"clip_size": config.clip_size, "classes": getattr(config, "classes", None)}
    for name, value in told.items():
        hint = getattr(hints, name)
        if hint is not None and hint != value:
            raise ExportError(f"{path} tells itself that its {name} is {value}, not {hint}: leave it out")


def published_stride(config: ModelConfig) -> int | None:
    """How the published model that looks like this one samples frames; None where none is known.

    Something-Something V2 takes one frame of each part (0), HMDB51 every second one, the others every fourth.
    """
    if not isinstance(config, ClassifierConfig):
        return 4
    return {174: 0, 51: 2, **dict.fromkeys((101, 400, 600, 700, 710), 4)}.get(len(config.classes))


def read_recipe(path: str | os.PathLike, hints: Hints | None = None) -> dict[str, Any]:
    """How the model in `path` was trained; PyTorch files do not tell, so for them the published recipe.

    It has no `stride` where that is neither known nor given.
    """
    hints = hints or Hints()
    place = storage.at(path)
    if not _is_torch(place):
        recipe = export.read_metadata(path)["recipe"]
    else:
        config = read_config(path, hints)
        if isinstance(config, DetectorConfig):
            stride = published_stride(config) if hints.stride is None else hints.stride
            return {"stride": stride, "test_short": 256}
        told = {} if place.is_file() else hugging_face.read_config(_local(place))
        stride = told.get(_STRIDE, published_stride(config))
        normalize = bool(told.get("norm_pix_loss", True))
        recipe = {"mask": "tube", "mask_ratio": 0.9, "normalize_target": normalize}
        recipe |= {} if stride is None else {"stride": stride}
    return recipe if hints.stride is None else recipe | {"stride": hints.stride}


def read_stride(path: str | os.PathLike, hints: Hints) -> int:
    """Frames of the file from one frame of a clip to the next, as the model was trained; 0: one of each part.

    Raises:
        ExportError: it is neither known nor given.
    """
    stride = read_recipe(path, hints).get("stride")
    if stride is None:
        raise ExportError(
            f"{path} does not tell how frames are sampled: pass --stride=4 for every fourth (Kinetics), "
            f"--stride=0 for one of each of equal parts (Something-Something)"
        )
    return stride


def export_torch(
    model: Model,
    path: str | os.PathLike,
    layout: str = "hf",
    dtype: str = "float32",
    normalize_target: bool = True,
    stride: int | None = None,
) -> None:
    """Writes a model for PyTorch: "hf" a Hugging Face folder, "official" one .safetensors file.

    Args:
        dtype: of the tensors, "float32", "float16" or "bfloat16".
        normalize_target: what a pretraining model predicts, normalised tubelets or pixels; a folder says it.
        stride: frames from one frame of a clip to the next, as trained; a folder says it, where it is given.

    Raises:
        ExportError: the path exists, or an unknown dtype.
        WeightsError: an unknown layout, or a model that it has no place for.
    """
    place = storage.at(path)
    _check_target(str(path), layout, dtype)
    if isinstance(model, ActionDetector):
        raise WeightsError(f"PyTorch layouts have no detector: --layout=orbax is the one, not {layout}")
    _check_told(model.config, layout)
    params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat = {"/".join(key): np.asarray(value) for key, value in flatten_dict(params).items()}
    tensors = torch_weights.to_theirs(flat, model.config, layout)
    if dtype != "float32":
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    if layout == "official":
        with storage.output(place) as file:
            save_file(tensors, file)
        return
    about = hugging_face.config_of(model.config) | {"dtype": dtype, "norm_pix_loss": normalize_target}
    about |= {} if stride is None else {_STRIDE: stride}
    preprocessor = hugging_face.preprocessor_of(model.config)
    with storage.output(place / "model.safetensors") as file:
        save_file(tensors, file, {"format": "pt"})
    storage.write_text(place / hugging_face.PREPROCESSOR, json.dumps(preprocessor, indent=2) + "\n")
    storage.write_text(place / "config.json", json.dumps(about, indent=2) + "\n")


def _check_told(config: VideoMAEConfig | ClassifierConfig, layout: str) -> None:
    """Refuses a model that would be read as another one, for want of a place where its layout tells it."""
    if config.position_resize == "interpolate" and config.position_grid not in (None, config.grid):
        raise WeightsError(
            f"no PyTorch layout can tell that positions are interpolated from a grid of "
            f"{config.position_grid}: use --layout=orbax"
        )
    if layout != "official":
        return
    head = getattr(config, "head", "softmax")
    if head != "softmax":
        raise WeightsError(f"the official layout cannot tell a {head} head: use --layout=hf or orbax")
    if not np.allclose((config.pixel_mean, config.pixel_std), (_MEAN, _STD), rtol=0, atol=1e-6):
        raise WeightsError(
            f"the official layout cannot tell how pixels are normalised, by {config.pixel_mean} and "
            f"{config.pixel_std}: use --layout=hf or orbax"
        )


def convert(
    source: str,
    target: str,
    layout: str,
    dtype: str = "float32",
    position_resize: str | None = None,
    hints: Hints | None = None,
) -> Model:
    """Reads any weights and writes them as "orbax" (always float32), "hf" or "official".

    An Orbax export keeps `position_resize`, and where it comes from: path and SHA-256 of a file.

    Raises:
        ExportError, TorchFileError, WeightsError: see `load` and `export_torch`.
    """
    hints = hints or Hints()
    _check_target(target, layout, dtype)
    model = read(source, hints, position_resize)
    recipe = read_recipe(source, hints)
    if layout != "orbax":
        normalize = recipe.get("normalize_target", True)
        if layout == "official" and not normalize:
            raise ExportError(
                f"{source}: the official layout cannot tell that the model predicts pixels (norm_pix_loss "
                f"false): use --layout=hf or orbax"
            )
        export_torch(model, target, layout, dtype, normalize, recipe.get("stride"))
        return model
    if dtype != "float32":
        raise ExportError(f"an Orbax export holds float32: {dtype} is for --layout=hf and official")
    place = storage.at(source)
    origin = {"source": source, "sha256": _digest(_local(place)) if place.is_file() else ""}
    export.save(model, target, recipe | {"origin": origin})
    return model


def _check_target(target: str, layout: str, dtype: str) -> None:
    """Refuses before anything is read what could not be written."""
    place = storage.at(target)
    if place.exists():
        raise ExportError(f"{place} exists: choose another path or remove it")
    if layout not in ("orbax", *torch_weights.LAYOUTS):
        raise WeightsError(f"layout {layout!r} is unknown: use orbax, {' or '.join(torch_weights.LAYOUTS)}")
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}")
    if layout == "official" and place.suffix != ".safetensors":
        raise ExportError(f"{place}: the official layout is one file, name it .safetensors")


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local(path: str | os.PathLike) -> pathlib.Path:
    """The place of weights of PyTorch, which are mapped into memory.

    Raises:
        ExportError: it is in a store.
    """
    if storage.is_remote(path):
        raise ExportError(f"{path}: weights of PyTorch are read from a disk: copy them here first")
    return pathlib.Path(path)


def _is_torch(path: Place) -> bool:
    """Whether a path is a file, or a folder of Hugging Face's and not a work folder."""
    return path.is_file() or ((path / "config.json").is_file() and not (path / "checkpoints").is_dir())


def _check_folder(path: Place) -> None:
    """Refuses a folder of weight files that are not one model."""
    files = sorted(file.name for ending in _SUFFIXES for file in path.glob(f"*{ending}"))
    if files:
        raise ExportError(f"{path} holds weight files and no config.json: name one of {', '.join(files[:5])}")


def _open(path: pathlib.Path, hints: Hints) -> tuple[PublishedConfig, str, dict[str, np.ndarray]]:
    """(config, layout, tensors) of a PyTorch model."""
    # Files do not tell the clip size: it is the published one, and the recomputed position table fits any.
    fields: dict[str, Any] = {
        "clip_size": hints.clip_size or (16, 224, 224),
        "pixel_mean": _MEAN,
        "pixel_std": _STD,
        "classes": hints.classes,
    }
    heads = {"num_heads": hints.num_heads, "decoder_num_heads": hints.decoder_num_heads}
    others = hints.heads_by_width, hints.needs_decoder
    if path.is_file():
        tensors = _read_file(path)
    else:
        told, *of_folder = hugging_face.fields(hugging_face.read_config(path), path)
        tensors = _read_folder(path)
        given = {name: value for name, value in fields.items() if getattr(hints, name, None) is not None}
        fields |= told | given
        heads = {name: heads[name] or own for name, own in zip(heads, of_folder, strict=True)}
    try:
        cleaned = torch_weights.clean(tensors)
        return torch_weights.infer(cleaned, heads, fields, *others)
    except ValueError as error:  # also what the config of a model refuses
        raise WeightsError(f"{path}: {error}") from None


def _read_file(path: pathlib.Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except Exception as error:  # a header that lies shows as many types
            raise TorchFileError(f"{path} is damaged ({error}): download it again") from None
    if not torch_file.is_torch_file(path):
        raise ExportError(
            f"{path} is no model: pass a .pth or .safetensors file, a Hugging Face folder, or an Orbax export"
        )
    content = torch_file.read(path, _tensors_of)
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return {str(name): value for name, value in content.items()}


def _tensors_of(content: Any) -> Any:
    """The model of a checkpoint, without what its optimizer keeps beside it."""
    named = [
        name for name in _CONTAINERS if isinstance(content, dict) and isinstance(content.get(name), dict)
    ]
    return content[named[0]] if named else content


def _read_folder(path: pathlib.Path) -> dict[str, Any]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"{index} is damaged ({error}): download it again") from None
        if any("/" in name or not (path / name).is_file() for name in names):
            raise ExportError(f"{index} names files that are not there: download them again")
        return {name: tensor for file in names for name, tensor in _read_file(path / file).items()}
    found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if not found:
        raise ExportError(f"{path} holds no model.safetensors: download it whole")
    return _read_file(found[0])
