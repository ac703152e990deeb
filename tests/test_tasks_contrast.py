"""MoCo v3 on videos: the loss by its formula, the momentum, batch norm over devices, views and collapse."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, mesh_of, task_of
from jax.sharding import PartitionSpec

from videomae_jax import config as settings
from videomae_jax.data import pairs, prepared
from videomae_jax.models import contrast, views
from videomae_jax.models.layout import WHOLE, Layout
from videomae_jax.tasks.contrast import Contrast


@pytest.fixture(scope="module")
def task(shapes):
    return task_of(load_config("debug", f"data={shapes},task=contrast"))


def test_the_loss_of_random_features_is_that_of_guessing(rng):
    """2 T ln B, for features that know nothing of each other; both directions make it twice that."""
    shape = (512, 4096)
    queries, keys = (contrast.normalized(jnp.asarray(rng.normal(size=shape), jnp.float32)) for _ in "qk")
    losses, top = contrast.info_nce(queries, keys, jnp.ones(512), 0.2, WHOLE)
    assert float(losses.mean()) == pytest.approx(2 * 0.2 * math.log(512), rel=0.02)
    assert float(top.mean()) < 0.05


def test_the_loss_by_its_definition(rng):
    queries, keys = (contrast.normalized(jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)) for _ in "qk")
    weight = jnp.array([1, 1, 0, 1, 1, 1.0])
    losses, _ = contrast.info_nce(queries, keys, weight, 0.3, WHOLE)
    for row in (0, 4):
        logits = [float(queries[row] @ keys[other]) / 0.3 for other in (0, 1, 3, 4, 5)]
        own = float(queries[row] @ keys[row]) / 0.3
        expected = 2 * 0.3 * (math.log(sum(map(math.exp, logits))) - own)
        assert float(losses[row]) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_reaches_keys(rng):
    rows = contrast.normalized(jnp.asarray(rng.normal(size=(4, 8)), jnp.float32))
    of_keys = lambda keys: contrast.info_nce(rows, keys, jnp.ones(4), 0.2, WHOLE)[0].sum()  # noqa: E731
    assert not np.asarray(jax.grad(of_keys)(rows)).any()


def test_batch_norm_is_that_of_all_devices_and_leaves_bad_rows_out(rng):
    x = jnp.asarray(rng.normal(2.0, 3.0, (8, 5)), jnp.float32)
    weight = jnp.array([1, 1, 1, 0, 1, 1, 0, 1.0])
    whole = contrast.batch_norm(x, weight, WHOLE)
    good = np.asarray(x)[np.asarray(weight) > 0]
    expected = (np.asarray(x) - good.mean(axis=0)) / np.sqrt(good.var(axis=0) + 1e-5)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    rows = PartitionSpec("data")
    on_four = jax.shard_map(
        lambda x, w: contrast.batch_norm(x, w, Layout(("data",))),
        mesh=mesh_of(4),
        in_specs=(rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    np.testing.assert_allclose(jax.jit(on_four)(x, weight), whole, atol=1e-5)


def test_momentum(task):
    """Trees begin equal; with momentum 0 they are the parameters, at the end they stand still."""
    params = task.init(jax.random.key(0))
    others = task.others(params)
    assert set(others) == {"encoder", "projector"}
    moved = jax.tree.map(lambda x: x + 1.0, params)
    plain = dataclasses.replace(task, momentum=0.0)
    found = plain.follow(others, moved, jnp.float32(0.0))
    jax.tree.map(np.testing.assert_array_equal, found, {name: moved[name] for name in others})
    still = task.follow(others, moved, jnp.float32(1.0))
    jax.tree.map(np.testing.assert_array_equal, still, others)
    half = task.follow(others, moved, jnp.float32(0.5))
    kept = 1 - 0.5 * (1 - task.momentum)  # the cosine is 0
    difference = half["encoder"]["embed"]["bias"] - others["encoder"]["embed"]["bias"]
    np.testing.assert_allclose(difference, 1 - kept, rtol=1e-4)


def test_the_embedding_is_frozen_and_all_else_decays(task):
    params = task.init(jax.random.key(0))
    factors = task.rate_factors(params)
    assert factors["encoder"]["embed"] == {"kernel": 0.0, "bias": 0.0}
    assert sum(jax.tree.leaves(factors)) == len(jax.tree.leaves(params)) - 2
    assert all(jax.tree.leaves(task.decays(params)))
    kernel = params["encoder"]["embed"]["kernel"]
    assert np.abs(kernel).max() == pytest.approx(math.sqrt(6 / sum(kernel.shape)), rel=0.02)


def test_views_are_those_of_the_clip_and_the_same_for_all_frames(task):
    video = jnp.tile(jnp.arange(0, 256, 8, dtype=jnp.uint8)[None, None, None, :, None], (16, 8, 32, 1, 3))
    batch = {"video": video, "index": jnp.arange(16, dtype=jnp.uint32)}
    made = np.asarray(task._views(batch, jax.random.key(0)))
    assert made.shape == video.shape
    np.testing.assert_allclose(made, np.broadcast_to(made[:, :1], made.shape), atol=1e-5)
    turned = {"video": video, "index": batch["index"] + 2}
    np.testing.assert_allclose(made[2:], np.asarray(task._views(turned, jax.random.key(0)))[:-2], atol=1e-5)
    assert np.abs(made[0] - made[2]).max() > 0.01


def test_colours(rng):
    clip = jnp.asarray(rng.uniform(size=(2, 6, 5, 3)), jnp.float32)
    np.testing.assert_allclose(views.shift_hue(clip, jnp.float32(0.0)), clip, atol=1e-5)
    np.testing.assert_allclose(views.shift_hue(clip, jnp.float32(1.0)), clip, atol=1e-4)
    third = views.shift_hue(clip, jnp.float32(1 / 3))  # red becomes green, green blue, blue red
    np.testing.assert_allclose(third, jnp.roll(clip, 1, axis=-1), atol=1e-4)
    flat = jnp.full((1, 8, 8, 3), 0.3)
    np.testing.assert_allclose(views.gaussian_blur(flat, jnp.float32(2.0)), flat, atol=1e-6)
    point = jnp.zeros((1, 9, 9, 3)).at[0, 4, 4].set(1.0)
    blurred = np.asarray(views.gaussian_blur(point, jnp.float32(1.0)))[0, :, :, 0]
    assert blurred[4, 5] / blurred[4, 4] == pytest.approx(math.exp(-0.5), rel=1e-3)
    never = views.View(jitter=0.0, grey=0.0, blur=0.0, solarise=0.0)
    np.testing.assert_array_equal(views.augment(clip, never, jax.random.key(0)), clip)
    always = views.View(jitter=0.0, grey=0.0, blur=0.0, solarise=1.0)
    turned = jnp.where(clip < 0.5, clip, 1 - clip)
    np.testing.assert_allclose(views.augment(clip, always, jax.random.key(0)), turned)


def test_pairs_are_two_times_of_one_video(shapes):
    source = prepared.open_source(str(shapes), "train")
    clip = pairs.PairClips(4, 1, (32, 32), flip=False, area=(1.0, 1.0))
    made = [clip.random_map((i, source[0]), np.random.default_rng(i)) for i in range(4)]
    assert made[0]["video"].shape == (2, 4, 32, 32, 3)
    assert any((one["video"][0] != one["video"][1]).any() for one in made)
    again = clip.random_map((0, source[0]), np.random.default_rng(0))
    np.testing.assert_array_equal(made[0]["video"], again["video"])


def test_collapse_is_seen_and_said(task, rng):
    alike = jnp.tile(jnp.asarray(rng.normal(size=(1, task.width)), jnp.float32), (8, 1))
    everywhere = jnp.asarray(rng.normal(size=(512, task.width)), jnp.float32)
    both = [contrast.normalized(x) for x in (alike, everywhere)]
    spread = [float(task._spread(x, jnp.ones(len(x)), WHOLE)) for x in both]
    assert spread[0] < 1e-3
    assert spread[1] == pytest.approx(1.0, abs=0.05)
    assert task.warning({"feature_std": spread[1]}) == ""
    assert "features collapse" in task.warning({"feature_std": spread[0]})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optim.accumulate": 2}, "optim.accumulate is not for task=contrast"),
        ({"data.batch_size": 8}, "gives each device 1 clips: .* use a multiple of 16"),
    ],
)
def test_batches_that_cannot_be_compared(shapes, changes, text):
    config = load_config("debug", f"data={shapes},task=contrast")
    config.update_from_flattened_dict(changes)
    with pytest.raises(settings.UserError, match=text):
        task_of(config).check_batch(config, 8 * config.optim.accumulate)


def test_one_clip_of_a_video_is_refused(shapes):
    config = load_config("debug", f"data={shapes},task=contrast")
    config.data.clips_per_video = 1
    with pytest.raises(settings.UserError, match=r"set --config\.data\.clips_per_video=2"):
        task_of(config)


def test_heads_begin_as_published():
    params = contrast.init_mlp(jax.random.key(0), (256, 64, 16))
    for name, inputs in (("layer0", 256), ("layer1", 64)):
        kernel = np.asarray(params[name]["kernel"])
        assert np.abs(kernel).max() == pytest.approx(inputs**-0.5, rel=0.01)
        assert kernel.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.05)


def test_the_frozen_embedding_has_no_gradient(task, rng):
    """Else it would take part in clipping, and in the guard against gradients that are not finite."""
    params = task.init(jax.random.key(0))
    video = rng.integers(0, 256, (8, *task.model.clip_size, 3), dtype=np.uint8)
    batch = {"video": jnp.asarray(video), "index": jnp.arange(8, dtype=jnp.uint32), "weight": jnp.ones(8)}

    def total(params):
        return task.terms(params, task.others(params), batch, jax.random.key(1), jnp.int32(0), WHOLE).total

    grads = jax.grad(total)(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["encoder"]["embed"]))
    assert np.asarray(grads["encoder"]["blocks"]["attention"]["qkv"]).any()


def test_each_view_meets_the_other_one_of_the_momentum_encoder(task, monkeypatch, rng):
    first, second = (jnp.asarray(rng.normal(size=(4, task.width)), jnp.float32) for _ in "ab")
    ours, theirs = (first, first + 1), (second, second + 1)
    params = task.init(jax.random.key(0))
    others = task.others(params)
    monkeypatch.setattr(Contrast, "_views", lambda *_: None)
    monkeypatch.setattr(Contrast, "_project", lambda _, tree, *rest: theirs if tree is others else ours)
    monkeypatch.setattr(contrast, "apply_mlp", lambda _params, x, *_: x)
    seen = []
    monkeypatch.setattr(
        contrast, "info_nce", lambda q, k, *_: seen.append((q, k)) or (jnp.ones(4), jnp.ones(4))
    )
    batch = {"weight": jnp.ones(8), "index": jnp.arange(8, dtype=jnp.uint32)}
    task.terms(params, others, batch, jax.random.key(1), jnp.int32(0), WHOLE)
    expected = [(ours[0], theirs[1]), (ours[1], theirs[0])]
    for found, pair in zip(seen, expected, strict=True):
        for x, y in zip(found, pair, strict=True):
            np.testing.assert_array_equal(x, contrast.normalized(y))


def test_views_are_those_of_byol():
    assert vars(views.FIRST) == {"jitter": 0.8, "grey": 0.2, "blur": 1.0, "solarise": 0.0}
    assert vars(views.SECOND) == {"jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarise": 0.2}


def test_a_pixel_without_colour_is_moved_by_brightness_and_contrast_alone():
    key = jax.random.key(3)
    brightness, contrasts, *_ = 1 + 0.4 * jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
    grey = jnp.broadcast_to(jnp.linspace(0.3, 0.5, 4)[:, None], (1, 1, 4, 3))
    found, steps = jnp.diff(views._jitter(grey, key), axis=2), jnp.diff(grey, axis=2)
    np.testing.assert_allclose(found, brightness * contrasts * steps, rtol=1e-4)
