"""Crops resized on the device: the host's pixels to one grey level, the same bytes whatever computes them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videomae_jax.data import decode, pipeline
from videomae_jax.models import resizing

SIDE, SIZE = 96, (80, 64)
RESIZE = jax.jit(lambda video, crop: resizing.resize(video, crop, SIZE))
TAPS = jax.jit(resizing.taps, static_argnums=(1, 2))


def padded(frames: np.ndarray) -> np.ndarray:
    made = np.zeros((len(frames), SIDE, SIDE, 3), np.uint8)
    made[:, : frames.shape[1], : frames.shape[2]] = frames
    return made


@settings(deadline=None, max_examples=30)
@given(st.integers(8, SIDE), st.integers(8, SIDE), st.integers(0, 99), st.booleans())
def test_pixels_are_pillows_to_one_grey_level(height, width, seed, is_noise):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    if not is_noise:
        soft = [
            Image.fromarray(f).resize((9, 9)).resize((width, height), Image.Resampling.BICUBIC)
            for f in frames
        ]
        frames = np.stack([np.asarray(image) for image in soft])
    crops = jnp.array([[height, width]])
    found = np.asarray(RESIZE(jnp.asarray(padded(frames)[None]), crops))[0].astype(int)
    images = [Image.fromarray(f).resize(SIZE[::-1], Image.Resampling.BILINEAR) for f in frames]
    apart = np.abs(found - np.stack([np.asarray(image) for image in images]))
    assert apart.max() <= 2
    assert (apart > 1).mean() <= (0.003 if is_noise else 0.0005)


def dense(crop: int, size: int) -> np.ndarray:
    """The shares of every pixel of a line, in 1/256, int [size, SIDE]."""
    places, shares = (np.asarray(part[0]) for part in resizing.taps(jnp.array([crop], jnp.int32), size, SIDE))
    found = np.zeros((size, SIDE), int)
    for pixel in range(size):
        np.add.at(found[pixel], places[pixel], shares[pixel])
    return found


@settings(deadline=None, max_examples=30)
@given(st.integers(4, SIDE), st.sampled_from([1, 17, 64, 96]))
def test_shares_are_those_of_a_triangle_over_the_crop(crop, size):
    found = dense(crop, size)
    assert (found.sum(axis=1) == 256).all()
    assert (found >= 0).all()
    assert (found[:, crop:] == 0).all()
    if crop == size:
        np.testing.assert_array_equal(found, 256 * np.eye(size, SIDE))
    scale = crop / size
    centres = (np.arange(size) + 0.5)[:, None] * scale
    expected = np.maximum(1 - np.abs(np.arange(crop) + 0.5 - centres) / max(scale, 1), 0)
    expected *= 256 / expected.sum(axis=1, keepdims=True)
    # The largest share makes up for the rounding of all others.
    taps = math.ceil(2 * max(scale, 1))
    assert np.abs(found[:, :crop] - expected).max() <= 0.5 * taps + 1e-9


def test_both_ways_give_the_same_bytes():
    """And those of whole numbers, written out: no device's order or precision of sums can change one."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (3, 1, SIDE, SIDE, 3), dtype=np.uint8)
    crops = np.array([[96, 70], [50, 96], [80, 64]], np.int32)
    taps = [resizing.taps(jnp.asarray(crops[:, i]), SIZE[i], SIDE) for i in (0, 1)]
    ways = [np.asarray(way(jnp.asarray(video), *taps)) for way in (resizing.gathered, resizing.multiplied)]
    texts = [str(jax.make_jaxpr(way)(video, *taps)) for way in (resizing.gathered, resizing.multiplied)]
    assert ["dot_general" in text for text in texts] == [False, True]
    for clip, (height, width), *found in zip(video, crops, *ways, strict=True):
        rows, columns = dense(height, SIZE[0]), dense(width, SIZE[1])
        lines = (np.einsum("hs,szc->hzc", rows, clip[0].astype(int)) + 128) >> 8
        expected = (np.einsum("wz,hzc->hwc", columns, lines) + 128) >> 8
        for frames in found:
            np.testing.assert_array_equal(frames[0], expected)


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_the_loader_leaves_the_same_crops_to_the_device(tmp_path, clips_per_video):
    rng = np.random.default_rng(0)
    waves = [np.sin(np.add.outer(np.arange(96), np.arange(120)) / 9 + i)[..., None] for i in range(20)]
    frames = (np.stack(waves) * [90, 60, 30] + 128 + rng.normal(size=(20, 96, 120, 3))).astype(np.uint8)
    path = str(tmp_path / "a.mp4")
    decode.write_video(path, frames, 25)
    record = {"video": path, "name": "a", "label": 0, "record": 0, "error": ""}
    for seed in range(6):
        host = pipeline.PretrainClip(8, 3, SIZE, clips_per_video)
        device = pipeline.PretrainClip(8, 3, SIZE, clips_per_video, short_side=96)
        expected, made = (
            clip.random_map((5, record), np.random.default_rng(seed)) for clip in (host, device)
        )
        assert made["video"].shape == (clips_per_video, 8, 96, 96, 3)
        assert made["crop"].dtype == np.int32
        found = np.asarray(RESIZE(made["video"], made["crop"]))
        apart = np.abs(found.astype(int) - expected["video"])
        assert (apart > 1).mean() < 0.001
        assert "crop" not in expected


@pytest.mark.parametrize(
    ("side", "reason"), [(0, "cannot be opened"), (32, "is 48x32, more than its data set")]
)
def test_a_bad_video_has_a_crop_too(tmp_path, side, reason):
    clip = pipeline.PretrainClip(4, 1, (16, 16), 2, short_side=24)
    path = str(tmp_path / "a.mp4")
    if side:
        decode.write_video(path, np.zeros((8, side, 48, 3), np.uint8), 25)
    record = {"video": path, "name": "a", "label": 0, "record": 0, "error": ""}
    made = clip.random_map((0, record), np.random.default_rng(0))
    assert (made["weight"], made["video"].shape, made["video"].any()) == (0, (2, 4, 24, 24, 3), False)
    assert made["crop"].tolist() == [[16, 16]] * 2
    assert reason in made["error"]


def test_clips_of_their_size_are_left_alone():
    video = jnp.zeros((1, 2, 8, 8, 3), jnp.uint8)
    assert resizing.clips({"video": video}, (4, 4)) is video
    crop = jnp.array([[8, 6]], jnp.int32)
    assert resizing.clips({"video": video, "crop": crop}, (4, 4)).shape == (1, 2, 4, 4, 3)
