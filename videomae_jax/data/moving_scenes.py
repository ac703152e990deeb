"""The generated data set of detection: shapes that move differently in one video, each with its box.

A shape moves in one of eight directions, and may grow or shrink; what it does is the action of its box. As
several do different things in the same frames, only the box tells which one is asked for. Real H.264 files
and AVA's lists, in the form of `scenes`.
"""

import dataclasses
import os
import pathlib

import numpy as np

from videomae_jax.data import decode, generated, moving_shapes
from videomae_jax.data.moving_shapes import CLASSES as DIRECTIONS
from videomae_jax.data.moving_shapes import MovingShapes

ACTIONS = (*DIRECTIONS, "grow", "shrink")
_VERSION = 1
_KEYS = (-4, 0, 4)  # frames from the middle one
_TRIES = 200


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A shape that moves evenly; sizes in pixels, rates in pixels a video."""

    centre: tuple[float, float]
    way: tuple[float, float]
    radius: float
    growth: float
    actions: tuple[str, ...]

    def at(self, time: float | np.ndarray):
        """(y, x, radius) at a time from -0.5 to 0.5."""
        return (
            self.centre[0] + self.way[0] * time,
            self.centre[1] + self.way[1] * time,
            self.radius * np.exp(self.growth * time),
        )


def _draw(spec: MovingShapes, rng: np.random.Generator) -> list[_Shape]:
    """Two or three shapes that stay in the frame and hardly cover each other in the middle of the video."""
    size, span = float(spec.size), spec.frames / 32
    shapes: list[_Shape] = []
    wanted = int(rng.integers(2, 4))
    motions = list(rng.permutation(DIRECTIONS))
    for _ in range(_TRIES):
        if len(shapes) == wanted:
            break
        motion = motions[len(shapes)]
        down, right = moving_shapes.DIRECTIONS[motion]
        length = rng.uniform(0.45, 0.7) * size * span
        radius = rng.uniform(0.1, 0.2) * size
        change = int(rng.integers(3))  # even, growing, shrinking
        growth = (0.0, 1.0, -1.0)[change] * rng.uniform(0.6, 0.9)
        actions = (str(motion), *(() if not change else (("grow", "shrink")[change - 1],)))
        centre = (float(rng.uniform(0, size)), float(rng.uniform(0, size)))
        shape = _Shape(centre, (down * length, right * length), float(radius), float(growth), actions)
        reach = [shape.at(time) for time in (-0.5, 0.5)]
        is_inside = all(r / 2 <= c <= size - r / 2 for y, x, r in reach for c in (y, x))
        apart = all(
            max(abs(a - b) for a, b in zip(centre, other.centre, strict=True)) > radius + other.radius
            for other in shapes
        )
        if is_inside and apart:
            shapes.append(shape)
    return shapes


def render(
    spec: MovingShapes, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[_Shape, np.ndarray]]]:
    """One video, uint8 RGB [frames, size, size, 3]; and each shape with its boxes in parts of the frame,
    float [frames, 4].
    """
    size = float(spec.size)
    y, x = np.mgrid[0 : spec.size, 0 : spec.size].astype(np.float32)[:, None]
    time = np.linspace(-0.5, 0.5, spec.frames, dtype=np.float32)[:, None, None]
    drift = rng.uniform(-0.1, 0.1, 2).astype(np.float32) * size * spec.frames / 32
    image = moving_shapes.texture(y - drift[0] * time, x - drift[1] * time, size, rng, (0.3, 1.0), (0.4, 0.6))
    found = []
    for shape in _draw(spec, rng):
        centre_y, centre_x, radius = shape.at(time)
        dy, dx = y - centre_y, x - centre_x
        kind = int(rng.integers(len(moving_shapes.EXTENT)))
        inside = np.clip(0.5 - moving_shapes.distance(dy, dx, radius, kind), 0, 1)[..., None]
        scale = size / 4 / radius
        paint = moving_shapes.texture(dy * scale, dx * scale, size, rng, (0.4, 1.2), (0.0, 1.0))
        image = image + inside * (paint - image)
        reach = radius * moving_shapes.EXTENT[kind]
        corners = [centre_x - reach, centre_y - reach, centre_x + reach, centre_y + reach]
        found.append((shape, np.clip(np.stack(corners, -1).reshape(-1, 4) / size, 0, 1)))
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8), found


def _write(spec: MovingShapes, folder: pathlib.Path, split: str, number: int) -> list[str]:
    """Renders and encodes a video; returns its rows."""
    rng = np.random.default_rng([spec.seed, 1000 + list(spec.splits()).index(split), number])
    frames, shapes = render(spec, rng)
    name = f"{split}_{number:06d}"
    decode.write_video(folder / "videos" / f"{name}.mp4", frames, generated.FPS)
    return [
        f"{name},{frame / generated.FPS:.4f},{','.join(f'{c:.4f}' for c in corners[frame])},"
        f"{ACTIONS.index(action) + 1},{person}"
        for frame in (spec.frames // 2 + offset for offset in _KEYS)
        for person, (shape, corners) in enumerate(shapes)
        for action in shape.actions
    ]


def generate(spec: MovingShapes, cache: str | os.PathLike, processes: int) -> pathlib.Path:
    """Returns the folder with videos and lists; generates it where it is not cached.

    Raises:
        OSError: the cache cannot be written.
        ValueError: frames too few for the key frames.
    """
    if spec.frames // 2 + min(_KEYS) < 0 or spec.frames // 2 + max(_KEYS) >= spec.frames:
        raise ValueError(f"frames={spec.frames}: detection needs {2 * max(_KEYS) + 1} or more")

    def fill(folder: pathlib.Path) -> None:
        (folder / "videos").mkdir(parents=True)
        written = generated.each_video(_write, spec, folder, processes)
        for split in spec.splits():
            lines = [line for name, _, rows in written if name == split for line in rows]
            (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
        names = "".join(f"{i},{name}\n" for i, name in enumerate(ACTIONS, 1))
        (folder / "classes.csv").write_text(names)

    return generated.cached("moving_scenes", _VERSION, spec, cache, fill)
