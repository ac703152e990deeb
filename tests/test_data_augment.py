"""The published multi-scale crop: its candidates, its offsets, and PIL's resampling."""

import numpy as np
import pytest
from PIL import Image

from videomae_jax.data import augment


def boxes(height, width, size=(224, 224), draws=4000):
    rng = np.random.default_rng(0)
    return [augment.multi_scale_box(height, width, size, rng) for _ in range(draws)]


def test_sides_are_neighbouring_scales_of_the_short_side():
    sides = {(h, w) for _, _, h, w in boxes(256, 340)}
    scales = [256, 224, 192, 168]
    expected = {(h, w) for i, h in enumerate(scales) for j, w in enumerate(scales) if abs(i - j) <= 1}
    assert sides == expected
    assert len(sides) == 10


def test_sides_near_the_output_become_it():
    assert {h for _, _, h, _ in boxes(226, 340)} == {224, 197, 169, 149}
    assert {h for _, _, h, _ in boxes(227, 340)} == {227, 198, 170, 149}
    # 222 becomes 224, larger than the frame: the offset step is -1 and a border is black.
    assert min(top for top, _, h, _ in boxes(222, 340) if h == 224) == -4


def test_thirteen_offsets():
    places = {(top, left) for top, left, h, w in boxes(256, 340) if (h, w) == (192, 168)}
    y, x = (256 - 192) // 4, (340 - 168) // 4
    grid = {(b * y, a * x) for a in (0, 2, 4) for b in (0, 2, 4)}
    quarters = {(b * y, a * x) for a in (1, 3) for b in (1, 3)}
    assert places == grid | quarters
    assert len(places) == 13


def test_every_frame_gets_the_same_crop(rng):
    frame = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    box = augment.multi_scale_box(60, 80, (32, 32), rng)
    out = augment.resized_crop(np.stack([frame] * 5), box, (32, 32))
    assert out.shape == (5, 32, 32, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1], out.shape))


def test_resampling_is_pils_anti_aliased_bilinear(rng):
    frames = rng.integers(0, 256, (2, 256, 340, 3), dtype=np.uint8)
    out = augment.resized_crop(frames, (16, 40, 224, 256), (112, 112))
    expected = Image.fromarray(frames[1]).crop((40, 16, 296, 240)).resize((112, 112), Image.BILINEAR)
    np.testing.assert_array_equal(out[1], np.asarray(expected))


@pytest.mark.parametrize("given", [(168, 168), (192, 224), (168, 192), (100, 51), (224, 223)])
def test_enlarging_is_pils_within_a_grey_level(given, rng):
    frames = rng.integers(0, 256, (2, 240, 300, 3), dtype=np.uint8)
    out = augment.resized_crop(frames, (3, 5, *given), (224, 224))
    image = Image.fromarray(frames[1]).crop((5, 3, 5 + given[1], 3 + given[0]))
    expected = np.asarray(image.resize((224, 224), Image.BILINEAR)).astype(int)
    assert np.abs(out[1] - expected).max() <= 1
    assert (out[1] != expected).any()  # another computation, not PIL again


def test_what_lies_outside_the_frame_is_black():
    out = augment.resized_crop(np.full((1, 8, 8, 3), 200, np.uint8), (-2, 0, 10, 8), (10, 8))
    assert (out[0, :2] == 0).all()
    assert (out[0, 2:] == 200).all()


def test_centre_crop_keeps_the_output_shape(rng):
    frames = np.zeros((1, 60, 100, 3), np.uint8)
    frames[:, :, 20:80] = 255  # the central square
    assert (augment.centre_crop(frames, (30, 30)) == 255).all()
    assert augment.centre_crop(frames, (20, 40)).shape == (1, 20, 40, 3)


def test_random_resized_boxes():
    rng = np.random.default_rng(0)
    found = np.array([augment.random_resized_box(256, 340, rng) for _ in range(4000)])
    top, left, height, width = found.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 256).all()
    assert (left + width <= 340).all()
    share, ratio = height * width / (256 * 340), width / height
    assert 0.078 < share.min() < 0.09
    assert share.max() > 0.9
    assert 0.73 < ratio.min() < 0.77
    assert 1.31 < ratio.max() < 1.36
    # Nothing fits a strip: its centre, with the nearest ratio.
    assert augment.random_resized_box(100, 2000, rng) == (0, 933, 100, 133)
    assert augment.random_resized_box(2000, 90, rng) == (940, 0, 120, 90)


def test_interpolation_is_bilinear_without_anti_aliasing(rng):
    """Against the formula, pixel by pixel: centre (i + 0.5) * in / out - 0.5, clamped at the edges."""
    frames = rng.integers(0, 256, (2, 9, 30, 3), dtype=np.uint8)
    out = augment.interpolate(frames, (14, 12))
    assert out.shape == (2, 14, 12, 3)
    for y in range(14):
        for x in range(12):
            v, u = max((y + 0.5) * 9 / 14 - 0.5, 0), max((x + 0.5) * 30 / 12 - 0.5, 0)
            i, j = int(v), int(u)
            k, m = min(i + 1, 8), min(j + 1, 29)
            a, b = v - i, u - j
            exact = (1 - a) * ((1 - b) * frames[1, i, j] + b * frames[1, i, m]) + a * (
                (1 - b) * frames[1, k, j] + b * frames[1, k, m]
            )
            np.testing.assert_allclose(out[1, y, x], exact, atol=0.501)
    assert augment.interpolate(frames, (9, 30)) is frames


def test_flips_are_mirrors_of_half_the_clips(rng):
    frames = rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    flipped = [augment.flip(frames, rng) for _ in range(200)]
    mirrored = sum(np.array_equal(f, frames[:, :, ::-1]) for f in flipped)
    assert mirrored + sum(np.array_equal(f, frames) for f in flipped) == 200
    assert 70 < mirrored < 130


def test_erasing_boxes():
    rng = np.random.default_rng(0)
    found = np.array([augment.erasing_box(224, 224, rng) for _ in range(4000)])
    erased = found[found[:, 2] > 0]
    assert abs(len(erased) / 4000 - 0.25) < 0.03
    assert not found[found[:, 2] == 0].any()
    top, left, height, width = erased.T
    assert (top + height <= 224).all()
    assert (left + width <= 224).all()
    assert (height < 224).all()
    share = height * width / 224**2
    assert 0.018 < share.min() < 0.03
    assert 0.3 < share.max() < 0.34
    assert 0.28 < (height / width).min() < 0.4
    assert 2.6 < (height / width).max() < 3.5
