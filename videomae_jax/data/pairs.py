"""Two clips of each video for contrastive training."""

import dataclasses
from typing import Any

import grain
import numpy as np

from videomae_jax.data import augment, pipeline, sampling
from videomae_jax.data.reading import AnyVideo
from videomae_jax.data.sources import Record


@dataclasses.dataclass(frozen=True)
class PairClips(grain.transforms.RandomMap):
    """Record -> two clips at independent times, each with its own crop and flip.

    Colours change on the device, so clips travel as uint8.

    Attributes: see `pipeline.FinetuneClip`.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    flip: bool
    area: tuple[float, float]
    clips_per_video: int = 2

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride] (Grain's own says None)
        self, element: tuple[int, Record], rng: np.random.Generator
    ) -> dict[str, Any]:
        """(place in the stream of videos, record) -> uint8 [2, T, H, W, 3], and their fields."""

        def clip(video: AnyVideo) -> np.ndarray:
            frames = video.read(sampling.pretrain_clip(video.num_frames, self.frames, self.stride, rng))
            box = augment.random_resized_box(frames.shape[1], frames.shape[2], rng, self.area)
            cropped = augment.resized_crop(frames, box, self.size)
            return augment.flip(cropped, rng) if self.flip else cropped

        def clips(video: AnyVideo) -> np.ndarray:
            return np.stack([clip(video) for _ in range(self.clips_per_video)])

        shape = (self.clips_per_video, self.frames, *self.size, 3)
        return pipeline.clips_of(*element, clips, shape, rng)
