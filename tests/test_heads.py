"""The classifier: what it refuses, pools, drops, freezes, and sizes it was not made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import videomae_jax as vm
from videomae_jax.models import heads, positions, tubelets, vit

CONFIG = vm.ClassifierConfig(
    clip_size=(4, 16, 16),
    tubelet=(2, 4, 4),
    pixel_mean=(0.5, 0.4, 0.3),
    pixel_std=(0.2, 0.3, 0.4),
    encoder=vit.Stack(24, 3, 2, 48),
    classes=("a", "b", "c"),
    head_scale=1.0,
)
# Fact sheet 1.8: parameters of the finetuning model by (size, classes).
PARAMETERS = {
    **{("small", 174): 21_946_926, ("small", 400): 22_033_936},
    **{("base", 51): 86_266_419, ("base", 101): 86_304_869, ("base", 174): 86_361_006},
    **{("base", 400): 86_534_800, ("base", 710): 86_773_190},
    **{("large", 174): 304_039_086, ("large", 400): 304_270_736, ("huge", 400): 632_119_440},
    **{("giant", 400): 1_012_174_352, ("giant", 710): 1_012_611_142},
}


def make(**changes) -> vm.VideoClassifier:
    return vm.VideoClassifier(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


@pytest.fixture
def video(rng) -> jax.Array:
    return jnp.asarray(rng.integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8))


def pixels_of(video):
    return tubelets.normalize_pixels(video, CONFIG.pixel_mean, CONFIG.pixel_std)


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_counts(name, classes):
    size = vm.SIZES[name]
    config = vm.ClassifierConfig(
        clip_size=(16, 224, 224),
        tubelet=(2, size.patch, size.patch),
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.5,) * 3,
        encoder=size.encoder,
        classes=tuple(map(str, range(classes))),
    )
    model = nnx.eval_shape(lambda: vm.VideoClassifier(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name, classes]


def test_shapes_and_dtypes(video):
    model = make()
    assert (model(video).shape, model(video).dtype) == ((3, 3), jnp.float32)
    assert (model.features(video).shape, model.features(video).dtype) == ((3, 24), jnp.float32)
    np.testing.assert_allclose(model(video), model.head(model.features(video)), atol=1e-6)


def test_initial_weights_are_the_published_ones():
    """Normal of 0.02 for kernels, the head's times its scale, the embedding as its framework has it."""
    wide = dataclasses.replace(CONFIG, encoder=vit.Stack(128, 2, 2, 256), head_scale=0.001)
    wide = dataclasses.replace(wide, classes=tuple(map(str, range(100))))
    params = nnx.to_pure_dict(nnx.state(vm.VideoClassifier(wide, rngs=nnx.Rngs(0)), nnx.Param))
    for kernel in ("fc1", "fc2"):
        np.testing.assert_allclose(params["encoder"]["blocks"][kernel]["kernel"].std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(params["encoder"]["blocks"]["attention"]["qkv"].std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(params["head"]["kernel"].std(), 0.02 * 0.001, rtol=0.03)
    bound = 1 / np.sqrt(2 * 4 * 4 * 3)
    embed = np.abs(params["encoder"]["embed"]["kernel"]).max()
    assert 0.98 * bound < embed <= bound


def test_pooling(video):
    """The mean of all tokens and the first token are different features, each as defined."""
    tokens = make()._encode(pixels_of(video))
    mean, first = make(), make(pooling="first")
    np.testing.assert_allclose(mean.features(video), mean.norm(tokens.mean(axis=1)), atol=1e-5)
    np.testing.assert_allclose(first.features(video), first.norm(tokens)[:, 0], atol=1e-5)
    assert np.abs(mean.features(video) - first.features(video)).max() > 0.1


@pytest.mark.parametrize("resize", positions.RESIZE)
def test_other_clip_lengths_and_resolutions(rng, resize):
    """From weights made at 4 x 16 x 16: the interpolated table follows the grid, the other is built anew."""
    longer = jnp.asarray(rng.integers(0, 256, (1, 8, 24, 24, 3), dtype=np.uint8))
    made = make(position_resize=resize)
    moved = make(clip_size=(8, 24, 24), position_grid=CONFIG.grid, position_resize=resize)
    np.testing.assert_array_equal(made(longer), moved(longer))
    fresh = make(clip_size=(8, 24, 24), position_resize=resize)
    same = np.allclose(fresh(longer), moved(longer), atol=1e-4)
    assert same == (resize == "recompute")


def test_dropout_follows_the_clip_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 500)
    x = jnp.ones((500, 8))
    y = np.asarray(heads.dropout(x, 0.25, keys))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(y.mean(), 1, atol=0.05)
    np.testing.assert_array_equal(heads.dropout(x, 0.25, keys[::-1]), y[::-1])
    np.testing.assert_array_equal(heads.dropout(x, 0.25, None), x)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_frozen_blocks_have_no_gradient_and_the_same_output(video, frozen):
    graphdef, state = nnx.split(make())

    def loss(params, frozen):
        return (nnx.merge(graphdef, params).pooled(pixels_of(video), frozen=frozen) ** 2).sum()

    params = nnx.to_pure_dict(state)
    jax.tree.map(lambda p: p, params)
    value, grads = jax.value_and_grad(loss)(params, frozen)
    plain, every = jax.value_and_grad(loss)(params, 0)
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    norms = np.abs(grads["encoder"]["blocks"]["fc1"]["kernel"]).sum(axis=(1, 2))
    assert (norms > 0).tolist() == [block >= frozen for block in range(3)]
    assert (np.abs(grads["encoder"]["embed"]["kernel"]).sum() > 0) == (frozen == 0)
    upper = every["encoder"]["blocks"]["fc1"]["kernel"][frozen:]
    np.testing.assert_allclose(grads["encoder"]["blocks"]["fc1"]["kernel"][frozen:], upper, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.zeros((1, 4, 16, 16, 3), np.float32), "has dtype float32: pass raw 0..255 pixels as uint8"),
        (np.zeros((1, 4, 16, 16, 1), np.uint8), r"expected \[B, T, H, W, 3\]"),
        (np.zeros((1, 3, 16, 16, 3), np.uint8), "cannot be cut into tubelets"),
        ([1], "video is a list"),
    ],
)
def test_wrong_videos(untyped, wrong, text):
    model = make()
    for method in (model, model.features):
        with pytest.raises(ValueError, match=text):
            method(wrong)


def test_an_attentive_probe_looks_at_single_tokens(rng):
    """It tells apart clips whose tokens have the same mean."""
    probe = heads.AttentiveProbe(24, 2, 5, rngs=nnx.Rngs(0))
    probe.query[...] = probe.query[...] * 100
    tokens = rng.normal(size=(1, 6, 24)).astype(np.float32)
    change = rng.normal(size=24).astype(np.float32)
    spread = tokens + np.array([3, -3, 0, 0, 0, 0], np.float32)[:, None] * change
    np.testing.assert_allclose(spread.mean(axis=1), tokens.mean(axis=1), atol=1e-6)
    outputs = [np.asarray(probe(jnp.asarray(x))) for x in (tokens, spread)]
    assert outputs[0].shape == (1, 5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-5
    np.testing.assert_allclose(probe(jnp.asarray(tokens[:, ::-1])), outputs[0], atol=1e-5)
    with pytest.raises(ValueError, match="num_heads 5 does not divide the width 24"):
        heads.AttentiveProbe(24, 5, 5, rngs=nnx.Rngs(0))
