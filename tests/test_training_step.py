"""The compiled step: layout independence, collectives, weight 0, and the guard against bad numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

from videomae_jax import sharding
from videomae_jax.models import vit
from videomae_jax.models.layout import WHOLE
from videomae_jax.models.mae import VideoMAEConfig
from videomae_jax.tasks.pretrain import Pretrain
from videomae_jax.training import optim, step

CONFIG = VideoMAEConfig(
    clip_size=(4, 16, 16),
    tubelet=(2, 4, 4),
    pixel_mean=(0.5,) * 3,
    pixel_std=(0.25,) * 3,
    encoder=vit.Stack(24, 2, 2, 48),
    decoder=vit.Stack(16, 1, 2, 32),
)
TASK = Pretrain(model=CONFIG, mask="tube", mask_ratio=0.75, normalize_target=True, loss_kind="mse", stride=1)
ROOT = jax.random.key(7)


def batch_of(rows: int = 8, **changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "video": rng.integers(0, 256, (rows, 4, 16, 16, 3), dtype=np.uint8),
        "index": np.arange(100, 100 + rows, dtype=np.uint32),
        "label": np.zeros(rows, np.int32),
        "weight": np.ones(rows, np.float32),
    } | changes


def mean_loss(task, params, batch, root=ROOT):
    """The loss that the step takes the gradient of."""
    terms = task.terms(params, None, batch, root, jnp.int32(0), WHOLE)
    return terms.total / terms.weight


def prepare(mesh, terms=TASK.terms):
    tx = optim.adamw((0.9, 0.95), 1e-8, 0.05, 0.0)
    state, shardings = step.init_state(step.Recipe(TASK.init, tx), mesh, seed=0)
    return state, step.make_train_step(terms, tx, lambda _: jnp.float32(1e-3), mesh, shardings)


def run(mesh, batch):
    state, train_step = prepare(mesh)
    return train_step(state, sharding.global_batch(mesh, batch), ROOT)


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def test_masks_follow_the_example_not_its_row():
    batch = {name: jnp.asarray(value) for name, value in batch_of().items()}
    visible, _ = TASK.masks(batch, ROOT)
    turned, _ = TASK.masks({**batch, "index": batch["index"][::-1]}, ROOT)
    np.testing.assert_array_equal(visible, turned[::-1])
    other, _ = TASK.masks(batch, jax.random.key(8))
    assert not (visible == other).all()


@pytest.mark.slow
def test_a_clip_of_weight_zero_is_as_if_absent():
    rows = {name: jnp.asarray(value) for name, value in batch_of(8).items()}
    weight = np.ones(8, np.float32)
    weight[[2, 5]] = 0
    video = rows["video"].at[jnp.array([2, 5])].set(0)
    kept = np.flatnonzero(weight)
    whole = jax.value_and_grad(functools.partial(mean_loss, TASK))
    params = TASK.init(jax.random.key(0))
    with_bad, grads = whole(params, {**rows, "video": video, "weight": jnp.asarray(weight)})
    without, expected = whole(params, {name: value[kept] for name, value in rows.items()})
    np.testing.assert_allclose(with_bad, without, rtol=1e-6)
    assert_trees_close(grads, expected, atol=1e-7)
    all_good, _ = whole(params, rows)
    assert abs(all_good - without) > 1e-5


def test_a_batch_without_a_usable_clip_changes_nothing():
    mesh = mesh_of(2)
    before, _ = prepare(mesh)
    after, metrics = run(mesh, batch_of(weight=np.zeros(8, np.float32)))
    assert metrics["skipped"] == 1
    assert metrics["loss"] == 0
    assert_trees_close(before.params, after.params, atol=0)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(poison):
    mesh = mesh_of(2)

    def poisoned(params, others, batch, *rest):
        terms = TASK.terms(params, others, batch, *rest)
        return terms._replace(total=terms.total * jnp.where(batch["label"][0] == 1, poison, 1.0))

    state, train_step = prepare(mesh, poisoned)
    before = jax.device_get(state)
    bad = sharding.global_batch(mesh, batch_of(label=np.ones(8, np.int32)))
    state, metrics = train_step(state, bad, ROOT)
    assert metrics["skipped"] == 1
    assert int(state.step) == 1
    assert_trees_close(before.params, state.params, atol=0)
    assert_trees_close(before.opt_state, state.opt_state, atol=0)
    state, metrics = train_step(state, sharding.global_batch(mesh, batch_of()), ROOT)
    assert metrics["skipped"] == 0
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.params, state.params)
    assert any(jax.tree.leaves(changed))


def test_drop_path_is_active_in_training_only():
    task = dataclasses.replace(TASK, model=dataclasses.replace(CONFIG, drop_path=0.5))
    params = task.init(jax.random.key(0))
    losses = {
        float(mean_loss(t, params, {n: jnp.asarray(v) for n, v in batch_of().items()})) for t in (task, TASK)
    }
    assert len(losses) == 2


def test_no_random_stream_serves_two_uses():
    """Initialisation and every kind of draw descend from keys of their own, as do their children."""
    root = jax.random.key(3)

    def given(key):  # what a task's `init` gets
        return {"bias": jax.random.key_data(key)}

    state, _ = step.init_state(step.Recipe(given, optax.identity()), mesh_of(1), seed=3)
    streams = [step.stream(root, name) for name in step._STREAMS if name != "init"]
    parents = [jax.random.wrap_key_data(state.params["bias"]), *streams]
    keys = {}
    for number, parent in enumerate(parents):
        children = [jax.random.fold_in(parent, i) for i in range(20)]
        for key in (parent, *children, *jax.random.split(parent, 20), *jax.random.split(children[0], 20)):
            assert keys.setdefault(np.asarray(jax.random.key_data(key)).tobytes(), number) == number
    assert len(keys) > 20 * len(parents)


def test_a_gradient_that_is_not_finite_of_a_loss_that_is():
    def poisoned(params, *rest):
        terms = TASK.terms(params, *rest)
        return terms._replace(total=terms.total + jnp.sqrt(0.0 * params["encoder"]["embed"]["bias"].sum()))

    state, train_step = prepare(mesh_of(1), poisoned)
    before = jax.device_get(state.params)
    state, metrics = train_step(state, sharding.global_batch(mesh_of(1), batch_of()), ROOT)
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_the_average_keeps_its_share():
    tx = optim.adamw((0.9, 0.95), 1e-8, 0.05, 0.0)
    mesh = mesh_of(1)
    state, shardings = step.init_state(step.Recipe(TASK.init, tx, has_ema=True), mesh, 0)
    before = jax.device_get(state.params)
    go = step.make_train_step(TASK.terms, tx, lambda _: jnp.float32(0.1), mesh, shardings, ema_decay=0.9)
    state, _ = go(state, sharding.global_batch(mesh, batch_of()), ROOT)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before, jax.device_get(state.params))
    assert_trees_close(state.ema, expected, atol=1e-6)
