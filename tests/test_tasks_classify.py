"""Classifiers, whatever they start from: the same on any hosts, meshes and microbatches, and other heads."""

import csv
import dataclasses
import functools
import time

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import finetune_config, load_config, mesh_of, task_of

from videomae_jax import config as settings
from videomae_jax import sharding
from videomae_jax.data import pipeline
from videomae_jax.models.layout import WHOLE
from videomae_jax.tasks import table
from videomae_jax.training import splits, step, testing, trainer


def outputs_by_host(task, params, source, views, config, hosts):
    """What `hosts` processes would see of a source, joined."""
    parts = []
    for host in range(hosts):
        evaluator = testing.Evaluator(task.outputs, source, views, config, mesh_of(1))
        plain = pipeline.once

        def once(*args, plain=plain, place=host, **_one_host):
            return plain(*args, host=place, hosts=hosts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "once", once)
            patch.setattr(jax, "process_count", lambda: hosts)
            patch.setattr(testing.hosts, "gather", lambda value: [value])
            parts.append(evaluator.run(params))
    order = np.argsort(np.concatenate([part.records for part in parts]))
    values = np.concatenate([part.values for part in parts])[order]
    return np.concatenate([part.records for part in parts])[order], values, parts


@pytest.mark.parametrize(
    ("videos", "batch"), [(3, 4), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((13, 4), (8, 8)))]
)
def test_every_video_counts_once_for_any_hosts_and_remainder(shapes, videos, batch, monkeypatch):
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _sharding, rows: jnp.asarray(rows))
    c = finetune_config(shapes)
    c.evaluate.batch_videos = batch
    opened = splits.open_splits(c)
    task = task_of(c, opened.train)
    source = opened.train.select(range(videos))
    params = task.init(jax.random.key(0))
    views = task.test_views(2, 1)
    expected = [task.outputs(params, jnp.asarray(views.map((i, source[i]))["video"])) for i in range(videos)]
    for hosts in (1, 2, 4):
        records, values, _ = outputs_by_host(task, params, source, views, c, hosts)
        assert records.tolist() == list(range(videos))
        np.testing.assert_allclose(values, np.stack(expected), atol=1e-5)


@pytest.mark.slow
def test_accumulation_is_the_large_batch(shapes):
    """With mixup, CutMix, erasing, drop path and dropout on; on one device and on four."""
    c = finetune_config(shapes)
    opened = splits.open_splits(c)
    task = task_of(c, opened.train)
    rng = np.random.default_rng(0)
    batch = {
        "video": rng.integers(0, 256, (16, 8, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, 8, 16).astype(np.int32),
        "weight": np.array([1] * 5 + [0] + [1] * 10, np.float32),
        "index": np.arange(16, dtype=np.uint32),
        "erase": np.tile(np.array([2, 3, 10, 12], np.int32), (16, 1)),
    }
    states = {}
    for count, devices in ((1, 1), (4, 2)):
        mesh = mesh_of(devices)
        recipe = trainer.recipe(c, task)
        state, shardings = step.init_state(recipe, mesh, 0)
        make = (task.terms, recipe.tx, lambda _: jnp.float32(1e-3), mesh, shardings, count)
        train_step = step.make_train_step(*make)
        text = str(jax.make_jaxpr(train_step)(state, batch, jax.random.key(3)))
        assert (f"length={count}" in text) == (count > 1)
        whole = {name: jax.device_put(rows, shardings.step) for name, rows in batch.items()}
        whole = sharding.global_batch(mesh, batch)
        states[count, devices] = train_step(state, whole, jax.random.key(3))
    one, metrics = states.pop((1, 1))
    for other, found in states.values():
        np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other.params, one.params)


def test_mixing_differs_from_step_to_step_and_not_from_layout_to_layout(shapes):
    c = finetune_config(shapes)
    task = task_of(c, splits.open_splits(c).train)
    params = task.init(jax.random.key(0))
    params["head"]["kernel"] = params["head"]["kernel"] * 1e5
    rng = np.random.default_rng(0)
    batch = {
        "video": jnp.asarray(rng.integers(0, 256, (4, 8, 32, 32, 3), dtype=np.uint8)),
        "label": jnp.arange(4, dtype=jnp.int32),
        "weight": jnp.ones(4),
        "index": jnp.arange(4, dtype=jnp.uint32),
        "erase": jnp.zeros((4, 4), jnp.int32),
    }
    losses = jax.jit(functools.partial(task.clip_losses, layout=WHOLE))
    first, again, later = (losses(params, batch, jax.random.key(0), jnp.int32(s)) for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - later).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("head", ["multilabel", "regression"])
def test_other_heads(tmp_path, head):
    """From a list to metrics: what a clip's brightness is."""
    lines = ["path,label"]
    for i in range(24):
        level = 40 + 160 * (i % 2)
        frames = np.full((10, 32, 32, 3), level + i % 5, np.uint8)
        clips.write(tmp_path / "v" / f"{i}.mp4", frames)
        label = {"multilabel": "bright;all" if i % 2 else "all;dark", "regression": f"{i % 2};{1 - i % 2}"}
        lines.append(f"v/{i}.mp4,{label[head]}")
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(lines))
    c = load_config("debug", f"data={listed},task=finetune")
    c.head.kind = head
    c.augment.update(mixup=0.0, cutmix=0.0, policy="")
    c.optim.update(duration=40, lr=0.3, layer_decay=1.0)
    c.evaluate.every, c.checkpoint.every, c.data.held_out = 20, 40, 100
    summary = table.train(c, tmp_path / "run", time.time())
    result = summary["test"]["best"]
    assert result["videos"] == 2
    if head == "multilabel":
        assert result["mean_average_precision"] > 0.9
    else:
        assert result["mean_squared_error"] < 0.2
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert not (tmp_path / "run" / "confusion.png").exists()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_without_any_class_is_refused_before_training(tmp_path, part):
    """A lone ; is no class; of such videos alone there is no average precision."""
    for name in ("train", "validation", "test"):
        for i in range(4):
            (tmp_path / f"{name}{i}.mp4").touch()
        label = ";" if name == part else "a;b"
        (tmp_path / f"{name}.csv").write_text("".join(f"{name}{i}.mp4 {label}\n" for i in range(4)))
    c = load_config("debug", f"data={tmp_path},task=finetune")
    c.head.kind = "multilabel"
    with pytest.raises(settings.UserError, match=f"no {part} video has a class"):
        splits.open_splits(c)


def test_the_test_part_does_not_choose_weights(tmp_path, capsys):
    for split, count in (("train", 12), ("test", 4)):
        for i in range(count):
            path = tmp_path / split / "ab"[i % 2] / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    c = finetune_config(tmp_path)
    opened = splits.open_splits(c)
    assert (len(opened.train), len(opened.validation), len(opened.test)) == (11, 1, 4)
    assert set(opened.validation.ids).isdisjoint(opened.train.ids)
    assert "has no validation part: 1 training videos are kept for it" in capsys.readouterr().out
    assert opened.validation.root == opened.train.root != opened.test.root
    c = load_config("debug", f"data={tmp_path},task=probe")
    assert len(splits.open_splits(c).train) == 12


def test_few_videos_per_class(shapes):
    c = finetune_config(shapes)
    c.data.max_videos_per_class = 2
    opened = splits.open_splits(c)
    assert [opened.train.labels.count(label) for label in range(8)] == [2] * 8
    assert len(opened.test) == 8
    with pytest.raises(settings.UserError, match=r"max_videos_per_class is for head\.kind=softmax"):
        splits._few(dataclasses.replace(opened.train, targets=((0.0,),) * len(opened.train)), 2)


def test_balanced_classes_of_which_few_videos_are_learnt_by_heart(shapes):
    c = finetune_config(shapes)
    c.loss.class_weights = "balanced"
    train = splits.open_splits(c).train
    assert task_of(c, train).class_weights == pytest.approx([1.0] * 8)
    c.debug.overfit = 4  # of eight classes
    assert task_of(c, train.select([0, 1, 2, 3])).class_weights is None


def test_microbatches_that_mixup_cannot_pair_are_refused(shapes, tmp_path):
    c = finetune_config(shapes)
    c.augment.update(mixup=0.8, mix_probability=1.0)
    c.data.batch_size, c.optim.accumulate = 24, 3
    with pytest.raises(settings.UserError, match=r"microbatches of 1 clips, and mixup pairs clips: .* of 48"):
        table.train(c, tmp_path, time.time())
    assert not list(tmp_path.iterdir())
