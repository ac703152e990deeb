"""RoIAlign against its definition, and the detector built on it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from flax import nnx

from videomae_jax import sharding
from videomae_jax.models import roi, vit
from videomae_jax.models.detector import ActionDetector, DetectorConfig


def sample(features, y, x):
    """Bilinear, as Detectron's kernel: 0 more than a cell outside, else the nearest edge."""
    height, width, _ = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    y, x = y - top, x - left
    upper = features[top, left] * (1 - x) + features[top, right] * x
    lower = features[bottom, left] * (1 - x) + features[bottom, right] * x
    return upper * (1 - y) + lower * y


def written_out(features, box, bins, aligned):
    left, top, right, bottom = (float(x) - 0.5 * aligned for x in box)
    height, width = bottom - top, right - left
    if not aligned:
        height, width = max(height, 1.0), max(width, 1.0)
    down, across = math.ceil(height / bins), math.ceil(width / bins)
    out = np.zeros((bins, bins, features.shape[-1]))
    for i in range(bins):
        for j in range(bins):
            for a in range(down):
                for b in range(across):
                    y = top + height / bins * (i + (a + 0.5) / down)
                    x = left + width / bins * (j + (b + 0.5) / across)
                    out[i, j] += sample(features, y, x)
    return out / max(down * across, 1)


def some_boxes(rng, count, height, width):
    """Inside, outside, degenerate, reversed, and larger than the frame; some on whole cells."""
    corners = rng.uniform(-3, max(height, width) + 3, (count, 2, 2)).astype(np.float32)
    boxes = np.sort(corners, axis=1)
    boxes[: count // 10] = boxes[: count // 10].round()
    boxes[count // 10 : count // 8, 1] = boxes[count // 10 : count // 8, 0]
    boxes[count // 8 : count // 6] = boxes[count // 8 : count // 6, ::-1]
    return boxes.reshape(count, 4)


@pytest.mark.parametrize("aligned", [False, True])
def test_is_the_definition_for_a_thousand_boxes(rng, aligned):
    features = rng.normal(size=(10, 14, 2)).astype(np.float32)
    boxes = some_boxes(rng, 1000, 10, 14)
    found = roi.roi_align(jnp.asarray(features)[None], jnp.asarray(boxes)[None], 3, aligned, 7)[0]
    expected = np.stack([written_out(features, box, 3, aligned) for box in boxes])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected).max() > 1


def test_samples_suffice_for_boxes_of_the_whole_frame(rng):
    features = rng.normal(size=(16, 29, 2)).astype(np.float32)
    box = np.array([0, 0, 29, 16], np.float32)
    samples = roi.samples_of((16, 29), 7)
    found = roi.roi_align(jnp.asarray(features)[None], jnp.asarray(box)[None, None], 7, True, samples)
    np.testing.assert_allclose(found[0, 0], written_out(features, box, 7, True), atol=1e-5)


def test_gradient_by_finite_differences(rng):
    features = jnp.asarray(rng.normal(size=(1, 5, 6, 1)), jnp.float32)
    boxes = jnp.asarray([[[0.3, 0.7, 4.1, 3.9], [-1.0, 2.0, 8.0, 4.0]]])
    weights = jnp.asarray(rng.normal(size=(1, 2, 2, 2, 1)), jnp.float32)

    def total(features):
        return (roi.roi_align(features, boxes, 2, True, 3) * weights).sum()

    gradient, step = jax.grad(total)(features), 0.5  # linear in the features: any step will do
    for place in np.ndindex(5, 6):
        moved = features.at[0, *place, 0].add(step)
        assert gradient[0, *place, 0] == pytest.approx(float(total(moved) - total(features)) / step, abs=1e-5)


CONFIG = DetectorConfig(
    clip_size=(4, 32, 32),
    tubelet=(2, 8, 8),
    pixel_mean=(0.5,) * 3,
    pixel_std=(0.25,) * 3,
    encoder=vit.Stack(32, 2, 2, 64),
    classes=("run", "sit", "wave"),
    head_scale=1.0,
)


@pytest.fixture(scope="module")
def detector():
    return ActionDetector(CONFIG, rngs=nnx.Rngs(0))


def clips_and_boxes(rng, count=8):
    pixels = jnp.asarray(rng.normal(size=(count, 4, 32, 32, 3)), jnp.float32)
    return pixels, jnp.asarray(some_boxes(rng, 3 * count, 32, 32).reshape(count, 3, 4))


def test_eight_devices_give_the_same(detector, rng):
    pixels, boxes = clips_and_boxes(rng)
    graph, params = nnx.split(detector)
    alone = jax.jit(lambda p, x: nnx.merge(graph, p).logits(*x))(params, (pixels, boxes))
    mesh = mesh_of(8)
    batch = sharding.global_batch(mesh, {"pixels": np.asarray(pixels), "boxes": np.asarray(boxes)})
    mapped = sharding.by_rows(lambda p, x: nnx.merge(graph, p).logits(x["pixels"], x["boxes"]), mesh)
    np.testing.assert_allclose(jax.jit(mapped)(params, batch), alone, atol=1e-5)


def test_other_clips_and_boxes_change_no_bit(detector, rng):
    pixels, boxes = clips_and_boxes(rng)
    logits = jax.jit(ActionDetector.logits)
    whole = logits(detector, pixels, boxes)
    others = logits(detector, pixels.at[1:].set(0.0), boxes.at[:, 1:].set(0.0))
    np.testing.assert_array_equal(whole[0, 0], others[0, 0])


def test_the_box_decides(detector, rng):
    """A clip whose right half is another clip's: boxes on the left see the change only by attention."""
    pixels, _ = clips_and_boxes(rng, 1)
    boxes = jnp.asarray([[[0.0, 0.0, 15.0, 31.0], [16.0, 0.0, 31.0, 31.0]]])
    logits = detector.logits(pixels, boxes)[0]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    mapped = detector.feature_map(pixels)
    mapped = mapped.at[:, :, 2:].set(0.0)
    changed = detector.head(detector.features(mapped, boxes - jnp.array([0, 0, 1, 1])))[0]
    assert np.abs(changed[1] - logits[1]).max() > 1e-2


def test_bfloat16_is_near_float32(rng):
    half = dataclasses.replace(CONFIG, compute=vit.Compute(dtype="bfloat16"))
    pixels, boxes = clips_and_boxes(rng)
    whole, near = (
        ActionDetector(config, rngs=nnx.Rngs(0)).logits(pixels, boxes) for config in (CONFIG, half)
    )
    error = np.linalg.norm(whole - near) / np.linalg.norm(whole)
    assert 1e-5 < error < 0.02
