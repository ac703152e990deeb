"""What holds for every method that trains step by step; a new one gets these tests by being in the table."""

import dataclasses
import functools
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT as ROOT_FOLDER
from conftest import load_config, mesh_of, task_of
from flax import nnx

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax import keys, sharding
from videomae_jax.data import pipeline
from videomae_jax.models import vit
from videomae_jax.tasks import table
from videomae_jax.training import checkpoint, compute, loop, optim, step, trainer

NAMES = sorted(table.METHODS)
# What compiles steps for each method: one of them by default, all with `-m slow`.
EVERY_METHOD = [pytest.param(name, marks=() if name == "latent" else pytest.mark.slow) for name in NAMES]
ROOT = jax.random.key(7)
# Not AdamW, whose update of a gradient near 0 is as large as of any other: what is compared is the gradient.
TX = optim.optax.identity()


OTHERS = set(NAMES) - set(keys.KEYS["model.decoder.width"].read_by)  # have no decoder


@pytest.fixture(scope="module")
def made(shapes, boxed, teachers):
    """name -> (task, settings, a batch as its loader makes it, the last video of which is bad)"""
    found = {}
    for name in NAMES:
        config = debug_config(name, boxed if name == "detect" else shapes, teachers)
        source = task_of(config).open_videos(config).train
        task = task_of(config, source)
        task = dataclasses.replace(task, model=dataclasses.replace(task.model, compute=vit.Compute()))
        dataset = pipeline.clips(source, task.clip_transform, seed=0, batch_size=16)
        videos = 16 // task.clips_per_video
        batch = next(pipeline.iterate(dataset, videos, workers=0, threads=1))
        batch = {field: rows for field, rows in batch.items() if field not in pipeline.HOST_ONLY}
        batch["weight"][-task.clips_per_video :] = 0
        found[name] = (task, config, batch)
    return found


@pytest.fixture(scope="module")
def teachers(shapes, tmp_path_factory):
    """Work folders of the runs that others learn from: kind of model -> path."""
    folders = {}
    for name in ("pretrain", "finetune"):
        folders[name] = tmp_path_factory.mktemp("teacher") / name
        config = load_config("debug", f"data={shapes},task={name}")
        config.optim.update(duration=2, warmup=1)
        table.train(config, folders[name], time.time())
    return folders


def debug_config(name, data, teachers):
    teacher = {"latent": "pretrain", "distill": "finetune"}.get(name)
    of_whom = f",teacher={teachers[teacher]}" if teacher else ""
    config = load_config("debug", f"data={data},task={name}{of_whom}")
    config.model.decoder.num_heads = config.model.decoder.num_heads if name in OTHERS else 2
    return config


def recipe_of(task):
    return step.Recipe(task.init, TX, task.others)


def started(task, config, mesh):
    """(state, shardings) as a run begins: teachers are where they belong."""
    fresh = recipe_of(task)
    state, shardings = step.init_state(fresh, mesh, 0)
    return step.start_from(state, shardings, task.start(config, trainer.names_of(state)), fresh), shardings


def stepper(task, mesh, shardings, **options):
    def follow(others, params, done):
        return task.follow(others, params, done / 10)

    rate = lambda _: jnp.float32(1.0)  # noqa: E731
    return step.make_train_step(task.terms, TX, rate, mesh, shardings, follow=follow, **options)


def run(made, mesh, steps=1, **options):
    task, config, batch = made
    state, shardings = started(task, config, mesh)
    train_step = stepper(task, mesh, shardings, **options)
    for _ in range(steps):
        state, metrics = train_step(state, sharding.global_batch(mesh, batch), ROOT)
    return jax.device_get((state, metrics))


def assert_close(found, expected):
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[0], expected[0])


@pytest.fixture(scope="module")
def alone(made):
    """name -> the method's step on one device"""
    return functools.cache(lambda name: run(made[name], mesh_of(1)))


def test_the_table_is_what_settings_know():
    assert {*table.METHODS, "probe"} == set(keys.TASKS)


@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 1, 1), (1, 4, 1)))], ids=str
)
def test_every_mesh_takes_the_same_step(name, sizes, made, alone):
    assert_close(run(made[name], mesh_of(*sizes)), alone(name))


def can_accumulate(made) -> bool:
    """Whether the method works on microbatches; one that does not says so."""
    task, config, _ = made
    config = config.copy_and_resolve_references()
    config.optim.accumulate = 2
    try:
        task.check_batch(config, 4)
    except settings.UserError as error:
        assert "optim.accumulate" in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pmap_takes_the_same_step(name, made, alone):
    accumulate = 1 + can_accumulate(made[name])
    found = run(made[name], mesh_of(4), mapping="pmap", accumulate=accumulate)
    assert_close(found, alone(name))


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_microbatches_take_the_same_step_or_are_refused(name, made, alone):
    if can_accumulate(made[name]):
        assert_close(run(made[name], mesh_of(2), accumulate=2), alone(name))
    else:
        assert name == "contrast"


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_clip_of_weight_zero_is_as_if_absent(name, made, alone):
    task, config, batch = made[name]
    video = batch["video"].copy()
    video[-task.clips_per_video :] = 123
    changed = run((task, config, batch | {"video": video}), mesh_of(1))
    jax.tree.map(np.testing.assert_array_equal, changed, alone(name))
    one_more = run((task, config, batch | {"weight": np.ones_like(batch["weight"])}), mesh_of(1))
    assert one_more[1]["loss"] != alone(name)[1]["loss"]


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(name, made):
    task, config, batch = made[name]
    mesh = mesh_of(1)
    state, shardings = started(task, config, mesh)
    name_of_first, *_ = sorted(state.params)
    broken = jax.tree.map(lambda x: x * jnp.nan, state.params[name_of_first])
    state = state._replace(params=state.params | {name_of_first: broken})
    before = jax.device_get(state)
    after, metrics = stepper(task, mesh, shardings)(state, sharding.global_batch(mesh, batch), ROOT)
    assert metrics["skipped"] == 1
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after)._replace(step=before.step), before)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_two_steps_are_one_saved_restored_and_another(name, made, tmp_path):
    task, config, batch = made[name]
    mesh = mesh_of(2)
    expected, _ = run(made[name], mesh, steps=2)
    state, shardings = started(task, config, mesh)
    train_step = stepper(task, mesh, shardings)
    state, _ = train_step(state, sharding.global_batch(mesh, batch), ROOT)
    with checkpoint.Checkpoints(tmp_path, 1, 0, task.exported) as checkpoints:
        checkpoints.save(state, task.metadata())
        checkpoints.wait()
        abstract, _ = step.abstract_state(recipe_of(task), mesh)
        restored, _ = checkpoints.restore(abstract, shardings)
    state, _ = train_step(restored, sharding.global_batch(mesh, batch), ROOT)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    # What others load is the model, without what only training needs.
    model = vm.load(tmp_path)
    kept = task.exported or tuple(expected.params)
    assert set(nnx.to_pure_dict(nnx.state(model, nnx.Param))) == set(kept)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_run_says_and_leaves_what_every_run_does(name, shapes, boxed, teachers, tmp_path, capsys):
    config = debug_config(name, boxed if name == "detect" else shapes, teachers)
    config.optim.update(duration=4, warmup=1)
    config.checkpoint.every = 2
    if name not in keys.ADAPTED:
        config.evaluate.every = 4
    summary = table.train(config, tmp_path, time.time())
    assert (summary["step"], summary["task"], summary["interrupted"]) == (4, name, False)
    assert np.isfinite(summary["loss"])
    out = capsys.readouterr().out
    assert f"{name}: " in out
    assert "step 4/4" in out
    again = table.train(config, tmp_path, time.time())
    assert again["step"] == 4
    features = vm.load(tmp_path)
    assert features.config.encoder == task_of(config).model.encoder
    probe = load_config("debug", f"data={shapes},task=finetune")
    probe.optim.update(duration=1, warmup=0)
    probe.init_from = str(tmp_path)
    assert table.train(probe, tmp_path / "finetuned", time.time())["step"] == 1


@pytest.mark.slow
def test_the_method_that_the_docs_show_trains(shapes, tmp_path):
    """docs/architecture.md, "How to add a method": run as it stands there."""
    text = (ROOT_FOLDER / "docs" / "architecture.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text[text.index("## How to add a method") :], re.DOTALL)
    shown: dict = {}
    exec(source, shown)
    config = load_config("debug", f"data={shapes}")
    config.optim.duration, config.checkpoint.every, config.evaluate.every = 12, 6, 12
    config = compute.on_this_machine(settings.checked(config))
    summary = loop.run(config, tmp_path, time.time(), shown["make"])
    assert summary["step"] == 12
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "knn_top1" in lines[-1]
    assert set(nnx.to_pure_dict(nnx.state(vm.load(tmp_path), nnx.Param))) == {"encoder"}
