"""Features of videos of any length: windows of a clip's frames, one after the other, to .npz or Parquet."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from videomae_jax import sharding
from videomae_jax.config import UserError
from videomae_jax.data import augment, decode, prepared, reading, sources
from videomae_jax.data.reading import AnyVideo
from videomae_jax.data.sources import Source
from videomae_jax.interop import weights

SUFFIXES = (".npz", ".parquet")
_READ_AT_ONCE = 32  # frames as large as the file's; the others are kept as small as the model's


@dataclasses.dataclass(frozen=True)
class Options:
    """How videos are cut into windows.

    Attributes:
        stride: frames of the file from one frame of a window to the next; 0: as the model was trained.
        step: frames of the file from one window to the next; 0: windows without overlap.
        per_token: every token [N, D] of a window, not their mean [D].
        batch: windows at once, rounded up to the devices.
    """

    stride: int = 0
    step: int = 0
    per_token: bool = False
    batch: int = 8


def open_videos(path: str) -> Source:
    """The videos that a path means: one file, a folder, a list, or prepared data."""
    place = pathlib.Path(path)
    if place.is_file() and place.suffix.lower() in sources.SUFFIXES:
        return sources.VideoSource(str(place.parent), (place.name,), (-1,))
    return prepared.open_source(path, "train")


def windows(
    video: AnyVideo, frames: int, stride: int, step: int, size: tuple[int, int]
) -> Iterator[tuple[int, UInt8[np.ndarray, "T H W 3"]]]:
    """(first frame, clip) of each window that lies in the video; one of a video too short, its end repeated.

    The centre of each frame is taken, as in validation. Memory does not grow with the length of the video.
    """
    span = (frames - 1) * stride + 1
    starts = range(0, max(video.num_frames - span, 0) + 1, step)
    held: dict[int, np.ndarray] = {}
    for start in starts:
        held = {index: frame for index, frame in held.items() if index >= start}
        wanted = np.minimum(start + stride * np.arange(frames), video.num_frames - 1)
        absent = sorted(set(wanted.tolist()) - set(held))
        for first in range(0, len(absent), _READ_AT_ONCE):
            part = absent[first : first + _READ_AT_ONCE]
            held |= dict(zip(part, augment.validation_crop(video.read(part), size), strict=True))
        yield start, np.stack([held[int(index)] for index in wanted])


def run(path: str, checkpoint: str, out: str, options: Options) -> dict[str, Any]:
    """Writes the features of every window of every video, with ids and seconds; returns what was done.

    Arrays (.npz) or columns (.parquet): id, start and end in seconds, features (float32). OUT.json has counts
    and the videos that could not be decoded. A video that is done is kept in OUT.parts until all are, so a
    killed run goes on.

    Raises:
        UserError: another suffix, a size that does not fit, or no video that can be decoded.
    """
    target = pathlib.Path(out)
    if target.suffix not in SUFFIXES:
        raise UserError(f"--out={out} has an unknown suffix: use {', '.join(SUFFIXES)}")
    if min(options.stride, options.step) < 0 or options.batch < 1:
        raise UserError("--stride and --step must not be negative, --batch must be positive")
    videos = open_videos(path)
    model = weights.load(checkpoint)
    stride = options.stride or weights.read_stride(checkpoint, weights.Hints()) or 1
    frames, *size = model.config.clip_size
    step = options.step or frames * stride
    embed = _embedder(model, options)
    parts = target.with_name(target.name + ".parts")
    identity = json.dumps([str(checkpoint), stride, step, options.per_token, videos.fingerprint()])
    _claim(parts, identity)
    failed = {}
    for record in (videos[i] for i in range(len(videos))):
        part = parts / f"{hashlib.sha256(record['name'].encode()).hexdigest()[:24]}.npz"
        if part.exists():
            continue
        try:
            if record["error"]:
                raise decode.DecodeError(record["error"])
            with reading.open_video(record["video"], record["name"]) as video:
                rows = _embed_video(video, frames, stride, step, (size[0], size[1]), embed, options.batch)
        except decode.DecodeError as error:
            failed[record["name"]] = str(error)
            print(f"cannot be decoded: {error}", flush=True)
            continue
        partial = part.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **{"id": np.full(len(rows["start"]), record["name"]), **rows})
        os.replace(partial, part)
    if len(failed) == len(videos):
        shutil.rmtree(parts)
        raise UserError(
            f"none of the {len(videos)} videos in {path} can be decoded: {next(iter(failed.values()))}"
        )
    done = _join(parts, target)
    summary = {"videos": len(videos) - len(failed), "videos_failed": len(failed), "failed": failed, **done}
    target.with_name(target.name + ".json").write_text(json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(parts)
    return summary


def _claim(parts: pathlib.Path, identity: str) -> None:
    """Makes the folder of parts this run's; what another run left is removed."""
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
    video: AnyVideo,
    frames: int,
    stride: int,
    step: int,
    size: tuple[int, int],
    embed: Callable[[np.ndarray], np.ndarray],
    batch: int,
) -> dict[str, np.ndarray]:
    """Seconds and features of a video's windows."""
    starts, found, waiting = [], [], []
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
    # NaN where the file does not tell: folders of frames.
    times = [[video.time_of(i) for i in places] for places in (starts, last)]
    seconds = [[math.nan if t is None else float(t - first_time) for t in row] for row in times]
    return {"start": np.array(seconds[0]), "end": np.array(seconds[1]), "features": np.concatenate(found)}


def _join(parts: pathlib.Path, target: pathlib.Path) -> dict[str, Any]:
    """Writes all parts as one file, videos in the order of their names."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(np.load(part)) for part in parts.glob("*.npz")]
        files.sort(key=lambda rows: str(rows["id"][0]))
        columns = {
            name: np.concatenate([rows[name] for rows in files])
            for name in ("id", "start", "end", "features")
        }
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".npz":
        with partial.open("wb") as file:
            np.savez(file, **columns)  # pyright: ignore[reportArgumentType]
    else:
        import pyarrow
        from pyarrow import parquet

        values = columns.pop("features")
        table = {name: pyarrow.array(column) for name, column in columns.items()}
        table["features"] = pyarrow.array(
            values.reshape(len(values), -1).tolist(), pyarrow.list_(pyarrow.float32())
        )
        shape = {"shape": json.dumps(values.shape[1:])}
        parquet.write_table(pyarrow.table(table).replace_schema_metadata(shape), partial)
    os.replace(partial, target)
    return {"windows": len(columns["id"]), "out": str(target)}
