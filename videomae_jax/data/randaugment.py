"""RandAugment of a whole clip (arXiv 1909.13719) in the published form: every frame gets the same operations.

A policy is text such as `rand-m7-n4-mstd0.5-inc1`: magnitude m of 0..10, n operations, normal noise on the
magnitude, the increasing set of operations (any digit after `inc`), `w0` for a weighted choice without
repeats (not supported: no recipe uses it).
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_GREY = (128, 128, 128)
_APPLIED = 0.5  # probability of each drawn operation

Operation = Callable[[Image.Image], Image.Image]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A parsed policy.

    Attributes:
        magnitude: mean strength, 0..10.
        operations: how many are drawn for a clip, with repeats.
        noise: standard deviation of the strength.
        increasing: whether every operation grows with the strength; the older set has some that shrink.
    """

    magnitude: int = 10
    operations: int = 2
    noise: float = 0.0
    increasing: bool = False


def parse(text: str) -> Policy:
    """Reads a policy.

    Raises:
        ValueError: text that is none.

    >>> parse("rand-m7-n4-mstd0.5-inc1")
    Policy(magnitude=7, operations=4, noise=0.5, increasing=True)
    """
    first, *parts = text.split("-")
    values: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)?", part)
        if not match or (match[2] is None and match[1] != "inc"):
            raise ValueError(
                f"{part!r} in the policy {text!r} is not understood: use rand-m7-n4-mstd0.5-inc1"
            )
        if match[2] is not None:  # a bare `inc` says nothing, as published
            values[match[1]] = float(match[2])
    if first != "rand" or any(values.get(name, 0) % 1 for name in ("m", "n")):
        raise ValueError(f"the policy {text!r} is not understood: use a form of rand-m7-n4-mstd0.5-inc1")
    return Policy(
        magnitude=int(values.get("m", 10)),
        operations=int(values.get("n", 2)),
        noise=values.get("mstd", 0.0),
        increasing="inc" in values,
    )


def apply(frames: np.ndarray, policy: Policy, rng: np.random.Generator) -> np.ndarray:
    """Applies drawn operations to a clip, uint8 [T, H, W, 3] -> the same shape."""
    drawn = draw(policy, frames.shape[1], frames.shape[2], rng)
    if not drawn:
        return frames
    out = np.empty_like(frames)
    for frame, target in zip(frames, out, strict=True):
        image = Image.fromarray(frame)
        for operation in drawn:
            image = operation(image)
        target[:] = np.asarray(image)
    return out


def draw(policy: Policy, height: int, width: int, rng: np.random.Generator) -> list[Operation]:
    """The operations of a clip of that size, in order."""
    names = list(_OPERATIONS)
    drawn = []
    for name in rng.choice(names, size=policy.operations):
        if rng.random() >= _APPLIED:
            continue
        magnitude = float(np.clip(rng.normal(policy.magnitude, policy.noise), 0, 10))
        sign = 1.0 if rng.random() < 0.5 else -1.0
        drawn.append(_OPERATIONS[name](Level(magnitude, sign, policy.increasing, height, width)))
    return drawn


@dataclasses.dataclass(frozen=True)
class Level:
    """What decides an operation: its strength 0..10, its direction, the set, and the frame's size."""

    magnitude: float
    sign: float
    increasing: bool
    height: int
    width: int

    @property
    def factor(self) -> float:
        """Of colour, contrast, brightness and sharpness; 1 changes nothing."""
        if self.increasing:
            return 1 + self.sign * 0.09 * self.magnitude
        return 0.18 * self.magnitude + 0.1

    @property
    def posterize_bits(self) -> int:
        """Bits kept of each channel."""
        bits = int(0.4 * self.magnitude)
        return 4 - bits if self.increasing else bits

    @property
    def solarize_threshold(self) -> int:
        """Pixels from here on are inverted."""
        threshold = int(25.6 * self.magnitude)
        return 256 - threshold if self.increasing else threshold

    @property
    def solarize_add(self) -> int:
        """Added to pixels below 128."""
        return min(int(11 * self.magnitude), 128)


def _affine(b: float = 0.0, c: float = 0.0, d: float = 0.0, f: float = 0.0) -> Operation:
    """Pixel (x, y) comes from (x + b y + c, d x + y + f)."""

    def operation(image: Image.Image) -> Image.Image:
        matrix = (1.0, b, c, d, 1.0, f)
        bicubic = Image.Resampling.BICUBIC
        return image.transform(image.size, Image.Transform.AFFINE, matrix, bicubic, fillcolor=_GREY)

    return operation


def _rotate(level: Level) -> Operation:
    degrees = level.sign * 3 * level.magnitude
    return lambda image: image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=_GREY)


def _posterize(level: Level) -> Operation:
    bits = level.posterize_bits
    if bits >= 8:
        return lambda image: image
    return _table([value & ~(2 ** (8 - bits) - 1) & 255 for value in range(256)])


def _solarize_add(level: Level) -> Operation:
    add = level.solarize_add
    return _table([min(value + add, 255) if value < 128 else value for value in range(256)])


def _table(values: list[int]) -> Operation:
    return lambda image: image.point(values * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Level], Operation]:
    return lambda level: lambda image: kind(image).enhance(level.factor)


_OPERATIONS: dict[str, Callable[[Level], Operation]] = {
    "AutoContrast": lambda _level: ImageOps.autocontrast,
    "Equalize": lambda _level: ImageOps.equalize,
    "Invert": lambda _level: ImageOps.invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": lambda level: lambda image: ImageOps.solarize(image, level.solarize_threshold),
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda level: _affine(b=level.sign * 0.03 * level.magnitude),
    "ShearY": lambda level: _affine(d=level.sign * 0.03 * level.magnitude),
    "TranslateX": lambda level: _affine(c=level.sign * 0.045 * level.magnitude * level.width),
    "TranslateY": lambda level: _affine(f=level.sign * 0.045 * level.magnitude * level.height),
}
"""The fifteen operations, by their published names."""
