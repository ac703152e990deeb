"""Which frames make a clip: index arithmetic only, as the published code has it, quirks included.

A random choice takes an `rng`; `rng=None` takes the centre (the published V1 code samples its validation
clips at random, V2 at the centre: ours is deterministic).
"""

import numpy as np


def pretrain_clip(
    num_frames: int, clip_frames: int, stride: int, rng: np.random.Generator | None
) -> np.ndarray:
    """Frames of a pretraining clip, int64 [clip_frames]: an exact stride from a random offset.

    A video too short for the whole clip starts at 0 and repeats a late frame; as published, the running
    index stops one step early, so the very last frame may never be reached.

    >>> pretrain_clip(30, 16, 4, None).tolist()
    [0, 4, 8, 12, 16, 20, 24, 28, 28, 28, 28, 28, 28, 28, 28, 28]
    """
    free = num_frames - clip_frames * stride + 1
    offset = 0 if free <= 0 else free // 2 if rng is None else int(rng.integers(free))
    last = offset + (max(num_frames - 2 - offset, 0) // stride) * stride
    return np.minimum(offset + stride * np.arange(clip_frames), last)


def dense_clip(num_frames: int, clip_frames: int, stride: int, rng: np.random.Generator | None) -> np.ndarray:
    """Frames of a finetuning clip, int64 [clip_frames]: evenly spaced over clip_frames * stride frames.

    As published the spacing is span / (clip_frames - 1), a little more than the stride.

    >>> dense_clip(30, 16, 4, None).tolist()
    [0, 5, 10, 15, 20, 25, 29, 29, 29, 29, 29, 29, 29, 29, 29, 29]
    """
    span = clip_frames * stride
    if num_frames > span:
        end = (span + num_frames) // 2 if rng is None else int(rng.integers(span, num_frames))
        start = end - span
        spaced = np.linspace(start, end, clip_frames)
        return np.clip(spaced, start, end - 1).astype(np.int64)
    reached = np.linspace(0, num_frames, num_frames // stride)
    padding = np.full(clip_frames - len(reached), num_frames)
    return np.clip(np.concatenate([reached, padding]), 0, num_frames - 1).astype(np.int64)


def dense_view(num_frames: int, clip_frames: int, stride: int, segment: int, segments: int) -> np.ndarray:
    """Frames of test segment `segment` of `segments`, int64 [clip_frames], at an exact stride.

    One segment is the central one (the published code divides by zero there).

    >>> dense_view(300, 16, 4, 4, 5).tolist()[::15]
    [236, 296]
    """
    every = np.arange(0, num_frames, stride)
    every = np.pad(every, (0, max(clip_frames - len(every), 0)), mode="edge")
    free = len(every) - clip_frames
    start = free // 2 if segments == 1 else int(segment * (free / (segments - 1)))
    return every[start : start + clip_frames]


def segment_clip(num_frames: int, segments: int, rng: np.random.Generator | None) -> np.ndarray:
    """One frame of each of `segments` equal parts, int64 [segments] (Something-Something).

    A video shorter than that repeats its first frame at the start, as V2 does (V1: nothing but frame 0).
    """
    length = num_frames // segments
    if length == 0:
        return np.maximum(np.arange(segments) - (segments - num_frames), 0)
    inside = length // 2 if rng is None else rng.integers(length, size=segments)
    return np.arange(segments) * length + inside


def segment_view(num_frames: int, segments: int, view: int, views: int) -> np.ndarray:
    """Frames of test view `view` of `views`, int64 [segments]; views interleave.

    >>> segment_view(40, 16, 1, 2).tolist()
    [1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 26, 28, 31, 33, 36, 38]
    """
    tick = num_frames / segments
    places = tick * np.arange(segments) + (np.arange(views) * tick / views)[:, None]
    return np.sort(places.astype(np.int64), axis=None)[view::views]


def key_clip(num_frames: int, key: int, clip_frames: int, stride: int) -> np.ndarray:
    """Frames around frame `key`, as published for detection: the key lies just before the middle of a stride.

    Beyond the ends of the video its first or last frame is repeated.

    >>> key_clip(1000, 100, 16, 4)[[0, 7, 8, 15]]
    array([ 69,  97, 101, 129])
    """
    start = key - clip_frames * stride // 2 + (stride - 1) // 2
    return np.clip(start + stride * np.arange(clip_frames), 0, num_frames - 1)
