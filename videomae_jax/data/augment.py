"""Whole-clip spatial augmentation: one random choice for all frames of a clip; the rng is passed in."""

import math

import cv2
import numpy as np
from PIL import Image

from videomae_jax.data import rgb

cv2.setNumThreads(0)  # the loader has threads and processes of its own

_SCALES = (1.0, 0.875, 0.75, 0.66)
# Corners and centre, edge middles, quarter points: multiples of a quarter of the free width and height.
_OFFSETS = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)


def multi_scale_box(height: int, width: int, size: tuple[int, int], rng: np.random.Generator) -> rgb.Box:
    """The published pretraining crop as (top, left, crop height, crop width), in pixels.

    Sides are 1, 0.875, 0.75 or 0.66 of the short side, neighbours in that list at most; a side within 3
    pixels of the output's becomes it, and may then pass the frame's edge by a pixel or two. The offset is
    one of 13 fixed places. The 10 pairs of sides and the 13 offsets are drawn uniformly.

    Args:
        size: output (height, width).
    """
    sides = [max(int(min(height, width) * scale), 1) for scale in _SCALES]
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


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, *size, 3], bilinear with anti-aliasing as PIL does.

    Where nothing becomes smaller by OpenCV, a seventh of the time and within one grey level of PIL: there is
    nothing to smooth then. It counts in whole numbers: on x86 the bytes are the same with and without SIMD.
    """
    return frames if frames.shape[1:3] == size else resized_crop(frames, (0, 0, *frames.shape[1:3]), size)


def resized_crop(frames: np.ndarray, box: rgb.Box, size: tuple[int, int]) -> np.ndarray:
    """Crops uint8 [T, H, W, 3] to `box` and resizes to `size`; what lies outside the frame is black."""
    out = np.empty((len(frames), *size, frames.shape[-1]), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        resize_into(rgb.crop(frame, box), target)
    return out


def resize_into(frame: np.ndarray, target: np.ndarray) -> None:
    """Resizes one frame, uint8 [H, W, 3], into another; see `resize`."""
    height, width, _ = target.shape
    if frame.shape == target.shape:
        target[:] = frame
    elif frame.shape[0] <= height and frame.shape[1] <= width:
        cv2.resize(frame, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    else:
        target[:] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))


def centre_crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest central crop of the output's shape, resized; uint8 [T, H, W, 3] -> [T, *size, 3]."""
    _, height, width, _ = frames.shape
    scale = min(height / size[0], width / size[1])
    crop_height, crop_width = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return resized_crop(frames, (top, left, crop_height, crop_width), size)


def random_resized_box(
    height: int, width: int, rng: np.random.Generator, area: tuple[float, float] = (0.08, 1.0)
) -> rgb.Box:
    """The published finetuning crop: a share of the area and an aspect ratio of 3/4 to 4/3, then a place.

    After ten tries that do not fit, the central crop with the nearest ratio.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        target = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_width, crop_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    ratio = min(max(width / height, low), high)
    crop_height, crop_width = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def interpolate(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, *size, 3], bilinear without anti-aliasing, as published for finetuning.

    Pixel centres are aligned (PyTorch's `align_corners=False`); results are rounded to whole levels.
    """
    if frames.shape[1:3] == size:
        return frames
    (low, high, weight), (left, right, across) = (
        _taps(given, wanted) for given, wanted in zip(frames.shape[1:3], size, strict=True)
    )
    weight, across = weight[:, None, None], across[None, :, None]
    out = np.empty((len(frames), *size, frames.shape[-1]), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        exact = frame.astype(np.float32)
        rows = exact[low]
        rows += weight * (exact[high] - rows)
        blended = rows[:, left]
        blended += across * (rows[:, right] - blended)
        blended += 0.5  # assignment cuts the fraction off
        target[:] = blended
    return out


def fit(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [T, H, W, 3] so that `size` is just covered, as published for validation and test.

    For a square that is its short side; the other becomes int(side * ratio). Bilinear, no anti-aliasing.
    """
    _, height, width, _ = frames.shape
    if height * size[1] <= width * size[0]:  # the height decides
        return interpolate(frames, (size[0], max(int(size[0] * width / height), size[1])))
    return interpolate(frames, (max(int(size[1] * height / width), size[0]), size[1]))


def validation_crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of fitted frames; half pixels go to the even side, as published."""
    frames = fit(frames, size)
    top, left = (round((whole - part) / 2) for whole, part in zip(frames.shape[1:3], size, strict=True))
    return frames[:, top : top + size[0], left : left + size[1]]


def view_crop(frames: np.ndarray, size: tuple[int, int], crop: int, crops: int) -> np.ndarray:
    """Crop number `crop` of `crops` of fitted frames, spread over their long side; one crop is the centre.

    As published the offset is int(crop * step), step = (long side - short side) / (crops - 1).
    """
    free = (frames.shape[1] - size[0], frames.shape[2] - size[1])
    top, left = (round(f / 2) if crops == 1 else int(crop * (f / (crops - 1))) for f in free)
    return frames[:, top : top + size[0], left : left + size[1]]


def _taps(given: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower neighbour, upper neighbour, weight of the upper) of each of `wanted` pixels."""
    centres = np.maximum((np.arange(wanted) + 0.5) * (given / wanted) - 0.5, 0)
    low = np.minimum(centres.astype(np.int64), given - 1)
    return low, np.minimum(low + 1, given - 1), (centres - low).astype(np.float32)


def flip(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors a clip left to right with probability one half (not for data sets where sides matter)."""
    return frames[:, :, ::-1] if rng.random() < 0.5 else frames


def erasing_box(
    height: int, width: int, rng: np.random.Generator, probability: float = 0.25
) -> tuple[int, int, int, int]:
    """The published random erasing: one box for all frames, (0, 0, 0, 0) for none.

    The box is filled on the device with normal noise in normalised units, which bytes cannot hold.
    """
    if rng.random() >= probability:
        return 0, 0, 0, 0
    for _ in range(100):
        target = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        box_height, box_width = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if box_height < height and box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    return 0, 0, 0, 0
