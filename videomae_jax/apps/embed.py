"""Features of videos of any length: windows of a clip's frames, one after the other, to .npz or Parquet."""

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from flax import nnx
from jaxtyping import UInt8

from videomae_jax import sharding, storage
from videomae_jax.apps import videos
from videomae_jax.config import UserError
from videomae_jax.data import augment, decode, reading
from videomae_jax.data.reading import AnyVideo
from videomae_jax.evaluation import classification
from videomae_jax.hosts import Lock
from videomae_jax.interop import weights
from videomae_jax.storage import Place

SUFFIXES = (".npz", ".parquet")


@dataclasses.dataclass(frozen=True)
class Options:
    """How videos are cut into windows.

    Attributes:
        step: frames of the file from one window to the next; 0: windows without overlap.
        per_token: every token [N, D] of a window, not their mean [D].
        batch: windows at once, rounded up to the devices.
        split: of a divided folder; "all".
        hints: what files of weights do not tell; the stride counts for any.
    """

    step: int = 0
    per_token: bool = False
    batch: int = 8
    split: str = "all"
    hints: weights.Hints = dataclasses.field(default_factory=weights.Hints)


def windows(
    video: AnyVideo, frames: int, stride: int, step: int, size: tuple[int, int]
) -> Iterator[tuple[int, UInt8[np.ndarray, "T H W 3"]]]:
    """(first frame, clip) of each window that lies in the video; one of a video too short, its end repeated.

    The centre of each frame is taken, as in validation. The video is decoded once from its beginning; memory
    holds the frames of a window, as small as the model's, whatever its length.
    """
    span = (frames - 1) * stride + 1
    starts = range(0, max(video.num_frames - span, 0) + 1, step)
    places = stride * np.arange(frames)
    last = video.num_frames - 1
    needed = np.unique(np.minimum(np.add.outer(np.arange(0, starts.stop, step), places), last))
    coming = zip(needed.tolist(), video.each(needed.tolist()), strict=True)
    held: dict[int, np.ndarray] = {}
    for start in starts:
        held = {index: frame for index, frame in held.items() if index >= start}
        wanted = np.minimum(start + places, last)
        while int(wanted[-1]) not in held:
            index, frame = next(coming)
            held[index] = augment.validation_crop(frame[None], size)[0]
        yield start, np.stack([held[int(index)] for index in wanted])


def run(paths: Sequence[str], checkpoint: str, out: str, options: Options) -> dict[str, Any]:
    """Writes the features of every window of every video, with ids and seconds; returns what was done.

    Arrays (.npz) or columns (.parquet): id, start and end in seconds (NaN where the file has no times),
    features (float32). OUT.json has counts and the videos that could not be decoded. A video that is done is
    kept in OUT.parts until all are, so a killed run goes on, with the same files, weights and options only.

    Raises:
        UserError: another suffix, a size that does not fit, or no video that can be decoded.
        OutputError: features that are not finite.
    """
    target = storage.at(out)
    if target.suffix not in SUFFIXES:
        raise UserError(f"--out={out} has an unknown suffix: use {', '.join(SUFFIXES)}")
    if options.step < 0 or options.batch < 1 or options.hints.stride == 0:
        raise UserError("--step must not be negative, --stride and --batch must be positive")
    videos.make_room(target)
    named = videos.find(paths, options.split)
    model = weights.read(checkpoint, options.hints)
    # A model that was trained on parts of videos (stride 0) is shown consecutive frames.
    stride = weights.read_stride(checkpoint, options.hints) or 1
    frames, *size = model.config.clip_size
    step = options.step or frames * stride
    embed = _embedder(model, options)
    parts = storage.scratch(target.with_name(target.name + ".parts"))
    with Lock(target.with_name(target.name + ".lock")):
        _claim(parts, json.dumps([identity(model), stride, step, options.per_token]))
        done: dict[str, pathlib.Path] = {}
        failed = {}
        for video in tqdm.tqdm(named, unit="video", disable=None):
            part = parts / f"{video.identity()}.npz"
            if not part.exists():
                try:
                    how = (frames, stride, step, (size[0], size[1]), embed, options.batch)
                    rows = reading.patiently(lambda video=video, how=how: _embed_video(video, *how))
                except decode.DecodeError as error:
                    failed[video.name] = str(error)
                    tqdm.tqdm.write(f"cannot be decoded: {error}")
                    continue
                classification.check_finite(rows["features"].reshape(1, -1), [video.name], checkpoint)
                partial = part.with_suffix(".partial")
                with partial.open("wb") as file:
                    np.savez(file, **rows)  # pyright: ignore[reportArgumentType]
                partial.replace(part)
            done[video.name] = part
        if not done:
            shutil.rmtree(parts)
            raise UserError(f"none of the {len(named)} videos can be decoded: {next(iter(failed.values()))}")
        joined = _join(dict(sorted(done.items())), target)
        summary = {"videos": len(done), "videos_failed": len(failed), "failed": failed, **joined}
        text = json.dumps(summary, indent=2) + "\n"
        storage.write_text(target.with_name(target.name + ".json"), text)
        shutil.rmtree(parts)
    return summary


def identity(model: Any) -> str:
    """A hash of a model's parameters and of how they are used."""
    digest = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _claim(parts: pathlib.Path, identity: str) -> None:
    """Makes the folder of parts this run's; what a run with other weights or options left is removed."""
    name = parts / "identity.json"
    if parts.exists() and (not name.exists() or name.read_text() != identity):
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    name.write_text(identity)


def _embedder(loaded: Any, options: Options) -> Callable[[np.ndarray], np.ndarray]:
    """A function of up to `batch` clips to their features, on all devices, compiled once."""
    mesh = sharding.make_mesh(-1, 1, 1)
    batch = -(-options.batch // mesh.size) * mesh.size
    graphdef, params = nnx.split(loaded)
    params = jax.device_put(nnx.to_pure_dict(params), sharding.replicated(mesh))

    def features(params: Any, video: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.tokens(video) if options.per_token else model.raw_features(video)

    compiled = jax.jit(sharding.by_rows(features, mesh), out_shardings=sharding.replicated(mesh))

    def embed(clips: np.ndarray) -> np.ndarray:
        padded = np.zeros((batch, *clips.shape[1:]), np.uint8)
        padded[: len(clips)] = clips
        return np.asarray(compiled(params, sharding.global_batch(mesh, {"video": padded})["video"]))[
            : len(clips)
        ]

    return embed


def _embed_video(
    named: videos.Named,
    frames: int,
    stride: int,
    step: int,
    size: tuple[int, int],
    embed: Callable[[np.ndarray], np.ndarray],
    batch: int,
) -> dict[str, np.ndarray]:
    """Seconds and features of a video's windows.

    Raises:
        DecodeError: the video cannot be decoded.
    """
    starts, found, waiting = [], [], []
    with named.open() as video:
        for start, clip in windows(video, frames, stride, step, size):
            starts.append(start)
            waiting.append(clip)
            if len(waiting) == batch:
                found.append(embed(np.stack(waiting)))
                waiting = []
        if waiting:
            found.append(embed(np.stack(waiting)))
        last = [min(start + (frames - 1) * stride, video.num_frames - 1) for start in starts]
        first_time = video.time_of(0) or 0
        times = [[video.time_of(i) for i in places] for places in (starts, last)]
    seconds = [[math.nan if t is None else float(t - first_time) for t in row] for row in times]
    return {"start": np.array(seconds[0]), "end": np.array(seconds[1]), "features": np.concatenate(found)}


def _join(parts: dict[str, pathlib.Path], target: Place) -> dict[str, Any]:
    """Writes all parts, by the names of their videos, as one file; one part at a time is in memory."""
    with storage.output(target) as file:
        (_write_arrays if target.suffix == ".npz" else _write_parquet)(parts, file)
    total = sum(len(_column(part, "start")) for part in parts.values())
    return {"windows": total, "out": str(target)}


def _column(part: pathlib.Path, name: str) -> np.ndarray:
    with np.load(part) as rows:
        return rows[name]


def _write_arrays(parts: dict[str, pathlib.Path], path: pathlib.Path) -> None:
    counts = [len(_column(part, "start")) for part in parts.values()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        ids = np.repeat(np.array(list(parts)), counts)
        with archive.open("id.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, ids)
        for name in ("start", "end", "features"):
            first = _column(next(iter(parts.values())), name)
            shape = (sum(counts), *first.shape[1:])
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts.values():
                    file.write(np.ascontiguousarray(_column(part, name)).tobytes())


def _write_parquet(parts: dict[str, pathlib.Path], path: pathlib.Path) -> None:
    import pyarrow
    from pyarrow import parquet

    writer = None
    try:
        for name, part in parts.items():
            with np.load(part) as rows:
                values, start, end = rows["features"], rows["start"], rows["end"]
            width = math.prod(values.shape[1:])
            offsets = pyarrow.array(np.arange(len(values) + 1) * width)
            flat = pyarrow.array(values.astype(np.float32).reshape(-1))
            table = {
                **{"id": pyarrow.array([name] * len(values)), "start": start, "end": end},
                "features": pyarrow.LargeListArray.from_arrays(offsets, flat),
            }
            shape = {"shape": json.dumps(values.shape[1:])}
            table = pyarrow.table(table).replace_schema_metadata(shape)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()
