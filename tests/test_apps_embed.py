"""Features and classes of real files: windows, memory, kills, failures, and any classifier."""

import csv
import json
import os
import resource
import shutil

import clips
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pyarrow import parquet

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax.apps import embed, predict
from videomae_jax.data import augment, decode, pipeline, prepared, reading
from videomae_jax.evaluation.classification import OutputError, merge_views
from videomae_jax.interop.weights import Hints
from videomae_jax.models import vit

BACKBONE = {
    "clip_size": (4, 32, 32),
    "tubelet": (2, 8, 8),
    "pixel_mean": (0.5,) * 3,
    "pixel_std": (0.2,) * 3,
    "encoder": vit.Stack(16, 2, 2, 32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 17), ("short", 3)):
        clips.write(folder / f"{name}.mp4", rng.integers(0, 256, (count, 40, 56, 3), dtype=np.uint8), g=7)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mae"
    config = vm.VideoMAEConfig(**BACKBONE, decoder=vit.Stack(8, 1, 1, 16))
    vm.save(vm.VideoMAE(config, rngs=nnx.Rngs(0)), path, {"stride": 2})
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "classifier"
    config = vm.ClassifierConfig(**BACKBONE, classes=("jump", "run", "sit"), head_scale=50.0)
    vm.save(vm.VideoClassifier(config, rngs=nnx.Rngs(0)), path, {"stride": 2})
    return str(path)


def test_windows_are_the_frames_that_they_say(folder):
    with decode.Video(str(folder / "a.mp4")) as video:
        found = list(embed.windows(video, 4, 2, 3, (32, 32)))
        assert [start for start, _ in found] == list(range(0, 24, 3))
        for start, clip in found:
            frames = augment.validation_crop(video.read(start + 2 * np.arange(4)), (32, 32))
            np.testing.assert_array_equal(clip, frames)
    with decode.Video(str(folder / "short.mp4")) as video:
        ((start, clip),) = embed.windows(video, 4, 2, 8, (32, 32))
        assert start == 0
        np.testing.assert_array_equal(clip[1:], clip[[1, 1, 1]])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("suffix", embed.SUFFIXES)
def test_features_of_a_folder(folder, backbone, tmp_path, suffix, per_token):
    out = tmp_path / f"features{suffix}"
    summary = embed.run([str(folder)], backbone, str(out), embed.Options(per_token=per_token))
    assert (summary["videos"], summary["videos_failed"], summary["windows"]) == (3, 0, 3 + 2 + 1)
    assert json.loads((tmp_path / f"features{suffix}.json").read_text()) == summary
    if suffix == ".npz":
        with np.load(out) as file:
            rows = {name: file[name] for name in file.files}
    else:
        table = parquet.read_table(out)
        shape = json.loads(table.schema.metadata[b"shape"])
        rows = {name: np.array(table[name].to_pylist()) for name in table.column_names}
        rows["features"] = rows["features"].reshape(-1, *shape).astype(np.float32)
    assert rows["id"].tolist() == ["a.mp4"] * 3 + ["b.mp4"] * 2 + ["short.mp4"]
    np.testing.assert_allclose(rows["start"], [0, 0.8, 1.6, 0, 0.8, 0], atol=1e-6)
    np.testing.assert_allclose(rows["end"], [0.6, 1.4, 2.2, 0.6, 1.4, 0.2], atol=1e-6)
    model = vm.load(backbone)
    with decode.Video(str(folder / "b.mp4")) as video:
        made = [clip for _, clip in embed.windows(video, 4, 2, 8, (32, 32))]
    expected = model.encode(jnp.asarray(np.stack(made)))
    expected = expected if per_token else expected.mean(axis=1)
    np.testing.assert_allclose(rows["features"][3:5], expected, atol=2e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, f"{out.name}.json"])


def test_a_killed_run_goes_on(folder, backbone, tmp_path, monkeypatch):
    plain, opened = embed._embed_video, []

    def dying(video, *args):
        if len(opened) == 2:
            raise KeyboardInterrupt
        opened.append(video.name)
        return plain(video, *args)

    out = tmp_path / "f.npz"
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_embed_video", dying)
        with pytest.raises(KeyboardInterrupt):
            embed.run([str(folder)], backbone, str(out), embed.Options())
    assert not out.exists()
    again = []
    monkeypatch.setattr(
        embed, "_embed_video", lambda video, *args: (again.append(video.name), plain(video, *args))[1]
    )
    embed.run([str(folder)], backbone, str(out), embed.Options())
    assert len(again) == 1
    embed.run([str(folder)], backbone, str(tmp_path / "whole.npz"), embed.Options())
    with np.load(out) as one, np.load(tmp_path / "whole.npz") as other:
        assert all((one[name] == other[name]).all() for name in other.files)


def test_memory_does_not_grow_with_the_length(folder, untyped):
    """At most a window of small frames is held, whatever the length of the video."""
    held = []
    plain = reading.open_video(str(folder / "a.mp4"))

    class Counted:
        num_frames = 30

        def each(self, indices):
            for frame in plain.each(indices):
                held.append(frame)
                yield frame

    windows = embed.windows(Counted(), 4, 2, 1, (16, 16))
    for start, _ in windows:
        assert len(held) == start + 7  # of one pass, no frame is decoded before it is needed
    plain.__exit__(None, None, None)
    assert len(held) == 30


def test_videos_that_cannot_be_decoded_are_named(folder, backbone, tmp_path, capsys):
    copy = tmp_path / "videos"
    copy.mkdir()
    (copy / "b.mp4").write_bytes((folder / "b.mp4").read_bytes())
    (copy / "broken.mp4").write_bytes(b"nothing")
    summary = embed.run([str(copy)], backbone, str(tmp_path / "f.npz"), embed.Options())
    assert (summary["videos"], summary["videos_failed"]) == (1, 1)
    assert "broken.mp4" in summary["failed"]
    assert "broken.mp4" in capsys.readouterr().out
    (copy / "b.mp4").unlink()
    with pytest.raises(settings.UserError, match="none of the 1 videos"):
        embed.run([str(copy)], backbone, str(tmp_path / "g.npz"), embed.Options())
    assert not list(tmp_path.glob("*.parts"))


def test_one_file_and_wrong_uses(folder, backbone, tmp_path):
    summary = embed.run(
        [str(folder / "a.mp4")],
        backbone,
        str(tmp_path / "f.npz"),
        embed.Options(step=4, hints=Hints(stride=1)),
    )
    assert summary["windows"] == 7
    with pytest.raises(settings.UserError, match=r"unknown suffix: use \.npz, \.parquet"):
        embed.run([str(folder)], backbone, str(tmp_path / "f.csv"), embed.Options())
    with pytest.raises(settings.UserError, match="must not be negative"):
        embed.run([str(folder)], backbone, str(tmp_path / "f.npz"), embed.Options(step=-1))


def test_predict(folder, classifier, backbone, tmp_path):
    out, said = tmp_path / "predictions.json", []
    found = predict.run([str(folder)], classifier, str(out), predict.Options(top=2, segments=2), said.append)
    assert said == found
    assert json.loads(out.read_text()) == [{k: row[k] for k in row if k != "identity"} for row in found]
    assert [row["id"] for row in found] == ["a.mp4", "b.mp4", "short.mp4"]
    model = vm.load(classifier)
    source = prepared.open_source(str(folder), "train")
    views = pipeline.TestViews(4, 2, (32, 32), 2, 3).map((0, source[0]))["video"]
    scores = merge_views(np.asarray(model(jnp.asarray(views)))[None], "softmax")[0]
    best = int(scores.argmax())
    assert found[0]["classes"][0]["name"] == model.config.classes[best]
    np.testing.assert_allclose(found[0]["classes"][0]["score"], scores[best], rtol=1e-4)
    assert len(found[0]["classes"]) == 2
    listed = tmp_path / "list.csv"  # of labels that nobody asks for
    listed.write_text(f"path,label\n{folder}/a.mp4,run;jump\n")
    assert [row["id"] for row in predict.run([str(listed)], classifier, "", predict.Options(), print)] == [
        f"{folder}/a.mp4"
    ]
    with pytest.raises(settings.UserError, match=r"list\.csv is what is read: name another file"):
        predict.run([str(listed)], classifier, str(listed), predict.Options(), print)
    with pytest.raises(settings.UserError, match="holds a pretraining model, which has no classes"):
        predict.run([str(folder)], backbone, "", predict.Options(), print)
    with pytest.raises(settings.UserError, match="must be positive"):
        predict.run([str(folder)], classifier, "", predict.Options(top=0), print)
    assert jax.device_count() == 8


def rows_of(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_parts_belong_to_files_weights_and_options(folder, backbone, tmp_path, monkeypatch):
    """A killed run of other weights, or of a file that has changed since, gives nothing to the next one."""
    videos, out = tmp_path / "videos", tmp_path / "f.npz"
    shutil.copytree(folder, videos)
    weights = tmp_path / "weights"
    shutil.copytree(backbone, weights)
    plain, calls = embed._embed_video, []

    def dying(video, *args):
        if video.name == "short.mp4":
            raise KeyboardInterrupt
        calls.append(video.name)
        return plain(video, *args)

    def killed():
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(embed, "_embed_video", dying)
            with pytest.raises(KeyboardInterrupt):
                embed.run([str(videos)], str(weights), str(out), embed.Options())
        return calls[:]

    assert killed() == ["a.mp4", "b.mp4"]
    assert killed() == []  # both are there
    shutil.copy(videos / "a.mp4", videos / "b.mp4")
    assert killed() == ["b.mp4"]
    noise = np.random.default_rng(1).integers(0, 256, (30, 40, 56, 3), dtype=np.uint8)
    clips.write(videos / "a.mp4", noise, g=7)
    assert killed() == ["a.mp4"]  # the same name, another file
    shutil.rmtree(weights)
    config = vm.load(backbone).config
    vm.save(vm.VideoMAE(config, rngs=nnx.Rngs(1)), weights, {"stride": 2})
    assert killed() == ["a.mp4", "b.mp4"]
    embed.run([str(videos)], str(weights), str(out), embed.Options())
    embed.run([str(videos)], str(weights), str(tmp_path / "whole.npz"), embed.Options())
    ours, whole = rows_of(out), rows_of(tmp_path / "whole.npz")
    assert all((ours[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize("name", ["a.avi", "a.ts", "a.mkv"])
def test_a_video_is_decoded_once(tmp_path, name, rng, monkeypatch):
    """Also one without times, or with a single key frame: not from the beginning for every window."""
    frames = rng.integers(0, 256, (90, 32, 32, 3), dtype=np.uint8)
    path = clips.write(tmp_path / name, frames, codec="mpeg4", g=300, bf=2)
    decoded, plain = [], decode.Video._decode

    def counted(self, *args):
        for frame in plain(self, *args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode.Video, "_decode", counted)
    with decode.Video(path) as video:
        counting = len(decoded)
        found = [clip for _, clip in embed.windows(video, 4, 2, 3, (32, 32))]
        assert len(decoded) - counting <= 130  # some B-frames again before each key frame
        np.testing.assert_array_equal(found[20], video.read([60, 62, 64, 66]))


def test_more_videos_than_files_may_be_open(backbone, folder, tmp_path, monkeypatch):
    """A hundred parts are joined one after the other."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(100):
        (videos / f"{i:03}.mp4").symlink_to(folder / "short.mp4")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    plain = embed._join

    def join(*args):
        there = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (there + 20, limits[1]))
        try:
            return plain(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    monkeypatch.setattr(embed, "_join", join)
    for suffix in embed.SUFFIXES:
        out = tmp_path / f"f{suffix}"
        assert embed.run([str(videos)], backbone, str(out), embed.Options())["windows"] == 100


def test_outputs_that_are_not_finite_name_the_video(folder, tmp_path):
    config = vm.ClassifierConfig(**BACKBONE, classes=("jump", "run"), head_scale=np.inf)
    vm.save(vm.VideoClassifier(config, rngs=nnx.Rngs(0)), tmp_path / "bad", {"stride": 2})
    with pytest.raises(OutputError, match=r"bad: the outputs for 1 of 1 videos .* the first is a\.mp4"):
        predict.run([str(folder)], str(tmp_path / "bad"), "", predict.Options(), print)
    model = vm.VideoMAE(vm.VideoMAEConfig(**BACKBONE, decoder=None), rngs=nnx.Rngs(0))
    model.encoder.norm.scale[...] = jnp.full(16, jnp.nan)
    vm.save(model, tmp_path / "worse", {"stride": 2})
    with pytest.raises(OutputError, match=r"the first is a\.mp4"):
        embed.run([str(folder)], str(tmp_path / "worse"), str(tmp_path / "f.npz"), embed.Options())


@pytest.mark.parametrize("suffix", predict.SUFFIXES)
def test_predictions_are_said_at_once_and_go_on_when_killed(folder, classifier, tmp_path, suffix):
    out, said = tmp_path / "new" / f"p{suffix}", []

    def dying(row):
        said.append(row["id"])
        if len(said) == 2:
            raise KeyboardInterrupt

    paths = [str(folder / "a.mp4"), str(folder / "b.mp4"), str(folder / "short.mp4")]
    options = predict.Options(segments=1, crops=1)
    with pytest.raises(KeyboardInterrupt):
        predict.run(paths, classifier, str(out), options, dying)
    assert not out.exists()
    again = []
    found = predict.run(paths, classifier, str(out), options, lambda row: again.append(row["id"]))
    assert again == paths[2:]
    assert [row["id"] for row in found] == paths
    assert list(out.parent.iterdir()) == [out]
    if suffix == ".csv":
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert [row["class 1"] for row in rows] == [row["classes"][0]["name"] for row in found]
    elif suffix == ".parquet":
        assert parquet.read_table(out)["classes"].to_pylist() == [row["classes"] for row in found]


def test_predictions_of_other_weights_are_made_again(folder, classifier, tmp_path):
    """Where a run is cut off and its checkpoint then overwritten."""
    weights, paths = tmp_path / "weights", [str(folder / "a.mp4"), str(folder / "b.mp4")]
    model = vm.load(classifier)
    vm.save(model, weights, {"stride": 1})
    options, out = predict.Options(segments=1, crops=1), str(tmp_path / "p.csv")

    def dying(_row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict.run(paths, str(weights), out, options, dying)
    shutil.rmtree(weights)
    model.head.kernel[...] = -model.head.kernel[...]
    vm.save(model, weights, {"stride": 1})
    said = []
    predict.run(paths, str(weights), out, options, lambda row: said.append(row["id"]))
    assert said == paths


def test_divided_folders_are_taken_whole_or_in_part(folder, classifier, backbone, tmp_path):
    for part, name in (("train", "a"), ("val", "b")):
        (tmp_path / part).mkdir()
        shutil.copy(folder / f"{name}.mp4", tmp_path / part / "v.mp4")
    options = {"segments": 1, "crops": 1}
    found = predict.run([str(tmp_path)], classifier, "", predict.Options(**options), lambda row: None)
    assert [row["id"] for row in found] == ["train/v.mp4", "validation/v.mp4"]
    one = predict.Options(**options, split="validation")
    assert [row["id"] for row in predict.run([str(tmp_path)], classifier, "", one, lambda row: None)] == [
        "v.mp4"
    ]
    out = tmp_path / "out" / "f.npz"
    assert embed.run([str(tmp_path)], backbone, str(out), embed.Options())["videos"] == 2
    for split, text in (
        ("test", "has no part test: it has train, validation"),
        ("x", "--split=x is unknown"),
    ):
        with pytest.raises(settings.UserError, match=text):
            embed.run([str(tmp_path)], backbone, str(out), embed.Options(split=split))
    with pytest.raises(settings.UserError, match="is not divided: leave --split=train out"):
        embed.run([str(folder)], backbone, str(out), embed.Options(split="train"))


def test_what_cannot_be_written_is_refused_before_any_work(
    folder, backbone, classifier, tmp_path, monkeypatch
):
    monkeypatch.setattr(embed.weights, "read", None)
    (tmp_path / "file").write_text("x")
    text, out = r"--out=.* cannot be written", tmp_path / "file"
    with pytest.raises(settings.UserError, match=text):
        embed.run([str(folder)], backbone, str(out / "f.npz"), embed.Options())
    with pytest.raises(settings.UserError, match=text):
        predict.run([str(folder)], classifier, str(out / "p.json"), predict.Options(), print)
    with pytest.raises(settings.UserError, match=r"unknown suffix: use \.json, \.csv, \.parquet"):
        predict.run([str(folder)], classifier, str(tmp_path / "p.txt"), predict.Options(), print)


def test_a_table_has_as_many_columns_for_a_video_that_failed(folder, classifier, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    out = tmp_path / "p.csv"
    options = predict.Options(segments=1, crops=1, top=2)
    predict.run([str(tmp_path / "bad.mp4"), str(folder / "a.mp4")], classifier, str(out), options, print)
    rows = list(csv.reader(out.read_text().splitlines()))
    assert [len(row) for row in rows] == [6, 6, 6]
    assert "cannot be opened" in rows[1][1]
