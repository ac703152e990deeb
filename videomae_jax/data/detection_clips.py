"""Key frames to clips with boxes: training as published for AVA, and tests in sizes of whole tubelets."""

import dataclasses
from typing import Any

import grain
import numpy as np

from videomae_jax.data import augment, pipeline, proposals, sampling
from videomae_jax.data.decode import DecodeError
from videomae_jax.data.reading import AnyVideo
from videomae_jax.data.scenes import Scene, SceneRecord


@dataclasses.dataclass(frozen=True)
class _Slots:
    """Room for the boxes of a clip, so that all batches have one shape.

    Attributes:
        boxes: at most, of a clip.
        classes: how many.
    """

    boxes: int
    classes: int

    def fill(self, found: np.ndarray, actions: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
        """`boxes` float32 [1, R, 4], `box_weight` float32 [1, R] (0: none), `actions` float32 [1, R, K]."""
        boxes = np.zeros((1, self.boxes, 4), np.float32)
        weight = np.zeros((1, self.boxes), np.float32)
        marks = np.zeros((1, self.boxes, self.classes), np.float32)
        boxes[0, : len(found)], weight[0, : len(found)] = found, 1
        for place, done in enumerate(actions):
            marks[0, place, list(done)] = 1
        return {"boxes": boxes, "box_weight": weight, "actions": marks}


@dataclasses.dataclass(frozen=True)
class DetectClip(grain.transforms.RandomMap):
    """Record of a key frame -> its augmented clip and proposals, by the published recipe for AVA.

    The short side becomes `short` pixels, a crop of `size` is taken, mirrored half of the time; the annotated
    boxes follow and are jittered. Boxes of which the crop leaves nothing are dropped (the published code
    keeps them, empty); of more than `boxes` a random subset is kept, with its own labels.

    Attributes:
        frames, stride, size: of the clip.
        short: least and largest short side, in pixels; drawn evenly.
        flip: mirror half of the clips.
        boxes: at most, of a clip.
        classes: how many actions there are.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    short: tuple[int, int]
    flip: bool
    boxes: int
    classes: int
    clips_per_video: int = 1

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, SceneRecord], rng: np.random.Generator
    ) -> dict[str, Any]:
        """(place in the stream, record) -> `video` uint8 [1, T, H, W, 3] and the fields of `_Slots.fill`."""
        index, record = element
        slots, scene = _Slots(self.boxes, self.classes), record.get("scene")
        kept = slots.fill(np.zeros((0, 4), np.float32), [])

        def clips(video: AnyVideo) -> np.ndarray:
            nonlocal kept
            assert scene is not None
            frames = around(video, scene.time, self.frames, self.stride)
            pixels, boxes, actions = self._augmented(frames, scene, rng)
            kept = slots.fill(boxes, actions)
            return pixels[None]

        made = pipeline.clips_of(index, record, clips, (1, self.frames, *self.size, 3), rng)
        return made | kept

    def _augmented(
        self, frames: np.ndarray, scene: Scene, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
        frames, boxes = shortened(frames, scene.corners, int(rng.integers(self.short[0], self.short[1] + 1)))
        height, width = self.size
        top = int(rng.uniform() * (frames.shape[1] - height))
        left = int(rng.uniform() * (frames.shape[2] - width))
        frames = frames[:, top : top + height, left : left + width]
        boxes = proposals.cropped(boxes, top, left, height, width)
        if self.flip and rng.uniform() < 0.5:
            frames, boxes = frames[:, :, ::-1], proposals.flipped(boxes, width)
        kept = np.flatnonzero(proposals.has_area(boxes))
        if len(kept) > self.boxes:
            kept = np.sort(rng.choice(kept, self.boxes, replace=False))
        boxes = proposals.jittered(boxes[kept], height, width, rng)
        return np.ascontiguousarray(frames), boxes, [scene.actions[i] for i in kept]


@dataclasses.dataclass(frozen=True)
class KeyView(grain.transforms.Map):
    """Record of a key frame -> its whole frames, resized to `size`, and enlarged boxes: nothing random.

    Attributes: as those of `DetectClip`; a frame of any shape becomes `size`, see `whole_tubelets`.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    boxes: int
    classes: int
    clips_per_video: int = 1

    def map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, SceneRecord | None]
    ) -> dict[str, Any]:
        """(place, record, None where there is none) -> as `DetectClip.random_map`."""
        index, record = element
        slots, scene = _Slots(self.boxes, self.classes), record and record.get("scene")
        kept = slots.fill(np.zeros((0, 4), np.float32), [])

        def clips(video: AnyVideo) -> np.ndarray:
            nonlocal kept
            assert scene is not None
            frames = around(video, scene.time, self.frames, self.stride)
            given = (frames.shape[1], frames.shape[2])
            boxes = proposals.enlarged(proposals.resized(scene.corners, given, self.size), *self.size)
            kept = slots.fill(boxes, list(scene.actions))
            return augment.interpolate(frames, self.size)[None]

        made = pipeline.clips_of(index, record, clips, (1, self.frames, *self.size, 3))
        return made | kept


def around(video: AnyVideo, seconds: float, frames: int, stride: int) -> np.ndarray:
    """The clip of a key frame, uint8 [T, H, W, 3]; see `sampling.key_clip`.

    Raises:
        DecodeError: the video ends before it, or cannot be read.
    """
    first, last = video.time_of(0), video.time_of(video.num_frames - 1)
    late = max(0.1, 1 / video.fps if video.fps else 0.0)
    if first is not None and last is not None and seconds > last - first + late:
        length = float(last - first)
        raise DecodeError(f"{video.name}: has no frame at {seconds:g} s, its last one is at {length:.2f} s")
    key = video.index_at(seconds + 1e-3)  # times in files are rounded
    return video.read(sampling.key_clip(video.num_frames, key, frames, stride))


def shortened(frames: np.ndarray, corners: np.ndarray, short: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames whose short side has `short` pixels, and their boxes in pixels."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    size = (short, int(width * short / side)) if height <= width else (int(height * short / side), short)
    return augment.interpolate(frames, size), proposals.resized(corners, (height, width), size)


def whole_tubelets(height: int, width: int, short: int, patch: int) -> tuple[int, int]:
    """The size of a test frame: short side `short`, the long one in proportion, both in whole tubelets.

    Nothing is padded, so no clip sees what it is batched with; the published code pads to the largest of a
    batch and lets padding take part in attention.

    >>> whole_tubelets(360, 640, 256, 16), whole_tubelets(480, 360, 256, 16)
    ((256, 448), (336, 256))
    """
    scale = short / min(height, width)
    size = [max(round(side * scale / patch), 1) * patch for side in (height, width)]
    return size[0], size[1]
