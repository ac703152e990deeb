"""Order of tokens and voxels, the target's statistics, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videomae_jax.models import tubelets

small = st.integers(1, 3)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.tuples(small, small, small), st.tuples(small, small, small), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_inverts_patchify(grid, tubelet, channels, batch):
    t, h, w = (g * s for g, s in zip(grid, tubelet, strict=True))
    video = np.random.default_rng(0).integers(0, 256, (batch, t, h, w, channels), dtype=np.uint8)
    cut = tubelets.patchify(jnp.asarray(video), tubelet)
    assert cut.shape == (batch, np.prod(grid), np.prod(tubelet) * channels)
    np.testing.assert_array_equal(tubelets.unpatchify(cut, grid, tubelet), video)


def test_order_of_tokens_and_voxels():
    t, h, w, c = np.meshgrid(np.arange(4), np.arange(6), np.arange(8), np.arange(3), indexing="ij")
    for name, axis, size in (("t", t, 2), ("h", h, 3), ("w", w, 4), ("c", c, 1)):
        cut = np.asarray(tubelets.patchify(jnp.asarray(axis)[None], (2, 3, 4)))[0]
        n = {"t": np.arange(8) // 4, "h": np.arange(8) // 2 % 2, "w": np.arange(8) % 2, "c": np.zeros(8)}[
            name
        ]
        v = np.arange(72)
        voxel = {"t": v // 36, "h": v // 12 % 3, "w": v // 3 % 4, "c": v % 3}[name]
        np.testing.assert_array_equal(cut, (n[:, None] * size + voxel).astype(int), err_msg=name)


def test_target_has_zero_mean_and_unit_unbiased_variance_per_channel(rng):
    raw = jnp.asarray(rng.integers(0, 256, (2, 5, 512 * 3), dtype=np.uint8))
    target = np.asarray(tubelets.reconstruction_target(raw, 3, True)).reshape(2, 5, 512, 3)
    np.testing.assert_allclose(target.mean(axis=2), 0, atol=1e-5)
    np.testing.assert_allclose(target.var(axis=2, ddof=1), 1, atol=1e-4)


def test_a_constant_tubelet_has_a_zero_target():
    target = tubelets.reconstruction_target(jnp.full((1, 1, 24), 77, jnp.uint8), 3, True)
    np.testing.assert_allclose(target, 0, atol=0.1)  # rounding of the mean, divided by epsilon


def test_targets_of_whole_frames(rng):
    """Statistics from integer sums are those of float64, of clips of any contrast and of one bright pixel."""
    noise = rng.integers(0, 256, (2, 4, 12, 16, 3))
    spots = np.full_like(noise, 100) + (noise > 254) * 155
    for video in (noise, 200 + noise // 100, spots):
        video = jnp.asarray(video.astype(np.uint8))
        indices = jnp.asarray([[3, 0, 11], [7, 1, 2]], jnp.int32)
        raw = np.asarray(tubelets.take(tubelets.patchify(video, (2, 4, 8)), indices), np.float64)
        voxels = raw.reshape(2, 3, 64, 3) / 255
        expected = voxels - voxels.mean(2, keepdims=True)
        expected /= voxels.std(2, ddof=1, keepdims=True) + 1e-6
        target = tubelets.reconstruction_targets(video, indices, (2, 4, 8), True)
        np.testing.assert_allclose(target, expected.reshape(raw.shape), rtol=1e-5, atol=1e-6)
        plain = tubelets.reconstruction_targets(video, indices, (2, 4, 8), False)
        np.testing.assert_allclose(plain, raw / 255, rtol=1e-6)


def test_targets_of_constant_and_of_huge_tubelets():
    video, indices = jnp.full((1, 2, 8, 8, 3), 77, jnp.uint8), jnp.array([[1, 0]])
    assert not tubelets.reconstruction_targets(video, indices, (1, 8, 8), True).any()
    with pytest.raises(ValueError, match="at most 16,512"):
        tubelets.reconstruction_targets(jnp.zeros((1, 2, 96, 96, 3), jnp.uint8), indices, (2, 96, 96), True)


def test_statistics_invert_the_target(rng):
    raw = jnp.asarray(rng.integers(0, 256, (1, 4, 48), dtype=np.uint8))
    mean, std = tubelets.statistics(raw / 255, 3)
    back = tubelets.reconstruction_target(raw, 3, True) * std + mean
    np.testing.assert_allclose(back * 255, raw, atol=1e-3)


def test_losses():
    prediction, target = jnp.array([[[0.0, 3.0]]]), jnp.array([[[0.5, 1.0]]])
    for kind, expected in (("mse", (0.25 + 4) / 2), ("l1", 2.5 / 2), ("smooth_l1", (0.125 + 1.5) / 2)):
        np.testing.assert_allclose(
            tubelets.reconstruction_error(prediction, target, kind).mean(axis=1), expected
        )
    with pytest.raises(ValueError, match="unknown loss 'huber'"):
        tubelets.reconstruction_error(prediction, target, "huber")


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"\(16, 225, 224\) cannot be cut .*\(2, 16, 16\)"):
        tubelets.grid_of((16, 225, 224), (2, 16, 16))
    with pytest.raises(ValueError, match="do not fill grid"):
        tubelets.unpatchify(jnp.zeros((1, 7, 24)), (2, 2, 2), (2, 2, 2))


def test_erasing_fills_the_box_of_every_frame_with_noise(rng):
    pixels = jnp.asarray(rng.normal(size=(3, 4, 32, 40, 3)) * 0 + 9, jnp.float32)
    boxes = jnp.array([[4, 6, 20, 30], [0, 0, 0, 0], [31, 0, 9, 5]])  # the last one passes the edge
    keys = jax.random.split(jax.random.key(0), 3)
    out = np.asarray(jax.jit(tubelets.erase)(pixels, boxes, keys))
    changed = (out != 9).any(axis=-1)
    assert changed[0, :, 4:24, 6:36].all()
    assert changed[0].sum() == 4 * 20 * 30
    assert not changed[1].any()
    assert changed[2].sum() == 4 * 1 * 5
    noise = out[0, :, 4:24, 6:36]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert len(np.unique(noise)) > 7000  # independent per pixel, channel and frame
