"""Finetuning as users have it: from a backbone, killed and resumed, validated, ended early, tested once."""

import csv
import dataclasses
import itertools
import json
import re
import shutil
import time

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import finetune_config, load_config, mesh_of
from flax import nnx

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax.data import sources
from videomae_jax.evaluation import classification
from videomae_jax.evaluation.classification import OutputError
from videomae_jax.interop import export, transfer, weights
from videomae_jax.interop.weights import Hints
from videomae_jax.models.detector import ActionDetector, DetectorConfig
from videomae_jax.tasks import backbone, evaluate, knn, table
from videomae_jax.tasks.finetune import Finetune
from videomae_jax.training import compute, report, splits, step, testing
from videomae_jax.training.task import Run


def run(config, workdir):
    return table.train(config, workdir, time.time())


def params_of(path):
    return nnx.to_pure_dict(nnx.state(vm.load(path), nnx.Param))


def logged(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(shapes, tmp_path_factory):
    """The work folder of a pretraining run of a few steps, with k-NN meanwhile."""
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    c = load_config("debug", f"data={shapes}")
    c.optim.duration, c.evaluate.every = 6, 3
    run(c, workdir)
    return workdir


@pytest.fixture(scope="module")
def undisturbed(shapes, pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finetuned"
    c = finetune_config(shapes, ema=0.9)
    c.init_from = str(pretrained)
    summary = run(c, workdir)
    return workdir, summary


@pytest.mark.slow
def test_knn_while_pretraining(pretrained):
    lines = {line["step"]: line for line in logged(pretrained)}
    assert {step for step, line in lines.items() if "knn_top1" in line} == {3, 6}
    assert 0 <= lines[6]["knn_top1"] <= 1


def test_a_finetuning_run_leaves_what_it_promises(undisturbed):
    workdir, summary = undisturbed
    validated = [line for line in logged(workdir) if "validation_top1" in line]
    assert [line["step"] for line in validated] == [5, 10, 12]
    best = max(validated, key=lambda line: line["validation_top1"])
    assert summary["best"] == {"step": best["step"], "top1": best["validation_top1"]}
    assert set(summary["test"]) == {"last", "last_average", "best"}
    assert summary["test"]["best"]["videos"] == 8
    assert {"data", "first step", "steps", "test"} <= set(summary["seconds"])
    meta = export.read_metadata(workdir / "best")
    assert meta["validation"]["step"] == best["step"]
    assert meta["model"]["classes"][0] == "down"
    assert json.loads((workdir / "evaluation.json").read_text()) == summary["test"]["best"]
    rows = list(csv.DictReader((workdir / "predictions.csv").read_text().splitlines()))
    assert len(rows) == len({row["id"] for row in rows}) == 8
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / 8 == summary["test"]["best"]["top1"]
    for row in rows:
        values = {name: float(value) for name, value in row.items() if name.startswith("score ")}
        assert sum(values.values()) == pytest.approx(1, abs=1e-4)
        assert max(values, key=values.__getitem__) == f"score {row['prediction']}"
    assert (workdir / "confusion.png").stat().st_size > 500


def test_the_backbone_is_the_pretrained_one(pretrained, shapes, tmp_path, capsys, monkeypatch):
    """With a learning rate of nothing, all but norm and head are as they were."""
    c = finetune_config(shapes, lr=1e-30)
    c.optim.duration, c.init_from, c.optim.warmup = 5, str(pretrained), 1
    run(c, tmp_path)
    ours, theirs = params_of(tmp_path), params_of(pretrained)
    for part in ("embed", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, ours["encoder"][part], theirs["encoder"][part])
    output = capsys.readouterr().out
    assert "fresh: head/bias, head/kernel, norm/bias, norm/scale; unused: decoder/" in output
    assert "encoder/norm" in output


@pytest.mark.parametrize("stop_after", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 10))])
def test_killed_and_resumed(undisturbed, shapes, pretrained, tmp_path, monkeypatch, stop_after):
    """Cut off before, between and after checkpoints and validations; weights, average, log and best agree."""
    workdir, summary = undisturbed
    c = finetune_config(shapes, ema=0.9)
    c.init_from = str(pretrained)
    plain = report.Report.step

    def dying(self, step, metrics, validated):
        plain(self, step, metrics, validated)
        if step == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(c, tmp_path)
    if stop_after > 5:
        c.init_from = ""  # there is a checkpoint: the weights it began from may be gone
    again = run(c, tmp_path)
    for place in ("", "best"):
        jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / place), params_of(workdir / place))
    names = ("step", "loss", "grad_norm", "learning_rate", "validation_top1", "validation_loss")
    runs = [[[line.get(name) for name in names] for line in logged(d)] for d in (tmp_path, workdir)]
    assert runs[0] == runs[1]
    assert (again["best"], again["test"]) == (summary["best"], summary["test"])


@pytest.mark.slow
def test_the_average_of_the_weights(shapes, tmp_path):
    """ema = decay * ema + (1 - decay) * params after every step, checked by its own definition."""
    config = finetune_config(shapes, ema=0.5)
    config.evaluate.every = 0  # the last weights are the best
    states = []
    plain = step.make_train_step

    def spying(*args, **kwargs):
        train_step = plain(*args, **kwargs)

        def step(state, batch, root):
            if not states:
                states.append(jax.device_get((state.params, state.ema)))
            state, metrics = train_step(state, batch, root)
            states.append(jax.device_get((state.params, state.ema)))
            return state, metrics

        return step

    config.optim.duration = 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", spying)
        run(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, *states[0])  # it begins as the weights
    for (_, before), (params, after) in itertools.pairwise(states):
        expected = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * p, before, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, expected)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "best"), states[-1][1])


@pytest.mark.slow
def test_frozen_blocks_do_not_move(shapes, tmp_path, pretrained):
    c = finetune_config(shapes, freeze_blocks=1)
    c.optim.duration, c.init_from = 5, str(pretrained)
    run(c, tmp_path)
    ours, theirs = params_of(tmp_path)["encoder"], params_of(pretrained)["encoder"]
    jax.tree.map(np.testing.assert_array_equal, ours["embed"], theirs["embed"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), ours["blocks"], theirs["blocks"])
    assert (ours["blocks"]["fc1"]["kernel"][1] != theirs["blocks"]["fc1"]["kernel"][1]).any()


def break_weights(monkeypatch, is_bad):
    """Validation and tests see NaN in the head where `is_bad`(number of the run of a model) says so."""
    plain, runs = testing.Evaluator.run, itertools.count()

    def run(self, params):
        if is_bad(next(runs)):
            params = {**params, "head": jax.tree.map(lambda x: x * jnp.nan, params["head"])}
        return plain(self, params)

    monkeypatch.setattr(testing.Evaluator, "run", run)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_the_best(shapes, tmp_path, capsys, monkeypatch):
    break_weights(monkeypatch, lambda number: number in (0, 4))  # of 3 validations, best, last
    with pytest.raises(
        OutputError, match=r"last weights: the outputs for 8 of 8 videos .* the first is down/"
    ):
        run(finetune_config(shapes), tmp_path)
    lines = {line["step"]: line for line in logged(tmp_path) if "validation_top1" in line}
    assert (lines[5]["validation_top1"], lines[5]["validation_not_finite"]) == (0.0, 8.0)
    assert lines[10]["validation_not_finite"] == 0
    output = capsys.readouterr().out
    assert "the scores of 8 of 8 validation videos are not finite, the first is down/" in output
    assert export.read_metadata(tmp_path / "best")["validation"]["step"] in (10, 12)
    assert np.isfinite(params_of(tmp_path / "best")["head"]["kernel"]).all()


@pytest.mark.slow
def test_a_run_without_any_finite_validation_ends_with_an_error(shapes, tmp_path, monkeypatch):
    break_weights(monkeypatch, lambda _number: True)
    with pytest.raises(settings.UserError, match="its validation was never finite"):
        run(finetune_config(shapes), tmp_path)
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
def test_early_stopping(shapes, tmp_path, monkeypatch):
    """Two validations without improvement end the run; started again, it stays ended."""
    top1 = iter([0.3, 0.5, 0.5, 0.4] + [9.9] * 9)
    monkeypatch.setattr(
        Finetune,
        "validator",
        lambda *_: lambda *_: {"validation_top1": next(top1), "validation_not_finite": 0.0},
    )
    c = finetune_config(shapes, patience=2)
    c.optim.duration, c.evaluate.every = 40, 2
    summary = run(c, tmp_path)
    assert summary["step"] == 8
    assert summary["best"] == {"step": 4, "top1": 0.5}
    assert not summary["interrupted"]
    assert run(c, tmp_path)["step"] == 8


@pytest.mark.slow
def test_a_warning_when_nothing_is_learnt(shapes, tmp_path, capsys, monkeypatch):
    """Once, and not before the warm-up is over."""
    monkeypatch.setattr(classification, "is_at_chance", lambda *_: True)
    c = finetune_config(shapes)
    c.optim.duration, c.optim.warmup, c.evaluate.every = 6, 4, 2
    run(c, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert re.search(r"after 4 steps validation top1 [\d.]+ is no better than always naming the most", line)
    assert "--config.debug.overfit=8" in line


@pytest.fixture
def one_device(monkeypatch):
    """Quicker than eight that share two cores."""
    monkeypatch.setattr(compute, "make_mesh", lambda _config: mesh_of(1))


@pytest.mark.slow
def test_eight_clips_can_be_learnt_by_heart(shapes, tmp_path, one_device):
    c = finetune_config(shapes)
    c.debug.overfit = 8
    summary = run(c, tmp_path)
    assert summary["learnt_by_heart"]["validation_top1"] == 1.0
    assert summary["step"] == 300


@pytest.mark.slow
def test_what_cannot_be_learnt_by_heart_is_an_error(shapes, tmp_path, one_device):
    c = finetune_config(shapes, lr=1e-30)
    c.debug.overfit = 8
    with pytest.raises(settings.UserError, match=r"debug\.overfit=8: the training clips are not learnt"):
        run(c, tmp_path)


def test_evaluate(undisturbed, shapes, tmp_path, capsys):
    """The command repeats the test of the run, also with another number of views, or from another place."""
    workdir, summary = undisturbed
    c = finetune_config(shapes)
    found = evaluate.run(c, tmp_path / "w", str(workdir / "best"))
    same = {name: found[name] for name in summary["test"]["best"]}
    assert same == summary["test"]["best"]
    c.evaluate.update(segments=1, crops=1, split="validation")
    again = evaluate.run(c, workdir, "")
    assert again["views"] == {"segments": 1, "crops": 1}
    assert again["checkpoint"].endswith("best")
    output = capsys.readouterr().out
    assert "evaluate: 8 videos, 1 x 1 views" in output
    assert "warning" not in output
    assert (found["split"], again["split"]) == ("test", "validation")
    c.data.stride = 2
    evaluate.run(c, workdir, "")
    assert (
        "was trained with data.stride=1 (0: one frame of each part) and is tested with 2"
        in capsys.readouterr().out
    )


def test_evaluate_takes_what_a_file_does_not_tell_from_the_command(undisturbed, shapes, tmp_path):
    """Its heads, and the clip size whose position table was trained."""
    workdir, summary = undisturbed
    model = vm.load(workdir / "best")
    weights.export_torch(model, tmp_path / "best.safetensors", "official")
    c = finetune_config(shapes)
    heads, size = model.config.encoder.num_heads, model.config.clip_size
    c.model.encoder.update(width=96, num_heads=1)  # says nothing of these weights
    c.model.position_resize = "interpolate"
    hints = Hints(num_heads=heads, clip_size=size, classes=model.config.classes)
    found = evaluate.run(c, tmp_path / "w", str(tmp_path / "best.safetensors"), hints)
    assert found["top1"] == summary["test"]["best"]["top1"]
    assert found["loss"] == pytest.approx(summary["test"]["best"]["loss"], rel=1e-4)


def test_evaluate_on_a_folder_of_its_own(undisturbed, shapes, tmp_path):
    c = finetune_config(shapes / "validation")
    c.evaluate.split = "all"
    found = evaluate.run(c, tmp_path / "w", str(undisturbed[0]))
    assert found["videos"] == 8
    c = finetune_config(shapes)
    c.evaluate.split = "all"
    with pytest.raises(settings.UserError, match=r"is divided: evaluate\.split=all is for"):
        evaluate.run(c, tmp_path / "w", str(undisturbed[0]))


def test_evaluate_counts_what_cannot_be_decoded(undisturbed, shapes, tmp_path, capsys):
    folder = tmp_path / "videos"
    for path in (shapes / "validation").rglob("*.mp4"):
        copy = folder / path.parent.name / path.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
    (folder / "up" / "broken.mp4").write_bytes(b"nothing")
    clips.write(folder / "up" / "short.mp4", clips.numbered_frames(3))
    c = finetune_config(folder)
    c.evaluate.split = "all"
    with pytest.raises(settings.UserError, match=r"1 of 10 videos cannot .*broken\.mp4.*allow_failed"):
        evaluate.run(c, tmp_path / "w", str(undisturbed[0]))
    assert not (tmp_path / "w").exists()
    c.evaluate.allow_failed = True
    found = evaluate.run(c, tmp_path / "w", str(undisturbed[0]))
    assert (found["videos"], found["videos_failed"]) == (9, 1)
    assert list(found["failed"]) == ["up/broken.mp4"]
    assert found["videos_shorter_than_a_clip"] == 1
    c.data.stride = 0  # one frame of each part: only what has fewer frames than a clip is short
    found = evaluate.run(c, tmp_path / "w", str(undisturbed[0]))
    assert found["videos_shorter_than_a_clip"] == 1
    assert "1 videos have fewer than 8 frames" in capsys.readouterr().out


def with_classes(shapes, folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i, path in enumerate(sorted((shapes / "train" / "up").glob("*.mp4"))):
            (folder / name / f"{i}.mp4").write_bytes(path.read_bytes())
    return folder


def test_wrong_uses_of_evaluate(undisturbed, pretrained, shapes, tmp_path):
    workdir, _ = undisturbed
    c = finetune_config(shapes)
    with pytest.raises(settings.UserError, match="holds a pretraining model, which has no trained head"):
        evaluate.run(c, tmp_path / "w", str(pretrained))
    config = DetectorConfig.from_dict(backbone.fields(compute.on_this_machine(c)) | {"classes": ("a", "b")})
    vm.save(ActionDetector(config, rngs=nnx.Rngs(0)), tmp_path / "detector")
    with pytest.raises(settings.UserError, match=r"holds a detector, not a classifier.*configs/detect\.py"):
        evaluate.run(c, tmp_path / "w", str(tmp_path / "detector"))
    with pytest.raises(
        settings.UserError, match="evaluate tests classifiers and detectors, not task=pretrain"
    ):
        evaluate.run(load_config("debug"), tmp_path / "w", str(workdir))
    other = finetune_config(with_classes(shapes, tmp_path / "few", ["down", "sideways", "up"]))
    with pytest.raises(settings.UserError, match=r"has 3 classes, the model .* 8, and 'sideways' is not"):
        evaluate.run(other, tmp_path / "w", str(workdir))
    names = ["a", "b", "c", "d", "e", "f", "g", "h"]
    renamed = finetune_config(with_classes(shapes, tmp_path / "renamed", names))
    with pytest.raises(sources.SourceError, match="class 'a', which is not among the 8 classes of the model"):
        evaluate.run(renamed, tmp_path / "w", str(workdir))
    c.head.kind = "multilabel"
    c.augment.mix_probability = 0.0
    with pytest.raises(settings.UserError, match="has a softmax head, the settings say multilabel"):
        evaluate.run(c, tmp_path / "w", str(workdir))


def test_wrong_data(shapes, tmp_path):
    empty = with_classes(shapes, tmp_path / "videos", ["a", "b"])
    listed = tmp_path / "list.csv"
    listed.write_text("".join(f"videos/a/{i}.mp4 {2 * (i % 2)}\n" for i in range(4)))
    with pytest.raises(settings.UserError, match="1 of 3 classes have no training video, the first is '1'"):
        run(finetune_config(listed), tmp_path / "run")
    listed.write_text("videos/a/0.mp4 0\nvideos/a/1.mp4\n")
    with pytest.raises(sources.SourceError, match="line 2: 1 columns"):
        run(finetune_config(listed), tmp_path / "run")
    listed.write_text("path,label\nvideos/a/0.mp4,x\nvideos/a/1.mp4,\nvideos/b/1.mp4,y\n")
    with pytest.raises(settings.UserError, match=r"1 of 3 training videos have no label.*videos/a/1\.mp4"):
        run(finetune_config(listed), tmp_path / "run")
    listed.write_text("videos/a/0.mp4 x\nvideos/a/1.mp4 x\n")
    with pytest.raises(settings.UserError, match="has one class, 'x'"):
        run(finetune_config(listed), tmp_path / "run")
    divided = tmp_path / "divided"
    with_classes(shapes, divided / "train", ["a", "b"])
    with_classes(shapes, divided / "validation", ["a", "c"])
    with pytest.raises(sources.SourceError, match="class 'c', which is not among the 2 classes of the"):
        run(finetune_config(divided), tmp_path / "run")
    listed.write_text("videos/a/0.mp4 x\nvideos/b/1.mp4 y\n")
    for part, label in (("train", "{}"), ("val", ""), ("test", "")):
        lines = [f"{empty}/{name}/0.mp4,{label.format(name)}" for name in ("a", "b")]
        (tmp_path / f"{part}.csv").write_text("path,label\n" + "\n".join(lines))
    with pytest.raises(settings.UserError, match="no validation video has a label"):
        run(finetune_config(tmp_path), tmp_path / "run")
    with pytest.raises(settings.UserError, match="no training video has a label: put each video into"):
        run(finetune_config(empty / "a"), tmp_path / "run")
    (tmp_path / "val.csv").write_text((tmp_path / "train.csv").read_text())
    opened = splits.open_splits(finetune_config(tmp_path))
    assert opened.test is not None
    assert opened.test.labels == opened.validation.labels == (0, 1)
    c = finetune_config(empty, patience=2)
    c.evaluate.every = 0
    with pytest.raises(settings.UserError, match="patience counts validations: set"):
        run(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_size_are_refused(shapes, pretrained, tmp_path):
    c = finetune_config(shapes)
    c.init_from = str(pretrained)
    c.model.encoder.width, c.model.encoder.mlp_dim = 64, 128
    with pytest.raises(transfer.TransferError, match=r"does not fit the model \(encoder: .*'width': 32"):
        run(c, tmp_path / "run")
    c = finetune_config(shapes)
    c.init_from = str(tmp_path / "nowhere")
    with pytest.raises(settings.UserError, match="holds no model"):
        run(c, tmp_path / "other")


def test_heads_are_kept_for_known_classes_only(undisturbed):
    workdir, _ = undisturbed
    config = vm.load(workdir).config
    names = [
        "/".join(key)
        for key in transfer.flatten_dict(nnx.to_pure_dict(nnx.state(vm.load(workdir), nnx.Param)))
    ]
    same = transfer.read(workdir, config, names)
    assert same.fresh == []
    rows = [5, 0, 3]  # by name, whatever the order
    some = dataclasses.replace(config, classes=tuple(config.classes[row] for row in rows))
    taken = transfer.read(workdir, some, names)
    np.testing.assert_array_equal(taken.params["head"]["kernel"], same.params["head"]["kernel"][:, rows])
    np.testing.assert_array_equal(taken.params["head"]["bias"], same.params["head"]["bias"][rows])
    other = dataclasses.replace(config, classes=(*config.classes[:-1], "other"))
    kept = transfer.read(workdir, other, names)
    assert kept.fresh == ["head/bias", "head/kernel"]
    assert kept.unused == ["head/bias", "head/kernel"]


def test_knn_while_pretraining_names_what_it_cannot_read(shapes, tmp_path, capsys, monkeypatch):
    c = load_config("debug", f"data={shapes}")
    videos = splits.open_splits(c)
    clip_features = lambda params, video: video.mean((1, 2, 3)) + params  # noqa: E731
    this = Run(c, tmp_path, videos, settings.make_schedule(c, len(videos.train)), mesh_of(1))
    look = knn.validator(clip_features, 1, this)
    whole = look(jnp.zeros(()), 1)["knn_top1"]
    plain, bad = type(videos.validation).__getitem__, set()

    def read(self, index):
        record = plain(self, index)
        return record | {"error": f"{record['name']} is broken"} if record["name"] in bad else record

    monkeypatch.setattr(type(videos.validation), "__getitem__", read)
    bad |= set(videos.validation.ids[:3])
    assert 0 <= look(jnp.zeros(()), 2)["knn_top1"] <= 1
    look(jnp.zeros(()), 3)
    out = capsys.readouterr().out
    assert out.count("bad video, left out of k-NN") == 3
    bad |= set(videos.validation.ids)
    with pytest.raises(settings.UserError, match="none of 8 videos can be decoded"):
        look(jnp.zeros(()), 4)
    assert 0 <= whole <= 1


def test_a_test_that_does_not_fit_is_refused_before_training(shapes, tmp_path):
    c = finetune_config(shapes)
    c.evaluate.update(segments=50, crops=3, batch_videos=64)
    c.data.loader_gib = 0.05
    with pytest.raises(
        settings.UserError, match=r"or evaluate\.batch_videos, or raise --config\.data\.loader_gib"
    ):
        run(c, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_blocks_that_nothing_trained_are_not_frozen(shapes, tmp_path):
    c = load_config("debug", f"data={shapes},task=finetune")
    c.optim.freeze_blocks = 1
    with pytest.raises(settings.UserError, match=r"blocks that nothing has trained: set --config\.init_from"):
        table.train(c, tmp_path, time.time())


def test_few_labels_are_chosen_by_the_hash_of_names(shapes):
    train = splits.open_splits(finetune_config(shapes)).train
    few = splits._few(train, 1)
    assert len(few) == 8
    for label in range(8):
        names = [name for name, own in zip(train.ids, train.labels, strict=True) if own == label]
        assert min(names, key=sources.hash_of) in few.ids


def test_a_part_that_stands_in_for_the_test_is_called_what_it_is(shapes, tmp_path, capsys):
    shutil.copytree(shapes, tmp_path / "data", ignore=shutil.ignore_patterns("test"))
    videos = splits.open_splits(finetune_config(tmp_path / "data"))
    assert videos.tested == "validation"
    assert "no test part, so the validation videos are tested" in capsys.readouterr().out
    assert splits.open_splits(finetune_config(shapes)).tested == "test"
    assert "are tested" not in capsys.readouterr().out
