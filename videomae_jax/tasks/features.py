"""Features of frozen weights, computed once and kept on disk; a killed run goes on where it was."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from videomae_jax import sharding, storage
from videomae_jax.apps import videos as named
from videomae_jax.config import Config
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.evaluation import classification
from videomae_jax.interop.export import Model
from videomae_jax.storage import Place
from videomae_jax.training import report, testing

_SAVED_EVERY = 50  # batches


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A trained model as a function to features.

    Attributes:
        path: where it comes from.
        per_token: all tokens [N, D] of a clip, else their mean [D].
    """

    path: str
    model: Model
    per_token: bool

    @property
    def parts(self) -> tuple[Any, Any]:
        """(graphdef, parameters as a nested dict)."""
        graphdef, state = nnx.split(self.model)
        return graphdef, nnx.to_pure_dict(state)

    def features(self, params: Any, video: UInt8[Array, "B T H W C"]) -> Float[Array, "B ..."]:
        """Features after the final norm, float16: half the space on disk, three digits."""
        model = nnx.merge(self.parts[0], params)
        return (model.tokens(video) if self.per_token else model.raw_features(video)).astype(jnp.float16)

    def identity(self) -> str:
        """A hash of the parameters and of how they are used."""
        digest = hashlib.sha256(repr((self.model.config, self.per_token)).encode())
        for leaf in jax.tree.leaves(self.parts[1]):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the videos of a source that could be decoded.

    Attributes:
        values: float16 [B, V, ...], a file on disk.
        records: place of each video in the source.
        failed: id -> why it could not be decoded.
    """

    values: np.ndarray
    records: np.ndarray
    failed: dict[str, str]


def extract(
    frozen: Frozen,
    source: Source,
    views: pipeline.TestViews,
    config: Config,
    mesh: Mesh,
    place: Place,
) -> Features:
    """Features of every view of every video, from `place` where they were computed before.

    `values.npy` is filled batch by batch, `done.json` tells how many; another model, source or kind of view
    begins anew.

    Raises:
        OutputError: features that are not finite, naming the first video.
    """
    folder = storage.scratch(place)  # memory-mapped, so on a disk
    folder.mkdir(parents=True, exist_ok=True)
    evaluator = testing.Evaluator(frozen.features, source, views, config, mesh)
    files = hashlib.sha256(json.dumps(named.stamps(source)).encode()).hexdigest()
    videos = f"{storage.at(source.root)} {source.fingerprint()} {files}"  # names are not enough
    identity = f"{frozen.identity()} {videos} {views} {evaluator.batch_videos}"
    done = {"identity": identity, "batches": 0, "records": [], "failed": {}}
    path, values = folder / "done.json", None
    if path.exists() and json.loads(path.read_text())["identity"] == identity:
        done = json.loads(path.read_text())
        values = np.lib.format.open_memmap(folder / "values.npy", mode="r+")
        report.say(f"{len(done['records'])} of {len(source)} features of {folder.name} are there")
        if done["failed"]:
            report.say(
                f"{len(done['failed'])} videos could not be decoded then: remove {folder} to try again"
            )
    total = -(-len(source) // evaluator.batch_videos)
    params = sharding.replicate(jax.device_get(frozen.parts[1]), mesh)
    if done["batches"] < total:
        for outputs in evaluator.batches(params, start=done["batches"]):
            if values is None:
                shape = (len(source), *outputs.values.shape[1:])
                path.unlink(missing_ok=True)  # it tells of what is overwritten now
                values = np.lib.format.open_memmap(folder / "values.npy", "w+", np.float16, shape)
            ids = [source.ids[record] for record in outputs.records]
            classification.check_finite(outputs.values, ids, frozen.path)
            values[outputs.records] = outputs.values
            done["batches"] += 1
            done["records"] += outputs.records.tolist()
            done["failed"] |= outputs.failed
            if done["batches"] % _SAVED_EVERY == 0 or done["batches"] == total:
                values.flush()
                report.write_json(path, done)
                report.say(f"features of {folder.name}: {len(done['records'])} of {len(source)} videos")
    records = np.asarray(done["records"], np.int64)
    assert values is not None
    if len(records) < len(source):
        values = _rows(values, records, folder / "kept.npy")
    return Features(values, records, done["failed"])


def _rows(values: np.ndarray, rows: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Some rows of an array on disk as another one there: they may be more than memory holds."""
    kept = np.lib.format.open_memmap(path, "w+", values.dtype, (len(rows), *values.shape[1:]))
    for start in range(0, len(rows), 256):
        kept[start : start + 256] = values[rows[start : start + 256]]
    return kept
