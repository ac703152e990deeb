"""The Grain graph: records to batches; the global batch of a step is a function of (source, seed, step).

A video that cannot be decoded becomes a clip of zeros with weight 0 and its reason in `error`; it is never
replaced and nothing is raised inside the pipeline, where it would silently end a worker's share.
"""

import dataclasses
import functools
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from videomae_jax.data import augment, decode, processes, randaugment, reading, rgb, sampling
from videomae_jax.data.reading import AnyVideo
from videomae_jax.data.sources import Record, Source

HOST_ONLY = ("record", "error", "num_frames")
"""Fields of a batch that stay on the host: which videos, why one could not be decoded, how long it is."""
UNREAD = -1  # `num_frames` of a video that could not even be read, and may be another time


@runtime_checkable
class ClipTransform(Protocol):
    """Record -> clips and their fields, each with a leading axis of `clips_per_video`: a Grain transform."""

    @property
    def clips_per_video(self) -> int: ...

    @property
    def frames(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...


@dataclasses.dataclass(frozen=True)
class PretrainClip(grain.transforms.RandomMap):
    """Record -> augmented pretraining clips of one video, by the published recipe.

    Attributes:
        frames: frames per clip.
        stride: distance of consecutive frames, in frames of the file.
        size: output (height, width) in pixels.
        clips_per_video: crops of the same frames, decoded once (V2 takes four).
        short_side: of frames, at most; 0: unknown. Where it is known, crops are resized on the device.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    clips_per_video: int = 1
    short_side: int = 0

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, Record], rng: np.random.Generator
    ) -> dict[str, Any]:
        """(place in the stream of videos, record) -> its clips, uint8 [R, T, H, W, 3], and their fields.

        With `short_side` clips are not resized but padded, to squares that hold every crop; `crop` int32
        [R, 2] is (height, width) of each.
        """
        boxes: list[rgb.Box] = []
        shape = (self.clips_per_video, self.frames, *self.shipped, 3)
        made = clips_of(*element, lambda video: self._clips(video, boxes, shape, rng), shape, rng)
        if not self.short_side:
            return made
        crops = [box[2:] for box in boxes] if made["weight"] else [self.size] * self.clips_per_video
        return made | {"crop": np.array(crops, np.int32)}

    @property
    def shipped(self) -> tuple[int, int]:
        """Height and width of the clips as the loader makes them."""
        side = max(self.short_side, *self.size)
        return (side, side) if self.short_side else self.size

    def _clips(
        self, video: AnyVideo, boxes: list[rgb.Box], shape: tuple[int, ...], rng: np.random.Generator
    ) -> np.ndarray:
        """The clips of a video; puts the box of each into `boxes`. Frames are taken one after the other."""
        wanted = sampling.pretrain_clip(video.num_frames, self.frames, self.stride, rng)
        made = np.zeros(shape, np.uint8)

        def draw(height: int, width: int) -> rgb.Box:
            if self.short_side and min(height, width) > self.short_side:  # a damaged header can say anything
                raise decode.DecodeError(f"{video.name}: is {width}x{height}, more than its data set has")
            boxes[:] = [augment.multi_scale_box(height, width, self.size, rng) for _ in made]
            return boxes[0] if len(boxes) == 1 else (0, 0, height, width)

        chosen = decode.in_range(wanted, video.num_frames, video.name)
        for index, frame in zip(chosen, video.each(chosen, draw), strict=True):
            first, *others = np.flatnonzero(wanted == index)
            for clip, box in zip(made, boxes, strict=True):
                part = frame if len(boxes) == 1 else rgb.crop(frame, box)
                if self.short_side:
                    clip[first, : box[2], : box[3]] = part
                else:
                    augment.resize_into(part, clip[first])
                clip[others] = clip[first]
        return made


@dataclasses.dataclass(frozen=True)
class FinetuneClip(grain.transforms.RandomMap):
    """Record -> augmented clips of one video, by the published finetuning recipe.

    As published, the clips of a video show the same frames, decoded once; each has its own operations, crop,
    flip and erasing box.

    Attributes:
        frames: frames per clip.
        stride: distance of frames in the file; 0 takes one frame of each of `frames` equal parts.
        size: output (height, width) in pixels.
        policy: of RandAugment; None leaves colours and shapes alone.
        flip: mirror half of the clips; wrong where left and right matter (Something-Something).
        erasing: probability that a box of a clip is erased (on the device; field `erase`).
        area: smallest and largest share of a frame that a crop takes.
        clips_per_video: repeated augmentation.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    policy: randaugment.Policy | None = None
    flip: bool = True
    erasing: float = 0.25
    area: tuple[float, float] = (0.08, 1.0)
    clips_per_video: int = 1

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, Record], rng: np.random.Generator
    ) -> dict[str, Any]:
        """As `PretrainClip.random_map`; `erase` int32 [R, 4] is (top, left, height, width) of each clip."""

        def clips(video: AnyVideo) -> np.ndarray:
            frames = video.read(_clip_frames(video.num_frames, self.frames, self.stride, rng))
            return np.stack([self._clip(frames, rng) for _ in range(self.clips_per_video)])

        shape = (self.clips_per_video, self.frames, *self.size, 3)
        boxes = [augment.erasing_box(*self.size, rng, self.erasing) for _ in range(self.clips_per_video)]
        made = clips_of(*element, clips, shape, rng)
        return made | {"erase": np.array(boxes, np.int32)}

    def _clip(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.policy:
            frames = randaugment.apply(frames, self.policy, rng)
        top, left, height, width = augment.random_resized_box(
            frames.shape[1], frames.shape[2], rng, self.area
        )
        frames = frames[:, top : top + height, left : left + width]
        frames = augment.interpolate(frames, self.size)
        return augment.flip(frames, rng) if self.flip else frames


@dataclasses.dataclass(frozen=True)
class MiddleClip(grain.transforms.Map):
    """Record -> the middle clip of its video, cropped to the centre: nothing random.

    Attributes: as those of `PretrainClip`.
    """

    frames: int
    stride: int
    size: tuple[int, int]

    def map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, Record | None]
    ) -> dict[str, Any]:
        """(place, record, None where there is none) -> its clip, uint8 [1, T, H, W, 3], and its fields."""

        def clips(video: AnyVideo) -> np.ndarray:
            wanted = sampling.pretrain_clip(video.num_frames, self.frames, self.stride, None)
            return augment.centre_crop(video.read(wanted), self.size)[None]

        return clips_of(*element, clips, (1, self.frames, *self.size, 3))


@dataclasses.dataclass(frozen=True)
class ValidationClip(grain.transforms.Map):
    """Record -> the middle clip of its video as finetuning validates it: nothing random.

    Attributes: as those of `FinetuneClip`.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    clips_per_video: int = 1

    def map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, Record | None]
    ) -> dict[str, Any]:
        """(place, record, None where there is none) -> its clip, uint8 [1, T, H, W, 3], and its fields."""

        def clips(video: AnyVideo) -> np.ndarray:
            wanted = _clip_frames(video.num_frames, self.frames, self.stride, None)
            return augment.validation_crop(video.read(wanted), self.size)[None]

        return clips_of(*element, clips, (1, self.frames, *self.size, 3))


@dataclasses.dataclass(frozen=True)
class TestViews(grain.transforms.Map):
    """Record -> all test views of its video, decoded once.

    Attributes:
        frames, stride, size: as those of `FinetuneClip`.
        segments: clips spread over the video; `crops` of each, spread over the frame's long side.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    segments: int
    crops: int

    @property
    def clips_per_video(self) -> int:
        """Views of each video."""
        return self.segments * self.crops

    def map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, Record | None]
    ) -> dict[str, Any]:
        """(place, record or None) -> uint8 [segments * crops, T, H, W, 3], segments outermost; its fields."""

        def views(video: AnyVideo) -> np.ndarray:
            each = [self._segment(video.num_frames, i) for i in range(self.segments)]
            wanted = np.unique(np.concatenate(each))
            frames = augment.fit(video.read(wanted), self.size)
            return np.stack(
                [
                    augment.view_crop(frames[np.searchsorted(wanted, segment)], self.size, crop, self.crops)
                    for segment in each
                    for crop in range(self.crops)
                ]
            )

        return clips_of(*element, views, (self.clips_per_video, self.frames, *self.size, 3))

    def _segment(self, num_frames: int, segment: int) -> np.ndarray:
        if self.stride:
            return sampling.dense_view(num_frames, self.frames, self.stride, segment, self.segments)
        return sampling.segment_view(num_frames, self.frames, segment, self.segments)


def _clip_frames(num_frames: int, frames: int, stride: int, rng: np.random.Generator | None) -> np.ndarray:
    """Frames of a finetuning clip, dense or (stride 0) one of each segment; the central ones without rng."""
    if stride:
        return sampling.dense_clip(num_frames, frames, stride, rng)
    return sampling.segment_clip(num_frames, frames, rng)


def clips_of(
    index: int,
    record: Record | None,
    clips: Callable[[AnyVideo], np.ndarray],
    shape: tuple[int, ...],
    rng: np.random.Generator | None = None,
) -> dict[str, Any]:
    """What `clips` makes of a video, and its names; zeros of weight 0 where it cannot be read or is none.

    Args:
        rng: that `clips` draws from; a second try draws what the first one did.
    """
    error, made, num_frames = "", None, 0  # made: [R, T, H, W, 3]
    drawn = rng.bit_generator.state if rng else None

    def read() -> tuple[int, np.ndarray]:
        assert record is not None
        if rng and drawn:
            rng.bit_generator.state = drawn
        with reading.open_video(record["video"], record["name"]) as video:
            return video.num_frames, clips(video)

    if record is not None:
        error = record["error"]
        try:
            if not error:
                num_frames, made = reading.patiently(read)
        except decode.DecodeError as reason:
            error, num_frames = str(reason), UNREAD if isinstance(reason, decode.ReadError) else 0
    return {
        "video": np.zeros(shape, np.uint8) if made is None else made,
        "index": np.uint32(index),
        "label": np.int32(record["label"] if record else -1),
        "weight": np.float32(made is not None),
        "record": np.int32(record["record"] if record else -1),
        "error": error,
        "num_frames": np.int32(num_frames),
    }


def _merged(batch: dict[str, Any]) -> dict[str, Any]:
    """[videos, clips of each, ...] -> [clips, ...]; fields of a video go to each of its clips."""
    repeats = batch["video"].shape[1]
    merged = {
        name: np.repeat(value, repeats) if value.ndim == 1 else value.reshape(-1, *value.shape[2:])
        for name, value in batch.items()
    }
    merged["index"] = (batch["index"][:, None] * repeats + np.arange(repeats, dtype=np.uint32)).reshape(-1)
    return merged


def middle_clips(source: Source, clip: MiddleClip) -> tuple[np.ndarray, list[str], dict[str, str]]:
    """The middle clip of each video.

    Returns:
        uint8 [B, T, H, W, 3] of the videos that decode, their ids, and id -> reason of the others.
    """
    rows = list(iterate(once(source, clip, 1), 1, workers=0, threads=1))
    ids = [source.ids[row["record"][0]] for row in rows]
    good = [i for i, row in enumerate(rows) if row["weight"][0]]
    bad = {name: str(row["error"][0]) for name, row in zip(ids, rows, strict=True) if not row["weight"][0]}
    return np.array([rows[i]["video"][0] for i in good]), [ids[i] for i in good], bad


def clips(
    source: Source,
    transform: ClipTransform,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> grain.MapDataset:
    """This host's videos from `start_step` on, 2^32 in all, each with its clips.

    The videos of global batch s are records [s * V, (s + 1) * V) of a stream that is reshuffled every
    epoch, V = batch_size / clips_per_video; host h takes every `hosts`-th of them, from the h-th on. Clips
    and random draws are the same for any number of hosts.

    Args:
        batch_size: clips of a global batch.

    Raises:
        ValueError: the hosts do not divide the batch.
    """
    videos = batch_size // transform.clips_per_video
    if batch_size % transform.clips_per_video or videos % hosts:
        each = f" of {transform.clips_per_video} clips" if transform.clips_per_video > 1 else ""
        raise ValueError(f"batch size {batch_size} is not a multiple of {hosts} hosts{each}")
    # Not repeat(None): its length overflows once batches and slices are taken of it.
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat(2**32 // len(source) + 1)
    numbered = stream.map_with_index(lambda index, record: (index, record))
    is_random = isinstance(transform, grain.transforms.RandomMap)
    draw: Any = numbered.random_map if is_random else numbered.map
    drawn = draw(transform)
    # Slicing after random_map: before it, every host would draw from the same random stream.
    return drawn[start_step * videos + host :: hosts]


def once(
    source: Source, transform: grain.transforms.Map, batch_size: int, *, host: int = 0, hosts: int = 1
) -> grain.MapDataset:
    """Every video once, in order: this host's part of global batches of `batch_size` videos.

    The last batch is filled up with zeros of weight 0 and record -1, so that all hosts take the same steps.
    """
    total = -(-len(source) // batch_size) * batch_size
    places = grain.MapDataset.range(total)[host::hosts]
    return places.map(lambda i: (i, source[i] if i < len(source) else None)).map(transform)


class LoaderSize(NamedTuple):
    """Processes (0: threads of this one), threads in each, bytes of clips held at most, and why so many."""

    workers: int
    threads: int
    bytes: int
    reason: str

    def __str__(self) -> str:
        workers = f"{self.workers} processes x " if self.workers else ""
        return f"{workers}{self.threads} threads, {self.bytes / 2**30:.1f} GiB of clips ({self.reason})"


_AHEAD = 2
"""Whole batches that are ready before the reader asks: of all, or of each process."""


def iterate(
    dataset: grain.MapDataset, host_videos: int, *, workers: int, threads: int, by_video: bool = False
) -> grain.DatasetIterator[dict[str, Any]]:
    """Batches of the clips of `host_videos` videos, made ahead of their reader.

    Args:
        workers: processes, each making whole batches; 0 makes clips in `threads` threads of this process.
        threads: threads in each process; libav and PIL let Python go on meanwhile.
        by_video: keep the clips (or views) of a video on an axis of their own, [videos, views, ...].
    """
    if not workers:
        buffer = max(_AHEAD * host_videos, threads)
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        batches = dataset.to_iter_dataset(ahead).batch(host_videos)
        batches = batches if by_video else batches.map(_merged)
        # Joined in a thread too: the reader finds whole batches waiting.
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_AHEAD))
    if not flags.FLAGS.is_parsed():  # Grain's processes are given the flags, of which a script has none
        flags.FLAGS.mark_as_parsed()
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
    batches = dataset.batch(host_videos).to_iter_dataset(ahead)
    batches = batches.mp_prefetch(options, worker_init_fn=functools.partial(_start_worker, os.getpid()))
    return iter(batches if by_video else batches.map(_merged))


_PROCESS_THREADS = 2
"""Loader threads in one process: with more, Python's lock is felt (docs/performance.md, 16 cores)."""


def loader_size(workers: int, threads: int, cores: int, batch_bytes: int, limit: int) -> LoaderSize:
    """How a loader uses `cores` and at most `limit` bytes; -1 stands for a number that fills them.

    >>> [loader_size(-1, -1, cores, 2**20, 2**30)[:2] for cores in (2, 16)]
    [(0, 2), (8, 2)]
    >>> loader_size(4, -1, 16, 2**20, 2**30)[:2], loader_size(-1, -1, 208, 2**30, 2**34)[:2]
    ((4, 4), (3, 2))
    """

    def held(workers: int, threads: int) -> int:
        # Of each process, batches under way in its threads and those ready; and what waits for the device.
        return ((workers * (max(2, threads) + _AHEAD) if workers else 2 * _AHEAD) + _AHEAD + 1) * batch_bytes

    reason = f"as set, {cores} cores" if workers >= 0 and threads >= 0 else f"of {cores} usable cores"
    if workers < 0:
        per_process = threads if threads > 0 else _PROCESS_THREADS
        wanted = workers = 0 if cores < 2 * per_process else cores // per_process
        while workers and held(workers, per_process) > limit:
            workers -= 1
        if workers < wanted:
            reason += f", as many as fit {limit / 2**30:.0f} GiB"
        threads = per_process if workers else threads
    if threads < 0:
        threads = max(cores // max(workers, 1), 1)
    if max(workers, 1) * threads > cores:
        reason += ", more threads than cores"
    return LoaderSize(workers, threads, held(workers, threads), reason)


def _start_worker(parent: int, _worker: int, _workers: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a whole group: the trainer says when it ends
    processes.die_with_parent(parent)
