"""RandAugment: its grammar, its magnitudes, and PIL's operations for the whole clip."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from videomae_jax.data import randaugment

SEVEN = randaugment.Level(7.0, 1.0, True, 100, 200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand-m7-n4-mstd0.5-inc1", (7, 4, 0.5, True)),
        ("rand", (10, 2, 0.0, False)),
        ("rand-inc0", (10, 2, 0.0, True)),  # any digit, as published
        ("rand-inc", (10, 2, 0.0, False)),
        ("rand-mstd1-m9", (9, 2, 1.0, False)),
    ],
)
def test_grammar(text, expected):
    policy = randaugment.parse(text)
    assert (policy.magnitude, policy.operations, policy.noise, policy.increasing) == expected


@pytest.mark.parametrize("text", ["", "augmix-m7", "rand-m", "rand-x3", "rand-m7.5", "rand-m7-w0"])
def test_what_is_no_policy(text):
    with pytest.raises(ValueError, match="is not understood"):
        randaugment.parse(text)


def test_magnitudes_at_seven():
    """The fact sheet's: factor 1 +- 0.63, 2 bits, solarize from 77, add 77."""
    assert SEVEN.factor == pytest.approx(1.63)
    assert randaugment.Level(7.0, -1.0, True, 1, 1).factor == pytest.approx(0.37)
    assert (SEVEN.posterize_bits, SEVEN.solarize_threshold, SEVEN.solarize_add) == (2, 77, 77)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_operations_are_pils(rng, sign):
    image = Image.fromarray(rng.integers(0, 256, (100, 200, 3), dtype=np.uint8))
    level = randaugment.Level(7.0, sign, True, 100, 200)
    bicubic, grey = Image.Resampling.BICUBIC, (128, 128, 128)

    def affine(*values):
        return image.transform(image.size, Image.Transform.AFFINE, values, bicubic, fillcolor=grey)

    expected = {
        "AutoContrast": ImageOps.autocontrast(image),
        "Equalize": ImageOps.equalize(image),
        "Invert": ImageOps.invert(image),
        "Rotate": image.rotate(sign * 21, bicubic, fillcolor=grey),
        "Posterize": ImageOps.posterize(image, 2),
        "Solarize": ImageOps.solarize(image, 77),
        "Color": ImageEnhance.Color(image).enhance(1 + sign * 0.63),
        "Contrast": ImageEnhance.Contrast(image).enhance(1 + sign * 0.63),
        "Brightness": ImageEnhance.Brightness(image).enhance(1 + sign * 0.63),
        "Sharpness": ImageEnhance.Sharpness(image).enhance(1 + sign * 0.63),
        "ShearX": affine(1, sign * 0.21, 0, 0, 1, 0),
        "ShearY": affine(1, 0, 0, sign * 0.21, 1, 0),
        "TranslateX": affine(1, 0, sign * 0.315 * 200, 0, 1, 0),
        "TranslateY": affine(1, 0, 0, 0, 1, sign * 0.315 * 100),
    }
    assert set(randaugment._OPERATIONS) == {*expected, "SolarizeAdd"}
    for name, wanted in expected.items():
        found = randaugment._OPERATIONS[name](level)(image)
        np.testing.assert_allclose(np.asarray(found, int), np.asarray(wanted, int), atol=1, err_msg=name)
    pixels = np.asarray(image).astype(int)
    added = np.where(pixels < 128, np.minimum(pixels + 77, 255), pixels)
    np.testing.assert_array_equal(np.asarray(randaugment._OPERATIONS["SolarizeAdd"](level)(image)), added)


def test_every_frame_gets_the_same_operations(rng):
    frame = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    policy = randaugment.parse("rand-m7-n4-mstd0.5-inc1")
    seen = set()
    for _ in range(20):
        out = randaugment.apply(np.stack([frame] * 3), policy, rng)
        assert out.shape == (3, 40, 60, 3)
        assert out.dtype == np.uint8
        np.testing.assert_array_equal(out[1:], out[:-1])
        seen.add(out.tobytes())
    assert len(seen) > 15


def test_half_of_the_drawn_operations_are_applied(monkeypatch):
    rng = np.random.default_rng(0)
    levels = []
    record = dict.fromkeys(
        randaugment._OPERATIONS, lambda level: levels.append(level) or (lambda image: image)
    )
    monkeypatch.setattr(randaugment, "_OPERATIONS", record)
    policy = randaugment.parse("rand-m7-n4-mstd0.5-inc1")
    for _ in range(1000):
        randaugment.draw(policy, 10, 10, rng)
    assert abs(len(levels) / 4000 - 0.5) < 0.03
    magnitudes = [level.magnitude for level in levels]
    assert abs(np.mean(magnitudes) - 7) < 0.05
    assert abs(np.std(magnitudes) - 0.5) < 0.05
    assert abs(np.mean([level.sign for level in levels])) < 0.1


def test_the_older_set_is_weaker_with_a_higher_level():
    level = randaugment.Level(3.0, -1.0, False, 1, 1)
    assert level.factor == pytest.approx(0.64)
    assert (level.posterize_bits, level.solarize_threshold) == (1, 76)
