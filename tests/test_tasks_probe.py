"""Probes: features are computed once, survive a kill, and tell classes apart where they can."""

import json
import os
import shutil
import time

import clips
import numpy as np
import pytest
from conftest import load_config, mesh_of

from videomae_jax import config as settings
from videomae_jax.data import pipeline, prepared
from videomae_jax.interop import export
from videomae_jax.tasks import features, probe, table
from videomae_jax.training import optim, testing


@pytest.fixture(scope="module")
def weights(shapes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    c = load_config("debug", f"data={shapes}")
    c.optim.duration = 4
    table.train(c, workdir, time.time())
    return workdir


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes that any features tell apart: dark, grey and bright noise."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, level in (("bright", 200), ("dark", 20), ("grey", 110)):
            for i in range(count):
                noise = rng.integers(0, 30, (10, 32, 32, 3), dtype=np.uint8)
                clips.write(folder / split / name / f"{i}.mp4", noise + np.uint8(level))
    return folder


def probe_config(data, weights, kind):
    c = load_config("debug", f"data={data},task=probe")
    c.init_from, c.probe.kind = str(weights), kind
    return c


@pytest.mark.parametrize("kind", ["knn", "linear", "attentive"])
def test_each_probe(weights, colours, tmp_path, kind):
    c = probe_config(colours, weights, kind)
    c.probe.epochs = 60
    if kind == "attentive":
        c.probe.lr = 0.1
    summary = table.train(c, tmp_path, time.time())
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result == summary["evaluation"]
    assert (result["videos"], result["probe"]) == (12, kind)
    assert result["protocol"]
    assert result["top1"] > 0.9
    assert (tmp_path / "predictions.csv").exists()


def test_features_are_computed_once_and_kept(weights, colours, tmp_path, monkeypatch, capsys):
    table.train(probe_config(colours, weights, "knn"), tmp_path, time.time())
    monkeypatch.setattr(testing.Evaluator, "batches", None)
    table.train(probe_config(colours, weights, "linear"), tmp_path, time.time())
    assert "24 of 24 features of train_pooled are there" in capsys.readouterr().out


def test_features_of_other_weights_are_computed_anew(weights, colours, shapes, tmp_path):
    c = probe_config(colours, weights, "knn")
    table.train(c, tmp_path, time.time())
    before = np.load(tmp_path / "features" / "train_pooled" / "values.npy")
    other = load_config("debug", f"data={shapes}")
    other.optim.duration, other.seed = 4, 1
    table.train(other, tmp_path / "other", time.time())
    c.init_from = str(tmp_path / "other")
    table.train(c, tmp_path, time.time())
    after = np.load(tmp_path / "features" / "train_pooled" / "values.npy")
    assert before.shape == after.shape == (24, 2, 32)
    assert np.abs(before.astype(np.float32) - after).max() > 0.01


def test_features_of_other_videos_of_the_same_names_are_computed_anew(weights, colours, tmp_path):
    shutil.copytree(colours / "train", tmp_path / "brighter")
    for file in (tmp_path / "brighter" / "dark").iterdir():
        shutil.copy(colours / "train" / "bright" / file.name, file)
    frozen = features.Frozen(str(weights), export.load(weights), per_token=False)
    views = pipeline.TestViews(8, 1, (32, 32), 1, 1)
    found = {}
    for folder in (colours / "train", tmp_path / "brighter"):
        source, c = prepared.open_source(str(folder), "train"), probe_config(folder, weights, "knn")
        values = features.extract(frozen, source, views, c, mesh_of(1), tmp_path / "features").values
        found[folder.name] = values.astype(np.float32)
    bright, dark = slice(0, 8), slice(8, 16)
    np.testing.assert_array_equal(found["brighter"][bright], found["train"][bright])
    np.testing.assert_array_equal(found["brighter"][dark], found["train"][bright])
    assert np.abs(found["brighter"][dark] - found["train"][dark]).max() > 0.01


def test_what_is_being_overwritten_does_not_count_as_there(weights, colours, tmp_path, monkeypatch):
    source, c = prepared.open_source(str(colours), "train"), probe_config(colours, weights, "knn")
    views, plain = pipeline.TestViews(8, 1, (32, 32), 1, 1), testing.Evaluator.batches
    model = export.load(weights)

    def extract(per_token: bool):
        frozen = features.Frozen(str(weights), model, per_token)
        return features.extract(frozen, source, views, c, mesh_of(1), tmp_path).values.copy()

    def dying(self, params, start=0):
        yield next(plain(self, params, start))
        raise KeyboardInterrupt

    first = extract(False)
    monkeypatch.setattr(testing.Evaluator, "batches", dying)
    with pytest.raises(KeyboardInterrupt):
        extract(True)
    monkeypatch.setattr(testing.Evaluator, "batches", plain)
    np.testing.assert_array_equal(extract(False), first)


def test_a_killed_extraction_goes_on(weights, colours, tmp_path, monkeypatch):
    source = prepared.open_source(str(colours), "train")
    c = probe_config(colours, weights, "knn")
    c.evaluate.batch_videos = 4
    frozen = features.Frozen(str(weights), export.load(weights), per_token=False)
    views = pipeline.TestViews(8, 1, (32, 32), 2, 1)
    args = (frozen, source, views, c, mesh_of(1))
    whole = features.extract(*args, tmp_path / "whole")
    assert whole.records.tolist() == list(range(24))
    plain, computed = testing.Evaluator.batches, []

    def dying(self, params, start=0):
        for i, part in enumerate(plain(self, params, start)):
            computed.append(part.records.tolist())
            yield part
            if len(computed) == 3 and i == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(features, "_SAVED_EVERY", 2)
    monkeypatch.setattr(testing.Evaluator, "batches", dying)
    with pytest.raises(KeyboardInterrupt):
        features.extract(*args, tmp_path / "killed")
    again = features.extract(*args, tmp_path / "killed")
    np.testing.assert_array_equal(again.values, whole.values)
    assert again.records.tolist() == whole.records.tolist()
    assert len(computed) == 3 + 4  # two of six batches were on record, so four came again


def test_a_video_that_cannot_be_decoded_is_left_out(weights, colours, tmp_path, capsys):
    copy = tmp_path / "colours"
    for path in colours.rglob("*.mp4"):
        (copy / path.relative_to(colours)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(colours)).write_bytes(path.read_bytes())
    (copy / "test" / "dark" / "broken.mp4").write_bytes(b"nothing")
    summary = table.train(probe_config(copy, weights, "knn"), tmp_path / "run", time.time())
    assert (summary["evaluation"]["videos"], summary["evaluation"]["videos_failed"]) == (12, 1)
    assert "dark/broken.mp4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "change", "text"),
    [
        ("probe", {"kind": "mlp"}, "probe.kind='mlp' is unknown: use knn, linear, attentive"),
        ("head", {"kind": "regression"}, "probes name classes"),
        (None, {"init_from": ""}, "a probe needs trained weights"),
        ("probe", {"kind": "attentive", "num_heads": 5}, "probe.num_heads=5 does not divide the width"),
    ],
)
def test_wrong_probes(weights, colours, tmp_path, section, change, text):
    c = probe_config(colours, weights, "linear")
    (c[section] if section else c).update(change)
    with pytest.raises(settings.UserError, match=text):
        table.train(c, tmp_path, time.time())


def test_videos_are_not_tested_on_themselves(weights, colours, tmp_path):
    c = probe_config(colours / "train", weights, "knn")
    c.data.held_out = 0
    with pytest.raises(settings.UserError, match="no other videos to test on"):
        table.train(c, tmp_path, time.time())


def test_a_probe_computes_as_its_settings_say(weights, colours, tmp_path, monkeypatch):
    seen = []
    plain = features.extract
    monkeypatch.setattr(
        features, "extract", lambda frozen, *rest: seen.append(frozen.model.config) or plain(frozen, *rest)
    )
    c = probe_config(colours, weights, "knn")
    c.model.dtype, c.model.attention = "bfloat16", "queries"
    table.train(c, tmp_path, time.time())
    assert {(config.compute.dtype, config.compute.attention) for config in seen} == {("bfloat16", "queries")}


def test_a_file_that_was_exchanged_is_read_again(weights, colours, tmp_path, capsys):
    """By its size and time; one that could not be decoded is said to be left out from before."""
    shutil.copytree(colours, tmp_path / "data")
    c = probe_config(tmp_path / "data", weights, "knn")
    for expected in ("", "could not be decoded then: remove"):
        (tmp_path / "data" / "test" / "dark" / "broken.mp4").write_bytes(b"nothing")
        os.utime(tmp_path / "data" / "test" / "dark" / "broken.mp4", ns=(0, 0))
        assert table.train(c, tmp_path / "run", time.time())["evaluation"]["videos_failed"] == 1
        assert expected in capsys.readouterr().out
    shutil.copy(tmp_path / "data/test/grey/0.mp4", tmp_path / "data/test/dark/broken.mp4")
    again = table.train(c, tmp_path / "run", time.time())["evaluation"]
    assert (again["videos"], again["videos_failed"]) == (13, 0)
    assert again["top1"] < 1  # what lies there is grey
    assert "24 of 24 features of train_pooled are there" in capsys.readouterr().out


def test_the_results_of_another_run_are_not_replaced(weights, colours):
    before = (weights / "summary.json").read_bytes()
    with pytest.raises(settings.UserError, match="belongs to a training run"):
        table.train(probe_config(colours, weights, "knn"), weights, time.time())
    assert (weights / "summary.json").read_bytes() == before


def test_neighbours_are_asked_of_the_mean_of_all_clips():
    train = np.array([[[1.0, 0], [0, 4]], [[0.9, 0.1], [4, 0]]], np.float16)  # first clips alike
    for second, label in (([0, 4], 0), ([4, 0], 1)):
        asked = np.array([[[1.0, 0], second]], np.float16)
        found = probe._knn(load_config("debug", "task=probe"), train, np.array([0, 1]), asked, 2)
        assert found[0, 0].argmax() == label


def test_the_rate_of_a_linear_probe_is_per_256_clips(monkeypatch):
    seen = []
    monkeypatch.setattr(optim, "schedule", lambda *given: seen.append(given) or (lambda step: 0.0))
    c = load_config("debug", "task=probe")
    c.probe.update(batch_size=64, epochs=10, lr=0.1)
    rows = np.ones((128, 1, 4), np.float16)
    probe._linear(c, rows, np.zeros(128, int), rows[:1], 2)
    assert seen == [(0.1 * 64 / 256, 0.0, 2, 20)]
