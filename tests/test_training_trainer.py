"""What a run hands on to its step: every setting, and how far it is."""

import copy
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, mesh_of, task_of

from videomae_jax import config as settings
from videomae_jax import storage
from videomae_jax.data import prepared
from videomae_jax.training import optim, step, trainer, validation
from videomae_jax.training.feed import TrainingError
from videomae_jax.training.guard import Guard


@pytest.fixture(scope="module")
def config(shapes):
    return load_config("debug", f"data={shapes},task=contrast")


@pytest.fixture(scope="module")
def task(config):
    return task_of(config)


def test_the_optimizer_is_that_of_the_settings(config, task, monkeypatch):
    seen = []
    monkeypatch.setattr(optim, "adamw", lambda *given: seen.append(given) or optim.optax.identity())
    c = copy.deepcopy(config)
    c.optim.update(betas=(0.8, 0.9), epsilon=1e-5, weight_decay=0.3, clip_norm=0.7)
    trainer.recipe(c, task)
    betas, epsilon, decay, clip_norm, _, decays = seen[0]
    assert (betas, epsilon, decay, clip_norm) == ((0.8, 0.9), 1e-5, 0.3, 0.7)
    assert decays == task.decays


def test_the_step_is_that_of_the_settings(config, task, monkeypatch):
    monkeypatch.setattr(step, "make_train_step", lambda *given: given)
    c = copy.deepcopy(config)
    c.optim.update(accumulate=3, ema=0.25, min_lr=1e-3)
    schedule = settings.make_schedule(c, 64)
    _, _, rate, _, _, accumulate, ema, mapping, _ = trainer.make_step(c, task, schedule, mesh_of(1), None)
    assert (accumulate, ema, mapping) == (3, 0.25, "jit")
    assert float(rate(jnp.int32(schedule.total_steps))) == pytest.approx(schedule.end_lr)
    assert schedule.end_lr > 0


def test_a_momentum_encoder_stands_still_at_the_end(config, task, monkeypatch):
    monkeypatch.setattr(step, "make_train_step", lambda *given: given[-1])
    schedule = settings.make_schedule(config, 64)
    follow = trainer.make_step(config, task, schedule, mesh_of(1), None)
    params = task.init(jax.random.key(0))
    others, moved = task.others(params), jax.tree.map(lambda x: x + 1.0, params)
    still = follow(others, moved, jnp.int32(schedule.total_steps))
    jax.tree.map(np.testing.assert_array_equal, still, others)
    early = follow(others, moved, jnp.int32(0))
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (early, others)), strict=True))


def test_only_skipped_steps_in_a_row_end_a_run(shapes, tmp_path):
    source = prepared.open_source(str(shapes), "train")
    guard = Guard(storage.Growing(tmp_path, []), source, jax.random.key(0), 2, 0)
    fields = {"record": np.array([0]), "index": np.array([0])}
    for number, skipped in enumerate((1.0, 0.0, 1.0)):
        guard.look(number, {"loss": 1.0, "grad_norm": 1.0, "clips": 1.0, "skipped": skipped}, fields)
    assert guard.skipped == 2
    with pytest.raises(TrainingError, match="2 steps in a row"):
        guard.look(3, {"loss": 1.0, "grad_norm": 1.0, "clips": 1.0, "skipped": 1.0}, fields)


def test_the_average_of_the_weights_is_what_is_validated(monkeypatch):
    looked, seen = validation.Validation.__new__(validation.Validation), []
    looked._validate = lambda params, _: seen.append(params) or {}
    looked._task = types.SimpleNamespace(best_by="")
    log = types.SimpleNamespace(exclude=lambda _: None)
    look = inspect.unwrap(validation.Validation.look)
    for ema, expected in ((jnp.ones(1), 1.0), (None, 0.0)):
        look(looked, step.TrainState(jnp.int32(1), jnp.zeros(1), None, ema), log)
        assert float(seen.pop()[0]) == expected
