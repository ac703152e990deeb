"""The generated data set of studies: handwritten digits that move over a still, busy background.

A class is which digit, moving which way: four digits in four directions. All digits of a video are of one
kind and move alike and fast, so a place that is hidden at all times is told by the places that the same digit
passes at other times: to fill it in, a model must understand motion. The background is fine, and of no use:
it differs from video to video, stands still, and a hidden part of it cannot be told at all. With few labels
it is what a model from scratch learns by heart.

Digits are the real ones of scikit-learn, other ones in each split. Looks are domains: the same classes, in
other textures, colours and speeds. Places wrap around, so each is equally likely at every time. Everything
follows from a seed.
"""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from videomae_jax.data import decode, generated
from videomae_jax.data.moving_shapes import DIRECTIONS

KINDS = (0, 1, 3, 4)
MOTIONS = ("down", "left", "right", "up")
CLASSES = tuple(f"{kind}_{motion}" for kind in KINDS for motion in MOTIONS)
_VERSION = 1  # part of the cache's name: raise it when the same settings give other videos


@dataclasses.dataclass(frozen=True)
class Look:
    """A domain.

    Attributes:
        grain: size of the background's features, in parts of the frame.
        background: range of its colours, 0 to 1.
        ink: range of the digits' colours.
        speed: parts of the frame per frame.
    """

    grain: tuple[float, float]
    background: tuple[float, float]
    ink: tuple[float, float]
    speed: tuple[float, float]


LOOKS = {
    "a": Look(grain=(0.12, 0.22), background=(0.2, 0.8), ink=(0.0, 1.0), speed=(0.05, 0.075)),
    "b": Look(grain=(0.22, 0.4), background=(0.0, 0.5), ink=(0.3, 1.0), speed=(0.07, 0.095)),
}
_SIDE = (0.38, 0.5)  # of a digit, in parts of the frame
_CONTRAST = 0.3  # between a digit and the middle of the background, in one channel at least


@dataclasses.dataclass(frozen=True)
class MovingDigits(generated.Spec):
    """What to generate.

    Attributes:
        look: one of `LOOKS`.
    """

    look: str = "a"
    classes = CLASSES

    def __post_init__(self):
        if self.look not in LOOKS:
            raise ValueError(f"look={self.look!r} is unknown: use {' or '.join(LOOKS)}")


@functools.cache
def digits(split: str) -> dict[int, np.ndarray]:
    """Images of each kind, float32 [N, 8, 8] in 0..1; no split has one of another.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ValueError(
            "moving_digits draws the digits of scikit-learn: EXTRAS=study launch/local.sh ..."
        ) from None
    found: Any = datasets.load_digits()
    part = {"train": slice(0, 1200), "validation": slice(1200, 1500), "test": slice(1500, None)}[split]
    images, kinds = found.images[part].astype(np.float32) / 16, found.target[part]
    return {kind: images[kinds == kind] for kind in KINDS}


def render(spec: MovingDigits, split: str, name: str, rng: np.random.Generator) -> np.ndarray:
    """One video of class `name`, uint8 RGB [frames, size, size, 3]."""
    look, size = LOOKS[spec.look], spec.size
    kind, motion = name.split("_", 1)
    down, right = DIRECTIONS[motion]
    speed = rng.uniform(*look.speed) * size
    background = noise(rng, size, rng.uniform(*look.grain) * size, look.background)
    sheet = _sheet(rng, size, digits(split)[int(kind)], look)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    frames = []
    for time in range(spec.frames):
        digit = sample(sheet, y - down * speed * time, x - right * speed * time)
        frames.append(background * (1 - digit[..., :1]) + digit[..., 1:])
    return np.clip(np.rint(np.stack(frames) * 255), 0, 255).astype(np.uint8)


def noise(rng: np.random.Generator, size: int, grain: float, colours: tuple[float, float]) -> np.ndarray:
    """A smooth random texture that tiles, float32 [size, size, 3], with features of `grain` pixels."""
    cells = max(round(size / grain), 2)
    coarse = np.rint(rng.uniform(*colours, (cells, cells, 3)) * 255).astype(np.uint8)
    tiles = Image.fromarray(np.tile(coarse, (3, 3, 1)))
    fine = np.asarray(tiles.resize((3 * size, 3 * size), Image.Resampling.BICUBIC), np.float32) / 255
    return fine[size : 2 * size, size : 2 * size]


def _sheet(rng: np.random.Generator, size: int, images: np.ndarray, look: Look) -> np.ndarray:
    """Two to four digits, each in a colour, on a sheet that tiles: float32 [size, size, 4], how much of the
    sheet shows, and its colour times that.
    """
    sheet = np.zeros((size, size, 4), np.float32)
    top, left = rng.uniform(0, size, 2)
    places = rng.permutation(4)[: rng.integers(2, 5)]
    for place in places:
        side = int(rng.uniform(*_SIDE) * size)
        drawn = Image.fromarray(np.rint(images[rng.integers(len(images))] * 255).astype(np.uint8))
        shown = np.asarray(drawn.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        shown = np.clip((shown - 0.2) * 2.5, 0, 1)[..., None]
        shift = rng.uniform(-0.06, 0.06, 2) * size
        rows = (int(top + place // 2 * size / 2 + shift[0]) + np.arange(side)) % size
        columns = (int(left + place % 2 * size / 2 + shift[1]) + np.arange(side)) % size
        at = np.ix_(rows, columns)
        sheet[at] = sheet[at] * (1 - shown) + np.concatenate([shown, shown * _ink(rng, look)], axis=-1)
    return sheet


def _ink(rng: np.random.Generator, look: Look) -> np.ndarray:
    """A colour that stands out from the background."""
    middle = sum(look.background) / 2
    while True:
        colour = rng.uniform(*look.ink, 3).astype(np.float32)
        if np.abs(colour - middle).max() > _CONTRAST:
            return colour


def sample(sheet: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A tiling sheet [S, S, C] at places between its pixels, bilinear, float32 [H, W, C]."""
    size = len(sheet)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = (y - top)[..., None].astype(np.float32), (x - left)[..., None].astype(np.float32)
    top, left, bottom, beyond = top % size, left % size, (top + 1) % size, (left + 1) % size
    above = sheet[top, left] * (1 - right) + sheet[top, beyond] * right
    below = sheet[bottom, left] * (1 - right) + sheet[bottom, beyond] * right
    return above * (1 - down) + below * down


def _write(spec: MovingDigits, folder: pathlib.Path, split: str, number: int) -> None:
    """Renders and encodes video `number` of a split; its class is number modulo the classes."""
    name = CLASSES[number % len(CLASSES)]
    rng = np.random.default_rng([spec.seed, list(spec.splits()).index(split), number])
    path = folder / split / name / f"{number:06d}.mp4"
    decode.write_video(path, render(spec, split, name, rng), generated.FPS)


def generate(spec: MovingDigits, cache: str | os.PathLike, processes: int) -> pathlib.Path:
    """Returns the folder with the videos, in SPLIT/CLASS/NUMBER.mp4; generates it where it is not cached.

    Raises:
        OSError: the cache cannot be written.
        ValueError: scikit-learn is not installed.
    """

    def fill(folder: pathlib.Path) -> None:
        digits("train")  # before any process starts
        for split in spec.splits():
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
        generated.each_video(_write, spec, folder, processes)

    return generated.cached("moving_digits", _VERSION, spec, cache, fill)
