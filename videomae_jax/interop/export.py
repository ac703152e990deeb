"""The Orbax export, one folder with a model's parameters and what is needed to use them.

    FOLDER/params/   the parameter tree (Orbax, float32)
    FOLDER/meta/     JSON: format, kind, model (its config), recipe (masking, target, sampling; may be {})

A training checkpoint has the same two items beside its optimizer, so it can be loaded as it is.
"""

import dataclasses
import json
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx

from videomae_jax import storage
from videomae_jax.models import attention, functional
from videomae_jax.models.detector import ActionDetector, DetectorConfig
from videomae_jax.models.heads import ClassifierConfig, VideoClassifier
from videomae_jax.models.mae import VideoMAE, VideoMAEConfig
from videomae_jax.storage import Place

Model = VideoMAE | VideoClassifier | ActionDetector
ModelConfig = VideoMAEConfig | ClassifierConfig | DetectorConfig

FORMAT = 1
KINDS: dict[str, tuple[type[Model], type[ModelConfig]]] = {
    "VideoMAE": (VideoMAE, VideoMAEConfig),
    "VideoClassifier": (VideoClassifier, ClassifierConfig),
    "ActionDetector": (ActionDetector, DetectorConfig),
}


def _write_small_arrays_whole() -> None:
    """Lets replicas share the writing of large arrays only.

    By default Orbax cuts every replicated array for all devices that have it, by a program compiled for each
    shape: 15 s instead of 0.1 at the first checkpoint of 60 small arrays on eight devices.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**24)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # that a handler is replaced is what is wanted
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    logging.set_verbosity(verbosity)


_write_small_arrays_whole()


class ExportError(ValueError):
    """A folder that is no export, or one that this version cannot read."""


def metadata(kind: type[Model], config: ModelConfig, recipe: dict[str, Any]) -> dict[str, Any]:
    """The `meta` item of an export or checkpoint."""
    return {"format": FORMAT, "kind": kind.__name__, "model": config.to_dict(), "recipe": recipe}


def save(model: Model, path: str | os.PathLike, recipe: dict[str, Any] | None = None) -> None:
    """Writes `model` as an Orbax export; the folder appears only when it is whole.

    Args:
        recipe: how the model was trained, kept beside it: `mask`, `mask_ratio`, `normalize_target`,
            `stride`. `reconstruct` takes its defaults from it.

    Raises:
        ExportError: the folder exists.
    """
    folder = storage.at(path)
    if folder.exists():
        raise ExportError(f"{folder} exists: choose another path or remove it")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    write(folder, params, metadata(type(model), model.config, recipe or {}))


def write(folder: Place, params: Any, meta: dict[str, Any]) -> None:
    """Writes an export from its parts into a new folder."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            folder,
            ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                meta=ocp.args.JsonSave(meta),
            ),
        )


def is_whole(folder: Place) -> bool:
    """Whether a folder holds all of an export or checkpoint; in stores a marker tells, written last."""
    return (folder / "meta" / "metadata").is_file() and ocp.utils.is_checkpoint_finalized(folder)


def newest_step(folder: Place) -> int | None:
    """The newest of the whole checkpoints FOLDER/STEP; None without one."""
    steps = [place for place in folder.glob("[0-9]*") if place.name.isdigit() and is_whole(place)]
    return max((int(place.name) for place in steps), default=None)


def find(path: str | os.PathLike) -> Place:
    """The folder with `params` and `meta` that `path` means: an export, a checkpoint, or a work folder.

    A work folder means its newest checkpoint; WORKDIR/best is an export.

    Raises:
        ExportError: it is none of these.
    """
    folder = storage.at(path)
    for parent in (folder / "checkpoints", folder):
        step = newest_step(parent)
        if step is not None:
            return parent / str(step)
    if not is_whole(folder):
        what = "holds no model" if folder.exists() else "is not there, so it holds no model"
        raise ExportError(
            f"{folder} {what}: pass an export, a checkpoint, the work folder of a run that has saved one, a "
            f".pth or .safetensors file, or a Hugging Face folder"
        )
    return folder


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The `meta` item of an export, checkpoint or work folder.

    Raises:
        ExportError: there is none, or its format or kind is unknown to this version.
    """
    folder = find(path)
    try:
        meta = json.loads((folder / "meta" / "metadata").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{folder / 'meta'} is damaged ({type(error).__name__}): save it again") from None
    if not isinstance(meta, dict):
        raise ExportError(f"{folder / 'meta'} is damaged (no object): save it again")
    if meta.get("format") != FORMAT or meta.get("kind") not in KINDS:
        raise ExportError(
            f"{folder} has format {meta.get('format')} and kind {meta.get('kind')}; this version reads "
            f"format {FORMAT}, kind {' or '.join(KINDS)}: install the version that wrote it"
        )
    return meta


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The config of the model in an export, checkpoint or work folder. Raises as `read_metadata`."""
    meta = read_metadata(path)
    try:
        return KINDS[meta["kind"]][1].from_dict(meta["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{find(path) / 'meta'} is damaged ({error}): save it again") from None


def load(path: str | os.PathLike) -> Model:
    """Reads a model from an Orbax export, a checkpoint, or the newest checkpoint of a work folder.

    It computes as it was trained; on a CPU in float32.

    Raises:
        ExportError: see `read_metadata`.
    """
    config = read_config(path)
    kind: Any = KINDS[read_metadata(path)["kind"]][0]
    # What is fast where it was trained may be slow here, or lacking.
    backend, compute = jax.default_backend(), config.compute
    if backend == "cpu":
        compute = dataclasses.replace(compute, dtype="float32")
    if (attention.PLATFORM_OF | {"blocks": "cpu"}).get(compute.attention, backend) != backend:
        instead = attention.best(backend, compute.dtype, kernels=False)
        compute = dataclasses.replace(compute, attention=instead)
    config = dataclasses.replace(config, compute=compute)
    graphdef, abstract = functional.abstract(kind, config)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(find(path) / "params", shapes)
    return nnx.merge(graphdef, params)
