"""The Grain graph: records to batches; the global batch of a step is a function of (source, seed, step).

A video that cannot be decoded becomes a clip of zeros with weight 0 and its reason in `error`; it is never
replaced and nothing is raised inside the pipeline, where it would silently end a worker's share.
"""

import ctypes
import dataclasses
import signal
import sys
from typing import Any

import grain
import numpy as np

from videomae_jax.data import augment, decode, sampling
from videomae_jax.data.sources import Record, VideoSource

HOST_ONLY = ("record", "error")
"""Fields of a batch that stay on the host: which videos, and why one could not be decoded."""


@dataclasses.dataclass(frozen=True)
class PretrainClip(grain.transforms.RandomMap):
    """Record -> one augmented pretraining clip, uint8 [frames, *size, 3], by the published recipe.

    Attributes:
        frames: frames per clip.
        stride: distance of consecutive frames, in frames of the file.
        size: output (height, width) in pixels.
    """

    frames: int
    stride: int
    size: tuple[int, int]

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, Record], rng: np.random.Generator
    ) -> dict[str, Any]:
        """(index in the stream, record) -> the clip and what belongs to it; a broken video weighs 0."""
        index, record = element
        clip = np.zeros((self.frames, *self.size, 3), np.uint8)
        error = ""
        try:
            with decode.Video(record["path"]) as video:
                wanted = sampling.pretrain_clip(video.num_frames, self.frames, self.stride, rng)
                clip = augment.multi_scale_crop(video.read(wanted), self.size, rng)
        except decode.DecodeError as reason:
            error = str(reason)
        return {
            "video": clip,
            "index": np.uint32(index),
            "label": np.int32(record["label"]),
            "weight": np.float32(not error),
            "record": np.int32(record["record"]),
            "error": error,
        }


def middle_clips(source: VideoSource, clip: PretrainClip) -> tuple[np.ndarray, list[str], dict[str, str]]:
    """The middle clip of each video, cropped to its centre: nothing random.

    Returns:
        uint8 [B, T, H, W, 3] of the videos that decode, their ids, and id -> reason of the others.
    """
    clips, ids, bad = [], [], {}
    for index, name in enumerate(source.ids):
        try:
            with decode.Video(source[index]["path"]) as video:
                wanted = sampling.pretrain_clip(video.num_frames, clip.frames, clip.stride, None)
                clips.append(augment.centre_crop(video.read(wanted), clip.size))
                ids.append(name)
        except decode.DecodeError as reason:
            bad[name] = str(reason)
    return np.array(clips), ids, bad


def clips(
    source: VideoSource,
    transform: grain.transforms.RandomMap,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> grain.MapDataset:
    """This host's clips from `start_step` on, 2^32 in all; batch_size / hosts of them make a host batch.

    Global batch s holds records [s * B, (s + 1) * B) of a stream that is reshuffled every epoch; host h
    takes every `hosts`-th of them, from the h-th on. Clips and random draws are the same for any number of
    hosts.

    Raises:
        ValueError: the hosts do not divide the batch.
    """
    if batch_size % hosts:
        raise ValueError(f"batch size {batch_size} is not a multiple of {hosts} hosts")
    # Not repeat(None): its length overflows once batches and slices are taken of it.
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat(2**32 // len(source) + 1)
    drawn = stream.map_with_index(lambda index, record: (index, record)).random_map(transform)
    # Slicing after random_map: before it, every host would draw from the same random stream.
    return drawn[start_step * batch_size + host :: hosts]


def iterate(
    dataset: grain.MapDataset, host_batch: int, *, workers: int, threads: int
) -> grain.DatasetIterator[dict[str, Any]]:
    """Batches of `host_batch` clips, made ahead of their reader: two batches, or two per worker.

    Args:
        workers: processes, each making whole batches; 0 makes clips in `threads` threads of this process.
        threads: threads in each process; libav and PIL let Python go on meanwhile.
    """
    if not workers:
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * host_batch, threads))
        return iter(dataset.to_iter_dataset(ahead).batch(host_batch))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    batches = dataset.batch(host_batch).to_iter_dataset(ahead)
    return iter(batches.mp_prefetch(options, worker_init_fn=_die_with_parent))


def _die_with_parent(_worker: int, _workers: int) -> None:
    """Ends this worker when its parent is killed; Grain alone would leave it behind for ever (Linux)."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL("libc.so.6").prctl(parent_death_signal, signal.SIGKILL)
