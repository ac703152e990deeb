"""A start from trained weights: a complete backbone or nothing, and an account of every name."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from videomae_jax.interop import weights
from videomae_jax.interop.export import ModelConfig
from videomae_jax.models import vit
from videomae_jax.models.detector import DetectorConfig
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.mae import VideoMAEConfig

_SAME = ("tubelet", "encoder", "pixel_mean", "pixel_std")  # AVA's code has a normalisation of its own


class TransferError(ValueError):
    """Weights that do not fit the model that should start from them."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Weights to start from.

    Attributes:
        params: nested dict of the parameters that were matched.
        matched, fresh, unused: names that were taken, that stay as initialised, and that have no use.
    """

    params: dict[str, Any]
    matched: list[str]
    fresh: list[str]
    unused: list[str]

    def __str__(self) -> str:
        fresh, unused = (", ".join(_folded(names)) or "none" for names in (self.fresh, self.unused))
        return f"{len(self.matched)} arrays taken; fresh: {fresh}; unused: {unused}"


def read(path: str | os.PathLike, config: ModelConfig, names: list[str]) -> Transfer:
    """Reads what a model of `config` with the parameters `names` ("encoder/embed/kernel", ...) can use.

    The backbone must be there whole. The final norm is taken from a classifier with the same pooling; that of
    a pretraining model is as one of pooling "first" (with "mean" the published norm starts fresh). A
    detector, whose norm is of every token, takes any norm that there is. Pretraining takes a decoder of its
    own sizes that predicts as many numbers. The head is taken from a model of the same kind, and kind of
    head, that knows all the classes, by their names: so one of Kinetics-710 begins on Kinetics-400, 600 or
    700 with what it knows. Classes that are numbers alone are the same if there are as many.

    Raises:
        ExportError: `path` holds no model.
        TransferError: weights of another size or kind, naming what differs.
    """
    stacks = [stack for stack in vars(config).values() if isinstance(stack, vit.Stack)]
    heads = {stack.width: stack.num_heads for stack in stacks}
    model = weights.read(path, weights.Hints(heads_by_width=heads, needs_decoder=False))
    theirs = model.config
    _check_same(path, theirs, config)
    tree: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = {"/".join(key): np.asarray(value) for key, value in flatten_dict(tree).items()}
    there, here = _norm(theirs), _norm(config)
    has_norm = f"{there}/scale" in found and (
        isinstance(config, DetectorConfig) or _pooling(theirs) == _pooling(config)
    )
    if has_norm:
        found |= {f"{here}/{name}": found.pop(f"{there}/{name}") for name in ("scale", "bias")}
    has_decoder = (
        isinstance(theirs, VideoMAEConfig)
        and isinstance(config, VideoMAEConfig)
        and (theirs.decoder, theirs.target_width) == (config.decoder, config.target_width)
        and _below(found, "decoder/") == _below(names, "decoder/")  # layer scale in both or in neither
    )
    rows = _rows_of_classes(theirs, config)
    if rows:
        found |= {f"head/{name}": found[f"head/{name}"][..., rows] for name in ("kernel", "bias")}
    taken = {here: has_norm, "encoder": True, "decoder": has_decoder, "head": bool(rows)}
    wanted = [
        name
        for name in names
        if next((is_taken for part, is_taken in taken.items() if name.startswith(f"{part}/")), False)
    ]
    extra = sorted(_below(found, "encoder/") - set(wanted) - {f"{there}/scale", f"{there}/bias"})
    if extra:
        raise TransferError(
            f"{path} has {len(extra)} arrays in its backbone that the model has no place for, the first is "
            f"{extra[0]}: model.layer_scale above 0 has gammas"
        )
    absent = sorted(set(wanted) - set(found))
    if absent:
        raise TransferError(f"{path} lacks {len(absent)} arrays of the model, the first is {absent[0]}")
    return Transfer(
        params=unflatten_dict({tuple(name.split("/")): found[name] for name in wanted}),
        matched=sorted(wanted),
        fresh=sorted(set(names) - set(wanted)),
        unused=sorted(set(found) - set(wanted)),
    )


def _check_same(path: str | os.PathLike, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Refuses a backbone of another size, or one that sees other pixels."""
    differences = [
        f"{name}: {_plain(getattr(theirs, name))} there, {_plain(getattr(ours, name))} here"
        for name in (_SAME[:2] if isinstance(ours, DetectorConfig) else _SAME)
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if differences:
        raise TransferError(
            f"{path} does not fit the model ({'; '.join(differences)}): choose the size= that it was trained "
            f"with, or other weights"
        )


def _rows_of_classes(theirs: ModelConfig, ours: ModelConfig) -> list[int]:
    """Which outputs of their head are our classes; none where it is of another kind or lacks some."""
    if not isinstance(ours, ClassifierConfig | DetectorConfig) or not isinstance(theirs, type(ours)):
        return []
    if getattr(theirs, "head", "") != getattr(ours, "head", "") or set(ours.classes) - set(theirs.classes):
        return []
    if len(ours.classes) != len(theirs.classes) and _are_numbers(ours.classes):
        return []  # numbers of another count of classes are other classes
    return [theirs.classes.index(name) for name in ours.classes]


def _norm(config: ModelConfig) -> str:
    """The final norm's name."""
    return "encoder/norm" if isinstance(config, VideoMAEConfig) else "norm"


def _below(names: Iterable[str], start: str) -> set[str]:
    return {name for name in names if name.startswith(start)}


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether classes are called 0, 1, ...: lists and files that name none."""
    return list(classes) == [str(i) for i in range(len(classes))]


def _pooling(config: ModelConfig) -> str:
    """Of which tokens the norm before a head is."""
    if isinstance(config, ClassifierConfig):
        return config.pooling
    return "first" if isinstance(config, VideoMAEConfig) else "every"


def _folded(names: list[str]) -> list[str]:
    """The distinct parents, such as decoder/blocks for all that is below it."""
    return sorted({"/".join(name.split("/")[:2]) for name in names})


def _plain(value: Any) -> str:
    return str(value) if not dataclasses.is_dataclass(value) else str(vars(value))
