"""Mixup, CutMix and label arithmetic against the formulas of the fact sheet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videomae_jax.tasks import losses, mixup

MIX = mixup.Mix(mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5)


def draws(mix, count=400):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.vmap(lambda key: mixup.draw(mix, 24, 32, key))(keys)


def test_labels():
    smoothed = np.asarray(losses.smoothed(jnp.array([2, 0]), 4, 0.1))
    np.testing.assert_allclose(smoothed[0], [0.025, 0.025, 0.925, 0.025], rtol=1e-6)
    np.testing.assert_allclose(smoothed.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "centre", "box"),
    [
        # sides int(24 * sqrt(0.75)) = 20 and int(32 * sqrt(0.75)) = 27, half 10 and 13
        (0.25, (12, 16), (2, 22, 3, 29)),
        (0.25, (0, 31), (0, 10, 18, 32)),  # cut off at the edges
        (1.0, (5, 5), (5, 5, 5, 5)),
        (0.0, (12, 16), (0, 24, 0, 32)),
    ],
)
def test_cut_box(share, centre, box):
    found = mixup.cut_box(jnp.float32(share), jnp.array(centre, jnp.int32), 24, 32)
    assert tuple(found.tolist()) == box


def test_mixup_mixes_with_the_mirrored_clip():
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.normal(size=(4, 2, 6, 8, 3)), jnp.float32)
    targets = losses.smoothed(jnp.arange(4), 4, 0.1)
    chosen = mixup.Draw(jnp.float32(0.7), jnp.zeros(4, jnp.int32), jnp.array(False))
    mixed, labels = mixup.mix_clips(pixels, targets, jnp.ones(4), chosen)
    np.testing.assert_allclose(mixed, 0.7 * pixels + 0.3 * pixels[::-1], atol=1e-6)
    np.testing.assert_allclose(labels, 0.7 * targets + 0.3 * targets[::-1], atol=1e-6)


def test_cutmix_copies_the_box_into_all_frames():
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.normal(size=(4, 2, 6, 8, 3)), jnp.float32)
    targets = losses.smoothed(jnp.arange(4), 4, 0.0)
    share = 1 - 3 * 4 / 48
    chosen = mixup.Draw(jnp.float32(share), jnp.array([1, 4, 2, 6], jnp.int32), jnp.array(True))
    mixed, labels = mixup.mix_clips(pixels, targets, jnp.ones(4), chosen)
    expected = np.array(pixels)
    expected[:, :, 1:4, 2:6] = np.asarray(pixels)[::-1, :, 1:4, 2:6]
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_allclose(labels[0], [share, 0, 0, 1 - share], atol=1e-6)


def test_nothing_is_mixed_with_a_clip_that_could_not_be_decoded():
    pixels = jnp.stack([jnp.full((2, 6, 8, 3), float(i)) for i in range(4)])
    targets = losses.smoothed(jnp.arange(4), 4, 0.0)
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])  # the partner of clip 0 is clip 3
    for is_box in (True, False):
        chosen = mixup.Draw(jnp.float32(0.5), jnp.array([0, 3, 0, 8], jnp.int32), jnp.array(is_box))
        mixed, labels = mixup.mix_clips(pixels, targets, weight, chosen)
        np.testing.assert_array_equal(mixed[0], pixels[0])
        np.testing.assert_array_equal(labels[0], targets[0])
        assert (np.asarray(mixed[1]) != np.asarray(pixels[1])).any()


def test_how_often_and_how_much():
    """Half of the batches are cut; shares follow Beta(0.8, 0.8), or from the box."""
    drawn = draws(MIX)
    is_box = np.asarray(drawn.is_box)
    assert 0.4 < is_box.mean() < 0.6
    top, bottom, left, right = np.asarray(drawn.box).T
    area = (bottom - top) * (right - left) / (24 * 32)
    np.testing.assert_allclose(np.asarray(drawn.share)[is_box], 1 - area[is_box], atol=1e-6)
    mixed = np.asarray(drawn.share)[~is_box]
    np.testing.assert_allclose(mixed.mean(), 0.5, atol=0.06)
    np.testing.assert_allclose(mixed.var(), 1 / (4 * (2 * 0.8 + 1)), atol=0.02)


def test_switches():
    assert not np.asarray(draws(mixup.Mix(0.8, 0.0, 1.0, 0.5)).is_box).any()
    assert np.asarray(draws(mixup.Mix(0.0, 1.0, 1.0, 0.5)).is_box).all()
    never = draws(mixup.Mix(0.8, 1.0, 0.0, 0.5))
    assert not np.asarray(never.is_box).any()
    np.testing.assert_array_equal(never.share, 1)
    assert not mixup.Mix(0.8, 1.0, 0.0, 0.5).is_active
    assert not mixup.Mix(0.0, 0.0, 1.0, 0.5).is_active


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 20))
def test_mixed_targets_are_distributions(seed, classes):
    labels = jax.random.randint(jax.random.key(seed), (6,), 0, classes)
    chosen = mixup.draw(MIX, 8, 8, jax.random.key(seed))
    pixels = jnp.ones((6, 1, 8, 8, 3))
    mixed, targets = mixup.mix_clips(pixels, losses.smoothed(labels, classes, 0.1), jnp.ones(6), chosen)
    np.testing.assert_allclose(np.asarray(targets).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(mixed, 1, atol=1e-6)


def test_losses_of_each_kind():
    outputs = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    soft = losses.smoothed(jnp.array([0, 2]), 3, 0.1)
    logp = np.log(np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        losses.output_losses(outputs, soft, "softmax", None), -(soft * logp).sum(axis=1), rtol=1e-6
    )
    hot = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    p = 1 / (1 + np.exp(-outputs))
    binary = -(hot * np.log(p) + (1 - hot) * np.log(1 - p)).mean(axis=1)
    np.testing.assert_allclose(losses.output_losses(outputs, hot, "multilabel", None), binary, rtol=1e-5)
    squared = ((outputs - hot) ** 2).mean(axis=1)
    np.testing.assert_allclose(losses.output_losses(outputs, hot, "regression", None), squared, rtol=1e-6)


def test_class_weights_weigh_classes():
    weights = losses.balanced_weights([6, 3, 1])
    np.testing.assert_allclose(np.dot([0.6, 0.3, 0.1], weights), 1)
    outputs, labels = jnp.zeros((3, 3)), losses.smoothed(jnp.arange(3), 3, 0.0)
    found = losses.output_losses(outputs, labels, "softmax", weights)
    np.testing.assert_allclose(found, np.log(3) * np.array(weights), rtol=1e-6)
