"""Whole-clip spatial augmentation: one random choice for all frames of a clip; the rng is passed in."""

import numpy as np
from PIL import Image

_SCALES = (1.0, 0.875, 0.75, 0.66)
# Corners and centre, edge middles, quarter points: multiples of a quarter of the free width and height.
_OFFSETS = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)


def multi_scale_box(
    height: int, width: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """The published pretraining crop as (top, left, crop height, crop width), in pixels.

    Sides are 1, 0.875, 0.75 or 0.66 of the short side, neighbours in that list at most; a side within 3
    pixels of the output's becomes it, and may then pass the frame's edge by a pixel or two. The offset is
    one of 13 fixed places. The 10 pairs of sides and the 13 offsets are drawn uniformly.

    Args:
        size: output (height, width).
    """
    sides = [int(min(height, width) * scale) for scale in _SCALES]
    heights, widths = ([out if abs(s - out) < 3 else s for s in sides] for out in size)
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[rng.integers(len(pairs))]
    x, y = _OFFSETS[rng.integers(len(_OFFSETS))]
    return (
        y * ((height - crop_height) // 4),
        x * ((width - crop_width) // 4),
        crop_height,
        crop_width,
    )


def resized_crop(frames: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Crops uint8 [T, H, W, 3] to `box` (top, left, height, width) and resizes to `size` (height, width).

    Bilinear with anti-aliasing, as PIL does; what lies outside the frame is black.
    """
    top, left, height, width = box
    out = np.empty((len(frames), *size, frames.shape[-1]), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        image = Image.fromarray(frame).crop((left, top, left + width, top + height))
        target[:] = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return out


def multi_scale_crop(frames: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The published pretraining augmentation of a whole clip, uint8 [T, H, W, 3] -> [T, *size, 3]."""
    _, height, width, _ = frames.shape
    return resized_crop(frames, multi_scale_box(height, width, size, rng), size)


def centre_crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest central crop of the output's shape, resized; uint8 [T, H, W, 3] -> [T, *size, 3]."""
    _, height, width, _ = frames.shape
    scale = min(height / size[0], width / size[1])
    crop_height, crop_width = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return resized_crop(frames, (top, left, crop_height, crop_width), size)
