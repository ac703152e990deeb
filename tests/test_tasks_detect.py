"""Training and testing detectors, as a user runs them, and what is refused."""

import csv
import dataclasses
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, mesh_of, task_of
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import videomae_jax as vm
from videomae_jax.apps import predict, reconstruct, score_detections
from videomae_jax.config import UserError
from videomae_jax.data import decode, scenes
from videomae_jax.data.sources import SourceError
from videomae_jax.interop import torch_weights, transfer, weights
from videomae_jax.models import detector, heads, mae, vit
from videomae_jax.models.detector import ActionDetector, DetectorConfig
from videomae_jax.models.layout import WHOLE
from videomae_jax.models.views import shift_hsv
from videomae_jax.tasks import detections, table

SHARED = {
    "clip_size": (8, 32, 32),
    "tubelet": (2, 8, 8),
    "pixel_mean": (0.5,) * 3,
    "pixel_std": (0.25,) * 3,
    "encoder": vit.Stack(32, 2, 2, 64),
}


def settings_of(boxed, **changes):
    config = load_config("debug", f"data={boxed},task=detect")
    config.optim.update(duration=6, warmup=1)
    config.checkpoint.every = 3
    config.evaluate.every = 3
    with config.unlocked():
        for name, value in changes.items():
            config.update({name: value})
    return config


@pytest.fixture(scope="module")
def trained(boxed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect") / "run"
    return folder, table.train(settings_of(boxed), folder, time.time())


def test_a_run_is_tested_by_the_official_metric(trained, boxed, tmp_path):
    folder, summary = trained
    result = json.loads((folder / "evaluation.json").read_text())
    assert summary["test"]["mAP"] == result["mAP"]
    assert (folder / "classes.png").stat().st_size > 1000
    scored = score_detections.run(
        str(boxed / "test.csv"),
        str(folder / "detections.csv"),
        str(boxed / "classes.csv"),
        "",
        str(tmp_path / "scored.json"),
    )
    assert scored["mAP"] == pytest.approx(result["mAP"], abs=1e-9)
    rows = list(csv.reader((folder / "detections.csv").read_text().splitlines()))
    truth = scenes.open_scenes(str(boxed), "test")
    assert len(rows) == sum(len(scene.corners) for scene in truth.scenes) * len(truth.classes)
    assert all(0 <= float(row[-1]) <= 1 for row in rows)


def test_evaluate_gives_the_same_whatever_the_batch(trained, boxed, tmp_path):
    folder, summary = trained
    for batch in (1, 5):
        config = settings_of(boxed)
        config.evaluate.batch_videos = batch
        again = table.evaluate_weights(config, tmp_path, str(folder / "best"), weights.Hints())
        assert again["mAP"] == summary["test"]["mAP"]


def test_a_test_otherwise_than_trained_is_said(trained, boxed, tmp_path, capsys):
    config = settings_of(boxed)
    config.data.stride += 1
    config.detect.test_short = 40
    table.evaluate_weights(config, tmp_path, str(trained[0]), weights.Hints())
    out = capsys.readouterr().out
    assert f"with data.stride={config.data.stride - 1} and is tested with {config.data.stride}" in out
    assert "and is tested with 40: --config.detect.test_short=" in out


def test_a_part_in_which_no_box_counts_is_refused_before_training(boxed, tmp_path):
    shutil.copytree(boxed, tmp_path / "boxed")
    (tmp_path / "boxed" / "excluded_validation.csv").write_text(
        "".join(
            f"{name.rpartition(',')[0]},{int(name.rpartition(',')[2]) / 1000}\n"
            for name in scenes.open_scenes(str(boxed), "validation").ids
        )
    )
    with pytest.raises(UserError, match="no box of the validation part counts"):
        table.train(settings_of(tmp_path / "boxed"), tmp_path / "run", time.time())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_detector_says_nothing_of_a_batch(trained, boxed):
    """The scores of a key frame do not depend on what it is batched with, nor where, to the last bit."""
    folder, _ = trained
    found = []
    params = jax.device_get(nnx.to_pure_dict(nnx.state(vm.load(folder / "best"), nnx.Param)))
    config = settings_of(boxed)
    config.evaluate.batch_videos = 4
    task = task_of(config, scenes.open_scenes(str(boxed), "train"))
    source = scenes.open_scenes(str(boxed), "test")
    for places in ((0, 1, 2, 3), (9, 3, 8, 0, 7), (1, 3)):
        said = task.tester(config, source.select(places), mesh_of(1), "test").run(params)
        found.append({places[i]: scores for i, scores in said.scores.items()})
    for place in (0, 1, 3):
        for other in found[1:]:
            if place in other:
                np.testing.assert_array_equal(found[0][place], other[place])


def test_boxes_of_a_detector_are_tested_where_there_are_some(trained, boxed, tmp_path, capsys):
    folder, _ = trained
    shutil.copytree(boxed, tmp_path / "data")
    truth = scenes.open_scenes(str(boxed), "test")
    rows = [
        f"{name.partition(',')[0]},{int(name.partition(',')[2]) / 1000},"
        f"{','.join(map(str, corners))},1,{score}\n"
        for name, scene in zip(truth.ids, truth.scenes, strict=True)
        for corners, score in zip(scene.corners, (0.9, 0.5, 0.95), strict=False)
    ]
    (tmp_path / "data" / "detected_test.csv").write_text("".join(rows))
    config = settings_of(tmp_path / "data")
    found = table.evaluate_weights(config, tmp_path / "out", str(folder), weights.Hints())
    assert found["boxes"] == "detected"
    written = (tmp_path / "out" / "detections.csv").read_text().splitlines()
    kept = sum(row.rstrip().endswith(("0.9", "0.95")) for row in rows)
    assert len(written) == kept * len(truth.classes)
    (tmp_path / "data" / "excluded_test.csv").write_text("test_000000,0.25\ntest_000000,0.5\n")
    again = table.evaluate_weights(config, tmp_path / "out", str(folder), weights.Hints())
    assert again["mAP"] != found["mAP"]


def test_detected_boxes_of_validation_are_tested_where_there_is_no_test_part(trained, boxed, tmp_path):
    folder, _ = trained
    shutil.copytree(boxed, tmp_path / "data")
    (tmp_path / "data" / "test.csv").unlink()
    truth = scenes.open_scenes(str(boxed), "validation")
    left, top, right, bottom = truth.scenes[0].corners[0]
    row = f"{truth.ids[0].partition(',')[0]},{truth.scenes[0].time},{left},{top},{right},{bottom},,0.9\n"
    (tmp_path / "data" / "detected_validation.csv").write_text(row)
    config = settings_of(tmp_path / "data")
    found = table.evaluate_weights(config, tmp_path / "out", str(folder), weights.Hints())
    assert (found["boxes"], found["key_frames"]) == ("detected", 1)
    (tmp_path / "data" / "scored.csv").write_text("9,grow\n")
    again = table.evaluate_weights(config, tmp_path / "out", str(folder), weights.Hints())
    assert set(again["classes"]) == {"grow"}
    (tmp_path / "data" / "detected_validation.csv").write_text("nobody,1,0,0,1,1,,0.9\n")
    with pytest.raises(SourceError, match=r"none of score 0.8 or more of these videos"):
        table.train(config, tmp_path / "new", time.time())  # before any work


def test_another_normalisation_starts_from_weights_too(tmp_path):
    config = DetectorConfig(**SHARED | {"pixel_mean": (0.4,) * 3}, classes=("run", "sit"))
    vm.save(mae.VideoMAE(mae.VideoMAEConfig(**SHARED, decoder=None), rngs=nnx.Rngs(2)), tmp_path / "mae")
    names = list(flat(ActionDetector(config, rngs=nnx.Rngs(1))))
    assert transfer.read(tmp_path / "mae", config, names).fresh == ["head/bias", "head/kernel"]


def test_key_frames_that_cannot_be_decoded(trained, boxed, tmp_path):
    folder, _ = trained
    shutil.copytree(boxed, tmp_path / "data")
    (tmp_path / "data" / "videos" / "test_000003.mp4").write_bytes(b"nothing")
    config = settings_of(tmp_path / "data")
    with pytest.raises(UserError, match=r"3 of \d+ key frames cannot be decoded, the first is test_000003,"):
        table.evaluate_weights(config, tmp_path / "out", str(folder), weights.Hints())
    config.evaluate.allow_failed = True
    found = table.evaluate_weights(config, tmp_path / "out", str(folder), weights.Hints())
    assert found["key_frames_failed"] == 3


def test_scores_that_are_not_finite_are_refused(boxed, tmp_path):
    source = scenes.open_scenes(str(boxed), "test").select([0, 1])
    broken = {place: np.full((3, 10), np.nan, np.float32) for place in (0, 1)}
    found = detections.Found(source, source, broken, {})
    assert np.isnan(found.figures()["mAP"])
    with pytest.raises(UserError, match="scores of 2 key frames are not finite"):
        detections.write(tmp_path, found, settings_of(boxed), "weights")


def test_frames_of_other_shapes_are_tested_in_their_own(trained, boxed, tmp_path):
    folder, _ = trained
    videos = tmp_path / "videos"
    videos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("wide", (32, 64)), ("tall", (80, 40))):
        decode.write_video(videos / f"{name}.mp4", rng.integers(0, 256, (20, *size, 3), dtype=np.uint8), 10)
    shutil.copy(boxed / "classes.csv", tmp_path)
    (tmp_path / "train.csv").write_text("wide,1,0.5,0.5,1,1,1\ntall,1,0,0,0.5,0.5,2\n")
    config = settings_of(tmp_path)
    task = task_of(config, scenes.open_scenes(str(boxed), "train"))
    source = scenes.open_scenes(str(tmp_path), "train")
    tester = task.tester(config, source, mesh_of(1), "test")
    assert sorted(tester._sizes) == [(32, 64), (64, 32)]
    params = jax.device_get(nnx.to_pure_dict(nnx.state(vm.load(folder / "best"), nnx.Param)))
    assert sorted(tester.run(params).scores) == [0, 1]


def test_starts_from_every_kind_of_weights(tmp_path):
    def saved(name, model):
        vm.save(model, tmp_path / name)
        return model

    config = DetectorConfig(**SHARED, classes=("run", "sit"), head_scale=1.0)
    wanted = [name for name in flat(ActionDetector(config, rngs=nnx.Rngs(1)))]
    decoder = vit.Stack(16, 1, 1, 32)
    pretrained = saved("mae", mae.VideoMAE(mae.VideoMAEConfig(**SHARED, decoder=decoder), rngs=nnx.Rngs(2)))
    classifier = saved(
        "clf",
        heads.VideoClassifier(heads.ClassifierConfig(**SHARED, classes=("run", "sit")), rngs=nnx.Rngs(3)),
    )
    more = DetectorConfig(**SHARED, classes=("sit", "wave", "run"), head_scale=1.0)
    detector = saved("det", ActionDetector(more, rngs=nnx.Rngs(4)))
    for name, model, source in (
        ("mae", pretrained, "encoder/norm/scale"),
        ("clf", classifier, "norm/scale"),
        ("det", detector, "norm/scale"),
    ):
        taken = transfer.read(tmp_path / name, config, wanted)
        theirs, ours = flat(model), flat_of(taken.params)
        np.testing.assert_array_equal(ours["encoder/embed/kernel"], theirs["encoder/embed/kernel"])
        np.testing.assert_array_equal(ours["norm/scale"], theirs[source])
        assert ("head/kernel" in ours) == (name == "det")
    np.testing.assert_array_equal(ours["head/kernel"], flat(detector)["head/kernel"][:, [2, 0]])


def flat(model):
    return flat_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def flat_of(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in found}


def test_the_loss_is_the_sum_over_boxes_of_the_mean_over_actions(boxed):
    task = task_of(settings_of(boxed), scenes.open_scenes(str(boxed), "train"))
    params = task.init(jax.random.key(0))
    params["head"]["kernel"] *= 0
    batch = {
        "video": jnp.zeros((2, 8, 32, 32, 3), jnp.uint8),
        "index": jnp.arange(2, dtype=jnp.uint32),
        "weight": jnp.ones(2),
        "boxes": jnp.broadcast_to(jnp.array([[0.0, 0, 9, 9], [5, 5, 20, 20], [0] * 4, [0] * 4]), (2, 4, 4)),
        "box_weight": jnp.array([[1.0, 1, 0, 0], [1, 0, 0, 0]]),
        "actions": jnp.ones((2, 4, 10)),
    }
    terms = task.terms(params, None, batch, jax.random.key(0), jnp.int32(0), WHOLE)
    assert float(terms.total) == pytest.approx(3 * np.log(2), rel=1e-5)
    assert float(terms.weight) == 2
    assert float(terms.metrics["boxes"]) == 3
    bad = task.terms(
        params, None, batch | {"weight": jnp.array([1.0, 0.0])}, jax.random.key(0), jnp.int32(0), WHOLE
    )
    assert float(bad.total) == pytest.approx(2 * np.log(2), rel=1e-5)


def test_colours_stay_colours(rng):
    clip = jnp.asarray(rng.uniform(size=(2, 4, 4, 3)), jnp.float32)
    np.testing.assert_allclose(shift_hsv(clip, jnp.zeros(3)), clip, atol=1e-6)
    grey = shift_hsv(clip, jnp.array([0.0, -1.0, 0.0]))
    np.testing.assert_allclose(grey, np.broadcast_to(clip.max(-1, keepdims=True), clip.shape), atol=1e-6)
    turned = shift_hsv(jnp.array([[[[1.0, 0.2, 0.2]]]]), jnp.array([1 / 3, 0.0, -0.5]))
    np.testing.assert_allclose(turned[0, 0, 0], [0.1, 0.5, 0.1], atol=1e-6)
    assert float(shift_hsv(clip, jnp.array([0.1, 0.5, 0.5])).max()) <= 1.0


def test_without_a_validation_list_videos_are_held_out(boxed, tmp_path, capsys):
    shutil.copytree(boxed, tmp_path / "data")
    (tmp_path / "data" / "validation.csv").unlink()
    config = settings_of(tmp_path / "data")
    videos = task_of(config).open_videos(config)
    names = [{name.partition(",")[0] for name in part.ids} for part in (videos.train, videos.validation)]
    assert not names[0] & names[1]
    assert len(names[1]) == 2
    assert "no validation.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.path": ""}, "data.path is empty"),
        ({"data.path": "/nowhere"}, "has no train.csv and classes.csv"),
        ({"detect.short": (16, 16)}, "detect.short=16,16 must not be below data.size"),
        ({"data.clips_per_video": 2}, "data.clips_per_video=1"),
        ({"optim.freeze_blocks": 3}, "optim.freeze_blocks=3 of 2 blocks"),
    ],
)
def test_settings_that_are_refused(boxed, tmp_path, change, message):
    config = settings_of(boxed)
    config.update_from_flattened_dict(change)
    with pytest.raises((UserError, SourceError), match=message):
        table.train(config, tmp_path, time.time())


def test_weights_that_cannot_be_tested(trained, boxed, tmp_path):
    config = settings_of(boxed)
    classifier = heads.ClassifierConfig(**SHARED, classes=("a", "b"))
    vm.save(heads.VideoClassifier(classifier, rngs=nnx.Rngs(0)), tmp_path / "clf")
    with pytest.raises(UserError, match="holds no detector"):
        table.evaluate_weights(config, tmp_path / "out", str(tmp_path / "clf"), weights.Hints())
    shutil.copytree(boxed, tmp_path / "data")
    lines = (boxed / "classes.csv").read_text().splitlines()
    (tmp_path / "data" / "classes.csv").write_text("\n".join([*lines, "11,wave"]))
    config.data.path = str(tmp_path / "data")
    with pytest.raises(UserError, match="knows 10 actions"):
        table.evaluate_weights(config, tmp_path / "out", str(trained[0]), weights.Hints())
    with pytest.raises(ValueError, match="its num_heads is 2, not 4"):
        table.evaluate_weights(config, tmp_path / "out", str(trained[0]), weights.Hints(num_heads=4))
    how = {"statistics": "", "mask": "tube", "mask_ratio": 0.5, "start": 0.0, "seed": 0}
    with pytest.raises(UserError, match="holds a detector, which reconstructs nothing"):
        reconstruct.run("x", str(trained[0]), str(tmp_path / "x.gif"), **how, hints=weights.Hints())
    video = str(boxed / "videos" / "test_000000.mp4")
    with pytest.raises(UserError, match="holds a detector, which looks at boxes"):
        predict.run([video], str(trained[0]), "", predict.Options(), print)
    with pytest.raises(ValueError, match="PyTorch layouts have no detector"):
        vm.export_torch(vm.load(trained[0]), tmp_path / "hf")


def test_a_published_detector_is_tested_by_the_numbers_of_its_actions(boxed, tmp_path, monkeypatch):
    """From a file of 80 actions without names, and from our own export of the same weights."""
    shutil.copytree(boxed, tmp_path / "data")
    lines = (boxed / "classes.csv").read_text().splitlines()
    more = [f"{number},action {number}" for number in range(81 - 70, 81)]
    (tmp_path / "data" / "classes.csv").write_text("\n".join([*lines, *more]) + "\n")
    config = settings_of(boxed)
    config.data.path = str(tmp_path / "data")
    config.model.position_resize = "recompute"  # the weights decide
    monkeypatch.setattr(detector, "PUBLISHED_MEAN", SHARED["pixel_mean"])
    monkeypatch.setattr(detector, "PUBLISHED_STD", SHARED["pixel_std"])
    names = scenes.open_scenes(config.data.path, "test").classes
    fields = SHARED | {"classes": names, "position_resize": "interpolate", "head_scale": 1.0}
    model = ActionDetector(DetectorConfig(**fields), rngs=nnx.Rngs(3))
    params = {
        "/".join(key): np.asarray(value)
        for key, value in flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()
    }
    save_file(torch_weights.to_theirs(params, model.config, "official"), tmp_path / "ava.safetensors")
    vm.save(model, tmp_path / "export", {"stride": config.data.stride})
    sizes = weights.Hints(clip_size=SHARED["clip_size"])
    told = {"ava.safetensors": sizes, "export": weights.Hints()}
    found = {
        name: table.evaluate_weights(config, tmp_path / f"out {name}", str(tmp_path / name), hints)
        for name, hints in told.items()
    }
    texts = [(tmp_path / f"out {name}" / "detections.csv").read_text() for name in told]
    assert texts[0] == texts[1]
    assert found["export"]["mAP"] == found["ava.safetensors"]["mAP"]


def test_the_score_of_a_box_weighs_in_the_metric_and_in_the_file(boxed):
    source = scenes.open_scenes(str(boxed), "test").select([0])
    scene = source.scenes[0]
    source = dataclasses.replace(source, scenes=(scene._replace(scores=scene.scores * 0.5),))
    scores = np.full((len(scene.corners), len(source.classes)), 0.8, np.float32)
    found = detections.Found(source, source, {0: scores}, {})
    written = [float(row[-1]) for row in detections.rows_of(found)]
    np.testing.assert_allclose(written, 0.4, atol=1e-5)
    np.testing.assert_allclose(found.boxes.scores, written)


def test_colours_are_shifted_by_as_much_as_published(boxed, rng):
    """10 of 180 for the hue, 26 of 255 for saturation and value, whole numbers."""
    task = task_of(settings_of(boxed))
    clip = jnp.asarray(rng.uniform(size=(2, 4, 4, 3)), jnp.float32)
    for number in range(4):
        key = jax.random.key(number)
        most = jnp.array([10, 26, 26])
        shift = jax.random.randint(key, (3,), -most, most + 1) / jnp.array([180.0, 255.0, 255.0])
        np.testing.assert_allclose(task._recoloured(clip, key), shift_hsv(clip, shift), atol=1e-6)
