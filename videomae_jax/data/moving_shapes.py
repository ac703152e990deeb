"""The generated data set: real H.264 files of textured shapes that move over a moving background.

The eight classes are the directions that shapes move in, four time-reversed pairs, so no single frame tells
a class: places, sizes, shapes, colours and the background's own motion are drawn alike for all of them. The
background is muted: what moves is then a large part of what a small model sees. Everything follows from a
seed.
"""

import math
import os
import pathlib

import numpy as np

from videomae_jax.data import decode, generated

# Steps along (y, x).
DIRECTIONS = {
    "down": (1, 0),
    "down_left": (1, -1),
    "down_right": (1, 1),
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "up_left": (-1, -1),
    "up_right": (-1, 1),
}
CLASSES = tuple(DIRECTIONS)
_VERSION = 4  # part of the cache's name: raise it when the same settings give other videos


class MovingShapes(generated.Spec):
    """What to generate."""

    classes = CLASSES


def render(spec: MovingShapes, motion: str, rng: np.random.Generator) -> np.ndarray:
    """One video of class `motion`, uint8 RGB [frames, size, size, 3]."""
    size = float(spec.size)
    y, x = np.mgrid[0 : spec.size, 0 : spec.size].astype(np.float32)[:, None]  # each [1, H, W]
    time = np.linspace(-0.5, 0.5, spec.frames, dtype=np.float32)[:, None, None]
    # 32 frames move a shape by a third to two thirds of the frame, whatever its size in pixels.
    span = spec.frames / 32
    drift = rng.uniform(-0.1, 0.1, 2).astype(np.float32) * size * span
    image = texture(y - drift[0] * time, x - drift[1] * time, size, rng, (0.3, 1.0), (0.4, 0.6))
    for _ in range(rng.integers(2, 4)):
        centre_y, centre_x, radius = _trajectory(motion, time, size, span, rng)
        dy = (y - centre_y + size / 2) % size - size / 2
        dx = (x - centre_x + size / 2) % size - size / 2
        inside = np.clip(0.5 - distance(dy, dx, radius, int(rng.integers(3))), 0, 1)[..., None]
        paint = texture(dy / radius * size / 4, dx / radius * size / 4, size, rng, (0.4, 1.2), (0.0, 1.0))
        image = image + inside * (paint - image)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _trajectory(
    motion: str, time: np.ndarray, size: float, span: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Centre [T, 1, 1] (y, x) over time and radius in pixels; reversing time swaps the classes of a pair.

    Places wrap around, so each is equally likely at every time and in every class.
    """
    y, x = rng.uniform(0, size), rng.uniform(0, size)
    radius = rng.uniform(0.08, 0.36) * size
    way = rng.uniform(0.5, 0.9) * size * span * time
    down, right = DIRECTIONS[motion]
    return y + down * way, x + right * way, radius


EXTENT = (1.0, 0.9, 1.3)
"""How far a disc, a square and a diamond reach from their centre, in radii."""


def distance(dy: np.ndarray, dx: np.ndarray, radius: float | np.ndarray, shape: int) -> np.ndarray:
    """Signed distance in pixels to a disc (0), a square (1) or a diamond (2); negative inside."""
    if shape == 0:
        return np.hypot(dy, dx) - radius
    if shape == 1:
        return np.maximum(np.abs(dy), np.abs(dx)) - radius * EXTENT[1]
    return (np.abs(dy) + np.abs(dx) - radius * EXTENT[2]) / math.sqrt(2)


def texture(
    y: np.ndarray,
    x: np.ndarray,
    size: float,
    rng: np.random.Generator,
    waves: tuple[float, float],
    colours: tuple[float, float],
) -> np.ndarray:
    """Smooth waves of two colours in that range at the coordinates, float [T, H, W, 3]; `waves` per width."""
    angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    number = rng.uniform(*waves) * 2 * np.pi / size
    wave = np.sin(number * (math.sin(angle) * y + math.cos(angle) * x) + phase)[..., None]
    first, second = rng.uniform(*colours, (2, 3)).astype(np.float32)
    return (first + second) / 2 + wave * ((first - second) / 2)


def _write(spec: MovingShapes, folder: pathlib.Path, split: str, number: int) -> None:
    """Renders and encodes video `number` of a split; its class is number modulo the classes."""
    motion = CLASSES[number % len(CLASSES)]
    rng = np.random.default_rng([spec.seed, list(spec.splits()).index(split), number])
    path = folder / split / motion / f"{number:06d}.mp4"
    decode.write_video(path, render(spec, motion, rng), generated.FPS)


def generate(spec: MovingShapes, cache: str | os.PathLike, processes: int) -> pathlib.Path:
    """Returns the folder with the videos, in SPLIT/CLASS/NUMBER.mp4; generates it where it is not cached.

    Raises:
        OSError: the cache cannot be written.
    """

    def fill(folder: pathlib.Path) -> None:
        for split in spec.splits():
            for motion in CLASSES:
                (folder / split / motion).mkdir(parents=True)
        generated.each_video(_write, spec, folder, processes)

    return generated.cached("moving_shapes", _VERSION, spec, cache, fill)
