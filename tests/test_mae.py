"""The public model: what it refuses, what it leaks (nothing), and sizes it was not made for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import videomae_jax as vm
from videomae_jax.models import masking, tubelets, vit

CONFIG = vm.VideoMAEConfig(
    clip_size=(4, 16, 16),
    tubelet=(2, 4, 4),
    pixel_mean=(0.5, 0.4, 0.3),
    pixel_std=(0.2, 0.3, 0.4),
    encoder=vit.Stack(24, 2, 2, 48),
    decoder=vit.Stack(16, 2, 2, 32),
)


@pytest.fixture(scope="module")
def model() -> vm.VideoMAE:
    return vm.VideoMAE(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def video(rng) -> jax.Array:
    return jnp.asarray(rng.integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def mask() -> jax.Array:
    return vm.tube_mask(jax.random.key(0), 2, CONFIG.grid, 0.75)


def test_shapes_and_dtypes(model, video, mask):
    assert model(video, mask).shape == (2, 24, 96)
    assert model.encode(video, mask).shape == (2, 8, 24)
    assert model.encode(video).shape == (2, 32, 24)
    assert model.loss(video, mask).shape == ()
    assert {x.dtype for x in (model(video, mask), model.encode(video), model.loss(video, mask))} == {
        jnp.dtype("float32")
    }


def test_hidden_pixels_change_no_bit_of_the_encoding(model, video, mask, rng):
    noise = rng.integers(0, 256, (2, 32, 96), dtype=np.uint8)
    cut = tubelets.patchify(video, (2, 4, 4))
    other = jnp.where(mask[..., None], noise, cut)
    other = tubelets.unpatchify(other, CONFIG.grid, (2, 4, 4))
    assert not (other == video).all()
    np.testing.assert_array_equal(model.encode(video, mask), model.encode(other, mask))
    np.testing.assert_array_equal(model(video, mask), model(other, mask))
    assert model.loss(video, mask) != model.loss(other, mask)


def test_a_visible_pixel_changes_the_encoding(model, video, mask):
    place = int(np.argmin(mask[0]))
    t, h, w = np.unravel_index(place, CONFIG.grid)
    other = video.at[0, 2 * t, 4 * h, 4 * w, 0].add(100)
    changed = np.asarray(model.encode(video, mask) != model.encode(other, mask)).any(axis=(1, 2))
    assert changed.tolist() == [True, False]


def test_predictions_come_in_raster_order_of_hidden_tokens(model, video, mask):
    """Reordering the hidden indices reorders the prediction alike, so rows belong to their indices."""
    visible, hidden = masking.from_mask(mask)
    straight = model.predict(video, visible, hidden)
    np.testing.assert_allclose(model.predict(video, visible, hidden[:, ::-1]), straight[:, ::-1], atol=1e-5)
    assert (np.diff(hidden, axis=1) > 0).all()


def test_other_sizes_run_by_either_table(video):
    small = dataclasses.replace(CONFIG, clip_size=(2, 8, 8))
    outputs = []
    for resize in ("recompute", "interpolate"):
        config = dataclasses.replace(small, position_resize=resize)
        outputs.append(vm.VideoMAE(config, rngs=nnx.Rngs(0)).encode(video))
    made_for = vm.VideoMAE(CONFIG, rngs=nnx.Rngs(0)).encode(video)
    np.testing.assert_array_equal(outputs[0], made_for)  # the same weights and the recomputed table
    assert not np.allclose(outputs[1], made_for)


def test_other_channel_counts(rng):
    config = dataclasses.replace(CONFIG, pixel_mean=(0.5,), pixel_std=(0.5,))
    model = vm.VideoMAE(config, rngs=nnx.Rngs(0))
    video = jnp.asarray(rng.integers(0, 256, (1, 4, 16, 16, 1), dtype=np.uint8))
    assert model(video, vm.frame_mask(jax.random.key(0), 1, CONFIG.grid, 0.5)).shape == (1, 16, 32)


def test_bfloat16_stays_near_float32(model, video, mask):
    half = dataclasses.replace(CONFIG, compute=vit.Compute(dtype="bfloat16"))
    params = nnx.state(model, nnx.Param)
    other = nnx.merge(nnx.graphdef(vm.VideoMAE(half, rngs=nnx.Rngs(0))), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    difference = np.abs(other(video, mask) - model(video, mask)).max()
    assert 0 < difference < 0.1


def test_initial_values_follow_the_published_code(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    encoder, decoder = params["encoder"], params["decoder"]
    bounds = {
        "qkv": (encoder["blocks"]["attention"]["qkv"], (6 / (4 * 24)) ** 0.5),
        "fc1": (encoder["blocks"]["fc1"]["kernel"], (6 / (24 + 48)) ** 0.5),
        "embed": (encoder["embed"]["kernel"], 96**-0.5),
        "embed bias": (encoder["embed"]["bias"], 96**-0.5),
        "project": (decoder["project"], 24**-0.5),
        "mask token": (decoder["mask_token"], 0.02),
        "head": (decoder["head"]["kernel"], (6 / (16 + 96)) ** 0.5),
    }
    for name, (value, bound) in bounds.items():
        assert 0.8 * bound < np.abs(value).max() <= bound * 1.0001, name
    for zero in (encoder["blocks"]["fc1"]["bias"], encoder["blocks"]["attention"]["q_bias"]):
        assert not np.any(zero)
    assert (np.asarray(encoder["norm"]["scale"]) == 1).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v, m: (v.astype(jnp.float32), m), "dtype float32: pass raw 0..255 pixels as uint8"),
        (lambda v, m: (v[..., :1], m), r"shape \(2, 4, 16, 16, 1\): expected \[B, T, H, W, 3\]"),
        (lambda v, m: (v[:, :, :15], m), r"\(4, 15, 16\) cannot be cut into tubelets of \(2, 4, 4\)"),
        (lambda v, m: (v, m[:, :-1]), r"mask has shape \(2, 31\).*needs \[2, 32\]"),
        (lambda v, m: (v, m.at[0].set(False)), r"hides \[0, 24\] of 32"),
    ],
)
def test_wrong_inputs_are_named(untyped, model, video, mask, change, text):
    with pytest.raises(ValueError, match=text):
        model.loss(*change(video, mask))


def test_config_survives_json():
    data = json.loads(json.dumps(CONFIG.to_dict()))
    assert vm.VideoMAEConfig.from_dict(data) == CONFIG
    with pytest.raises(TypeError):
        vm.VideoMAEConfig.from_dict({**data, "heads": 3})


def test_config_that_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="num_heads 5 does not divide its width 24"):
        dataclasses.replace(CONFIG, encoder=vit.Stack(24, 2, 5, 48))
    with pytest.raises(ValueError, match="pixel_mean has 3 channels and pixel_std 1"):
        dataclasses.replace(CONFIG, pixel_std=(0.5,))
