"""Weights of PyTorch models in and out: one table (their name, our path, transform), read in both directions.

Two layouts. "official": the published code's files, fused qkv with separate q and v biases. "hf": Hugging
Face's VideoMAE folders, separate query, key and value. Importing is strict: every tensor is used once, every
parameter is filled once, shapes and kinds are compared; whatever does not fit is named.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from videomae_jax.models import detector, vit
from videomae_jax.models.detector import DetectorConfig
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.mae import VideoMAEConfig

PublishedConfig = VideoMAEConfig | ClassifierConfig | DetectorConfig
LAYOUTS = ("official", "hf")


class WeightsError(ValueError):
    """Tensors that are not those of a VideoMAE, or not all of them."""


# From PyTorch's [out, in] to ours; the three parts of a fused qkv go to a middle axis.
def _transpose(w: np.ndarray) -> np.ndarray:
    return w.T


def _qkv(w: np.ndarray) -> np.ndarray:
    return w.T.reshape(w.shape[1], 3, -1)


def _qkv_back(w: np.ndarray) -> np.ndarray:
    return w.reshape(w.shape[0], -1).T


def _conv(w: np.ndarray) -> np.ndarray:
    return w.transpose(2, 3, 4, 1, 0).reshape(-1, w.shape[0])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of their tensors.

    Attributes:
        theirs: its name.
        ours: path of the parameter that it fills, or that it is a part of.
        layer: its place on the parameter's depth axis; None: the parameter has none.
        part: 0, 1 or 2 for a query, key or value kernel, a part of the fused one; None: all of it.
        transform: "same", "transpose", "qkv", "conv" or "token".
    """

    theirs: str
    ours: str
    layer: int | None = None
    part: int | None = None
    transform: str = "same"

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Their tensor in our layout."""
        forward: dict[str, Callable] = {
            "transpose": _transpose,
            "qkv": _qkv,
            "conv": _conv,
            "token": np.ravel,
        }
        return forward[self.transform](tensor) if self.transform != "same" else tensor

    def to_theirs(self, array: np.ndarray, config: PublishedConfig) -> np.ndarray:
        """The inverse of `to_ours`, on this entry's part of our parameter."""
        if self.layer is not None:
            array = array[self.layer]
        if self.part is not None:
            array = array[:, self.part]
        if self.transform == "transpose":
            array = array.T
        elif self.transform == "qkv":
            array = _qkv_back(array)
        elif self.transform == "conv":
            t, h, w = config.tubelet
            array = array.reshape(t, h, w, config.channels, -1).transpose(4, 3, 0, 1, 2)
        elif self.transform == "token":
            array = array.reshape(1, 1, -1)
        return np.ascontiguousarray(array)


_Rows = tuple[tuple[str, str, str, int | None], ...]

_OFFICIAL_BLOCK: _Rows = (
    ("norm1.weight", "norm1/scale", "same", None),
    ("norm1.bias", "norm1/bias", "same", None),
    ("attn.q_bias", "attention/q_bias", "same", None),
    ("attn.v_bias", "attention/v_bias", "same", None),
    ("attn.qkv.weight", "attention/qkv", "qkv", None),
    ("attn.proj.weight", "attention/out/kernel", "transpose", None),
    ("attn.proj.bias", "attention/out/bias", "same", None),
    ("norm2.weight", "norm2/scale", "same", None),
    ("norm2.bias", "norm2/bias", "same", None),
    ("mlp.fc1.weight", "fc1/kernel", "transpose", None),
    ("mlp.fc1.bias", "fc1/bias", "same", None),
    ("mlp.fc2.weight", "fc2/kernel", "transpose", None),
    ("mlp.fc2.bias", "fc2/bias", "same", None),
)
_OFFICIAL_SCALES: _Rows = (("gamma_1", "gamma1", "same", None), ("gamma_2", "gamma2", "same", None))
_HF_BLOCK: _Rows = (
    ("layernorm_before.weight", "norm1/scale", "same", None),
    ("layernorm_before.bias", "norm1/bias", "same", None),
    ("attention.attention.q_bias", "attention/q_bias", "same", None),
    ("attention.attention.v_bias", "attention/v_bias", "same", None),
    ("attention.attention.query.weight", "attention/qkv", "transpose", 0),
    ("attention.attention.key.weight", "attention/qkv", "transpose", 1),
    ("attention.attention.value.weight", "attention/qkv", "transpose", 2),
    ("attention.output.dense.weight", "attention/out/kernel", "transpose", None),
    ("attention.output.dense.bias", "attention/out/bias", "same", None),
    ("layernorm_after.weight", "norm2/scale", "same", None),
    ("layernorm_after.bias", "norm2/bias", "same", None),
    ("intermediate.dense.weight", "fc1/kernel", "transpose", None),
    ("intermediate.dense.bias", "fc1/bias", "same", None),
    ("output.dense.weight", "fc2/kernel", "transpose", None),
    ("output.dense.bias", "fc2/bias", "same", None),
)


def table(config: PublishedConfig, layout: str) -> Iterator[Entry]:
    """Every tensor of a model in a layout.

    Raises:
        WeightsError: a model that the layout has no names for.
    """
    is_hf = layout == "hf"
    has_head = isinstance(config, ClassifierConfig | DetectorConfig)
    if is_hf and config.layer_scale > 0:
        raise WeightsError("Hugging Face's VideoMAE has no layer scale: export to the official layout")
    prefix = "videomae." if is_hf else "" if has_head else "encoder."
    embed = "embeddings.patch_embeddings.projection" if is_hf else "patch_embed.proj"
    yield Entry(f"{prefix}{embed}.weight", "encoder/embed/kernel", transform="conv")
    yield Entry(f"{prefix}{embed}.bias", "encoder/embed/bias")
    encoder_blocks = "videomae.encoder.layer" if is_hf else f"{prefix}blocks"
    yield from _blocks(encoder_blocks, "encoder/blocks", config.encoder.depth, config, is_hf)
    if has_head:
        is_mean = isinstance(config, ClassifierConfig) and config.pooling == "mean"
        norm = "fc_norm" if is_mean else f"{prefix}{'layernorm' if is_hf else 'norm'}"
        head = "classifier" if is_hf else "head"
        yield from _pair(norm, "norm", "scale")
        yield Entry(f"{head}.weight", "head/kernel", transform="transpose")
        yield Entry(f"{head}.bias", "head/bias")
        return
    if config.encoder_norm:
        yield from _pair(f"{prefix}{'layernorm' if is_hf else 'norm'}", "encoder/norm", "scale")
    if config.decoder is None:
        return
    yield Entry(_TO_DECODER, "decoder/project", transform="transpose")
    yield Entry("mask_token", "decoder/mask_token", transform="token")
    decoder_blocks = "decoder.decoder_layers" if is_hf else "decoder.blocks"
    yield from _blocks(decoder_blocks, "decoder/blocks", config.decoder.depth, config, is_hf)
    yield from _pair("decoder.norm", "decoder/norm", "scale")
    yield Entry("decoder.head.weight", "decoder/head/kernel", transform="transpose")
    yield Entry("decoder.head.bias", "decoder/head/bias")


def _pair(theirs: str, ours: str, weight: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}/{weight}")
    yield Entry(f"{theirs}.bias", f"{ours}/bias")


def _blocks(theirs: str, ours: str, depth: int, config: PublishedConfig, is_hf: bool) -> Iterator[Entry]:
    rows = _HF_BLOCK if is_hf else _OFFICIAL_BLOCK
    if config.layer_scale > 0:
        rows += _OFFICIAL_SCALES
    for layer in range(depth):
        for name, path, transform, part in rows:
            yield Entry(f"{theirs}.{layer}.{name}", f"{ours}/{path}", layer, part, transform)


def to_ours(
    tensors: dict[str, np.ndarray],
    config: PublishedConfig,
    layout: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Our parameters by path, float32, from their tensors, which are taken out of `tensors` one by one.

    Args:
        shapes: of every parameter of the model.

    Raises:
        WeightsError: a tensor that is missing, superfluous, of another shape, or not of floats.
    """
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    filled = dict.fromkeys(shapes, 0)
    for entry in table(config, layout):
        tensor = tensors.pop(entry.theirs, None)
        if tensor is None:
            raise WeightsError(f"the tensor {entry.theirs} is missing")
        if tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
            raise WeightsError(f"the tensor {entry.theirs} is of {tensor.dtype}, not of floats")
        place = params[entry.ours]
        if entry.layer is not None:
            place = place[entry.layer]
        if entry.part is not None:
            place = place[:, entry.part]
        expected = entry.to_theirs(np.broadcast_to(np.float32(0), shapes[entry.ours]), config).shape
        if tensor.shape != expected:
            raise WeightsError(
                f"the tensor {entry.theirs} has shape {list(tensor.shape)}, not {list(expected)}"
            )
        place[...] = entry.to_ours(tensor)
        filled[entry.ours] += place.size
    if tensors:
        raise WeightsError(f"{len(tensors)} tensors are no part of the model, the first is {min(tensors)}")
    wrong = [path for path, count in filled.items() if count != params[path].size]
    if wrong:
        raise WeightsError(f"the parameter {wrong[0]} is not filled: the table lacks it")
    return params


def to_theirs(
    params: Mapping[str, np.ndarray], config: PublishedConfig, layout: str
) -> dict[str, np.ndarray]:
    """Their tensors by name from our parameters by path; the inverse of `to_ours`, bit for bit.

    Raises:
        WeightsError: an unknown layout, or a model that it has no names for.
    """
    if layout not in LAYOUTS:
        raise WeightsError(f"layout {layout!r} is unknown: use {' or '.join(LAYOUTS)}")
    entries = list(table(config, layout))
    unnamed = set(params) - {entry.ours for entry in entries}
    if unnamed:
        raise WeightsError(f"the layout {layout} has no name for {min(unnamed)}")
    return {entry.theirs: entry.to_theirs(np.asarray(params[entry.ours]), config) for entry in entries}


_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # of the published encoders, by width
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
_TO_DECODER = "encoder_to_decoder.weight"  # in both layouts


def clean(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors under the names of `table`: prefixes of wrappers gone, both spellings of biases as one.

    Raises:
        WeightsError: something that is no tensor, or a key bias that is not zero.
    """
    if any(name.endswith(("pos_embed_spatial", "decoder_pos_embed_spatial")) for name in tensors):
        raise WeightsError(
            "these are weights of Meta's mae_st, whose learned positions and class token a VideoMAE does not "
            "have: they cannot be converted"
        )
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):
            raise WeightsError(f"{name} is a {type(tensor).__name__}, not a tensor")
        short = re.sub(r"^(_orig_mod\.|module\.)+", "", name)
        short = re.sub(r"attention\.attention\.(query|value)\.bias$", _bias_name, short)
        if short.endswith("attention.attention.key.bias"):
            if np.any(np.asarray(tensor, np.float32)):
                raise WeightsError(f"the key bias {name} is not zero, and a VideoMAE has none")
            continue
        if short in found:
            raise WeightsError(f"the tensor {short} is there twice")
        found[short] = tensor
    is_pretraining = _TO_DECODER in found
    if not is_pretraining and not any(name.startswith("videomae.") for name in found):
        # Official classifiers and encoders, also as parts of another model; a bare Hugging Face encoder.
        if "embeddings.patch_embeddings.projection.weight" in found:
            return {f"videomae.{name}": tensor for name, tensor in found.items()}
        return {re.sub(r"^(backbone|encoder)\.", "", name): tensor for name, tensor in found.items()}
    return found


def _bias_name(match: re.Match) -> str:
    return f"attention.attention.{match[1][0]}_bias"


def infer(
    tensors: Mapping[str, np.ndarray],
    heads: Mapping[str, int | None],
    fields: Mapping[str, Any],
    heads_by_width: Mapping[int, int],
    needs_decoder: bool,
) -> tuple[PublishedConfig, str, dict[str, np.ndarray]]:
    """(config, layout, tensors under the table's names) of cleaned tensors.

    Args:
        heads: "num_heads" and "decoder_num_heads", None where they follow from a published width.
        fields: of the config, what tensors do not tell: clip_size, classes, epsilons, pixel statistics.
        heads_by_width: of stacks that are so wide, where they neither follow nor are given.
        needs_decoder: else one whose heads are not known has one.

    Raises:
        WeightsError: not a VideoMAE, or head counts that must be given.
    """
    is_hf = any(name.startswith("videomae.") for name in tensors)
    layout, has_decoder = "hf" if is_hf else "official", _TO_DECODER in tensors
    prefix = "videomae." if is_hf else "encoder." if has_decoder else ""
    embed = f"{prefix}{'embeddings.patch_embeddings.projection' if is_hf else 'patch_embed.proj'}.weight"
    if embed not in tensors or tensors[embed].ndim != 5:
        raise WeightsError(
            f"there is no tubelet embedding {embed} with 5 axes: this is no VideoMAE that is known"
        )
    width, channels, *tubelet = tensors[embed].shape
    if len(fields["pixel_mean"]) != channels:
        raise WeightsError(f"the tubelet embedding has {channels} channels, not {len(fields['pixel_mean'])}")
    stacks = {"num_heads": ("videomae.encoder.layer" if is_hf else f"{prefix}blocks", width)}
    if has_decoder:
        blocks = "decoder.decoder_layers" if is_hf else "decoder.blocks"
        stacks["decoder_num_heads"] = (blocks, len(tensors[_TO_DECODER]))
    counts = _heads({name: wide for name, (_, wide) in stacks.items()}, heads, heads_by_width, needs_decoder)
    encoder, *decoder = (_stack(tensors, *stacks[name], layout, counts[name]) for name in stacks)
    shared = {
        "tubelet": tuple(tubelet),
        "encoder": encoder,
        "layer_scale": float(f"{prefix}blocks.0.gamma_1" in tensors),
        **fields,
    }
    if f"{'classifier' if is_hf else 'head'}.weight" in tensors:
        return _with_head(tensors, layout, shared), layout, dict(tensors)
    shared = {name: value for name, value in shared.items() if name not in ("classes", "head")}
    has_norm = f"{prefix}{'layernorm' if is_hf else 'norm'}.weight" in tensors
    config = VideoMAEConfig(**shared, decoder=decoder[0] if decoder else None, encoder_norm=has_norm)
    if is_hf or has_decoder:
        return config, layout, dict(tensors)
    # An encoder alone has no prefix.
    return config, layout, {f"encoder.{name}": tensor for name, tensor in tensors.items()}


def _with_head(
    tensors: Mapping[str, np.ndarray], layout: str, shared: dict[str, Any]
) -> ClassifierConfig | DetectorConfig:
    """The config of what knows classes."""
    head = f"{'classifier' if layout == 'hf' else 'head'}.weight"
    pooling, count = "mean" if "fc_norm.weight" in tensors else "first", len(tensors[head])
    if (layout, pooling, count) == ("official", "first", 80):
        return _published_detector(shared)
    if pooling == "first":
        shared["final_norm_epsilon"] = None  # its norm is the encoder's own
    classes = shared.pop("classes") or tuple(map(str, range(count)))
    if len(classes) != count:
        raise WeightsError(f"{head} has {count} classes, their names are {len(classes)}")
    return ClassifierConfig(**shared, classes=tuple(classes), pooling=pooling)


def _published_detector(shared: dict[str, Any]) -> DetectorConfig:
    """A detector of AVA's 80 actions, which has the names of a classifier of the first token."""
    shared |= {"pixel_mean": detector.PUBLISHED_MEAN, "pixel_std": detector.PUBLISHED_STD}
    classes = shared.pop("classes") or tuple(str(1 + action) for action in range(80))  # AVA's numbers
    if len(classes) != 80:
        raise WeightsError(f"this is a detector of AVA's 80 actions, their names are {len(classes)}")
    # Whole frames are tested.
    return DetectorConfig(**shared, classes=tuple(classes), position_resize="interpolate")


def _stack(
    tensors: Mapping[str, np.ndarray], prefix: str, width: int, layout: str, num_heads: int
) -> vit.Stack:
    """The blocks named PREFIX.0 and so on."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    layers = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    wide = f"{prefix}.0.{'intermediate.dense' if layout == 'hf' else 'mlp.fc1'}.weight"
    if layers != set(range(len(layers))) or wide not in tensors:
        raise WeightsError(f"the blocks {prefix}.0, .1, ... are not there one after the other")
    return vit.Stack(width=width, depth=len(layers), num_heads=num_heads, mlp_dim=tensors[wide].shape[0])


def _heads(
    widths: Mapping[str, int],
    given: Mapping[str, int | None],
    by_width: Mapping[int, int],
    needs_decoder: bool,
) -> dict[str, int]:
    """The heads of each stack: given, as published, or as other stacks of its width."""
    published = {"num_heads": _HEADS, "decoder_num_heads": _DECODER_HEADS}
    found = {
        name: {**by_width, **published[name]}.get(width) if given[name] is None else given[name]
        for name, width in widths.items()
    }
    if not needs_decoder and found.get("decoder_num_heads", 1) is None:
        found["decoder_num_heads"] = 1
    unknown = [name for name, count in found.items() if count is None]
    if unknown:
        raise WeightsError(
            f"the file does not tell the heads of its {' and '.join(str(widths[x]) for x in unknown)} wide "
            f"blocks: pass {', '.join(f'{x}=...' for x in unknown)} ({' '.join(f'--{x}' for x in unknown)}; "
            f"in training the size= that it was trained with)"
        )
    return {name: count for name, count in found.items() if count is not None}
