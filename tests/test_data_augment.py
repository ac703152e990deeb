"""The published multi-scale crop: its candidates, its offsets, and PIL's resampling."""

import numpy as np
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
    out = augment.multi_scale_crop(np.stack([frame] * 5), (32, 32), rng)
    assert out.shape == (5, 32, 32, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1], out.shape))


def test_resampling_is_pils_anti_aliased_bilinear(rng):
    frames = rng.integers(0, 256, (2, 256, 340, 3), dtype=np.uint8)
    out = augment.resized_crop(frames, (16, 40, 224, 256), (112, 112))
    expected = Image.fromarray(frames[1]).crop((40, 16, 296, 240)).resize((112, 112), Image.BILINEAR)
    np.testing.assert_array_equal(out[1], np.asarray(expected))


def test_what_lies_outside_the_frame_is_black():
    out = augment.resized_crop(np.full((1, 8, 8, 3), 200, np.uint8), (-2, 0, 10, 8), (10, 8))
    assert (out[0, :2] == 0).all()
    assert (out[0, 2:] == 200).all()


def test_centre_crop_keeps_the_output_shape(rng):
    frames = np.zeros((1, 60, 100, 3), np.uint8)
    frames[:, :, 20:80] = 255  # the central square
    assert (augment.centre_crop(frames, (30, 30)) == 255).all()
    assert augment.centre_crop(frames, (20, 40)).shape == (1, 20, 40, 3)
