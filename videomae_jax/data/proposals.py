"""Arithmetic of boxes as the published detection code has it: pixels, the last one included.

A box is (left, top, right, bottom), float32; a frame of width W has left and right in 0..W-1. Where code and
conventions meet (resized, cropped) there are fractions of a pixel more or less, as published.
"""

import numpy as np
from jaxtyping import Float

Corners = Float[np.ndarray, "R 4"]


def to_pixels(corners: Corners, height: int, width: int) -> Corners:
    """Parts of a frame as pixels: the left edge at `left * W`, the last column at `right * W - 1`.

    Clipped to the frame; what is empty then has right <= left or bottom <= top, see `has_area`.
    """
    size = np.array([width, height, width, height], np.float32)
    return _clipped(corners * size - np.array([0, 0, 1, 1], np.float32), height, width)


def to_parts(boxes: Corners, height: int, width: int) -> Corners:
    """The inverse of `to_pixels`, clipped to 0..1."""
    size = np.array([width, height, width, height], np.float32)
    return np.clip((boxes + np.array([0, 0, 1, 1], np.float32)) / size, 0, 1)


def _clipped(boxes: Corners, height: int, width: int) -> Corners:
    last = np.array([width - 1, height - 1, width - 1, height - 1], np.float32)
    return np.clip(boxes, 0, last).astype(np.float32)


def has_area(boxes: Corners) -> np.ndarray:
    """Which boxes are not empty, bool [R]."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def resized(corners: Corners, given: tuple[int, int], size: tuple[int, int]) -> Corners:
    """Parts of a frame of (height, width) `given` as pixels of the same frame made `size`.

    The last pixel is that of the frame before, whose place is scaled.
    """
    down, across = size[0] / given[0], size[1] / given[1]
    return (to_pixels(corners, *given) * np.array([across, down, across, down])).astype(np.float32)


def cropped(boxes: Corners, top: int, left: int, height: int, width: int) -> Corners:
    """Boxes of a frame of which a crop is left, in 0..W and 0..H of it; those outside it are empty then."""
    edges = np.array([width, height, width, height], np.float32)
    return np.clip(boxes - np.array([left, top, left, top], np.float32), 0, edges).astype(np.float32)


def flipped(boxes: Corners, width: int) -> Corners:
    """Boxes of a frame that was mirrored: left becomes W - right - 1."""
    left, right = width - boxes[:, 2] - 1, width - boxes[:, 0] - 1
    return np.stack([left, boxes[:, 1], right, boxes[:, 3]], axis=1).astype(np.float32)


def jittered(boxes: Corners, height: int, width: int, rng: np.random.Generator) -> Corners:
    """Training proposals: each side moves outward by a fifth of the width or a tenth of the height at most,
    inward by half as much; at least a pixel wide and high afterwards, within the frame.
    """
    wide, high = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    count = len(boxes)
    left = np.clip(boxes[:, 0] + wide * rng.uniform(-0.2, 0.1, count), 0, width - 2)
    top = np.clip(boxes[:, 1] + high * rng.uniform(-0.1, 0.05, count), 0, height - 2)
    right = np.clip(boxes[:, 2] + wide * rng.uniform(-0.1, 0.2, count), left + 1, width - 1)
    bottom = np.clip(boxes[:, 3] + high * rng.uniform(-0.05, 0.1, count), top + 1, height - 1)
    return np.stack([left, top, right, bottom], axis=1).astype(np.float32)


def enlarged(boxes: Corners, height: int, width: int) -> Corners:
    """Boxes for a test: a tenth wider and a twentieth higher, half of it on each side, within the frame."""
    wide = (boxes[:, 2] - boxes[:, 0] + 1) * 0.05
    high = (boxes[:, 3] - boxes[:, 1] + 1) * 0.025
    return _clipped(boxes + np.stack([-wide, -high, wide, high], axis=1), height, width)
