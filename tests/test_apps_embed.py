"""Features and classes of real files: windows, memory, kills, failures, and any classifier."""

import json

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
from videomae_jax.data import augment, decode, pipeline, reading
from videomae_jax.evaluation.classification import merge_views
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
    summary = embed.run(str(folder), backbone, str(out), embed.Options(per_token=per_token))
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
            embed.run(str(folder), backbone, str(out), embed.Options())
    assert not out.exists()
    again = []
    monkeypatch.setattr(
        embed, "_embed_video", lambda video, *args: (again.append(video.name), plain(video, *args))[1]
    )
    embed.run(str(folder), backbone, str(out), embed.Options())
    assert len(again) == 1
    embed.run(str(folder), backbone, str(tmp_path / "whole.npz"), embed.Options())
    with np.load(out) as one, np.load(tmp_path / "whole.npz") as other:
        assert all((one[name] == other[name]).all() for name in other.files)


def test_memory_does_not_grow_with_the_length(folder, untyped):
    """At most a window of small frames is held, whatever the length of the video."""
    held = []
    plain = reading.open_video(str(folder / "a.mp4"))

    class Counted:
        num_frames = 30

        def read(self, indices):
            held.append(len(indices))
            return plain.read(indices)

    list(embed.windows(Counted(), 4, 2, 1, (16, 16)))
    plain.__exit__(None, None, None)
    assert max(held) <= 4
    assert sum(held) <= 30


def test_videos_that_cannot_be_decoded_are_named(folder, backbone, tmp_path, capsys):
    copy = tmp_path / "videos"
    copy.mkdir()
    (copy / "b.mp4").write_bytes((folder / "b.mp4").read_bytes())
    (copy / "broken.mp4").write_bytes(b"nothing")
    summary = embed.run(str(copy), backbone, str(tmp_path / "f.npz"), embed.Options())
    assert (summary["videos"], summary["videos_failed"]) == (1, 1)
    assert "broken.mp4" in summary["failed"]
    assert "broken.mp4" in capsys.readouterr().out
    (copy / "b.mp4").unlink()
    with pytest.raises(settings.UserError, match="none of the 1 videos"):
        embed.run(str(copy), backbone, str(tmp_path / "g.npz"), embed.Options())
    assert not list(tmp_path.glob("*.parts"))


def test_one_file_and_wrong_uses(folder, backbone, tmp_path):
    summary = embed.run(
        str(folder / "a.mp4"), backbone, str(tmp_path / "f.npz"), embed.Options(stride=1, step=4)
    )
    assert summary["windows"] == 7
    with pytest.raises(settings.UserError, match=r"unknown suffix: use \.npz, \.parquet"):
        embed.run(str(folder), backbone, str(tmp_path / "f.csv"), embed.Options())
    with pytest.raises(settings.UserError, match="must not be negative"):
        embed.run(str(folder), backbone, str(tmp_path / "f.npz"), embed.Options(step=-1))


def test_predict(folder, classifier, backbone, tmp_path):
    out = tmp_path / "predictions.json"
    found = predict.run(str(folder), classifier, top=2, segments=2, crops=3, out=str(out))
    assert json.loads(out.read_text()) == found
    assert [row["id"] for row in found] == ["a.mp4", "b.mp4", "short.mp4"]
    model = vm.load(classifier)
    source = embed.open_videos(str(folder))
    views = pipeline.TestViews(4, 2, (32, 32), 2, 3).map((0, source[0]))["video"]
    scores = merge_views(np.asarray(model(jnp.asarray(views)))[None], "softmax")[0]
    best = int(scores.argmax())
    assert found[0]["classes"][0]["name"] == model.config.classes[best]
    np.testing.assert_allclose(found[0]["classes"][0]["score"], scores[best], rtol=1e-4)
    assert len(found[0]["classes"]) == 2
    with pytest.raises(settings.UserError, match="holds a pretraining model, which has no classes"):
        predict.run(str(folder), backbone, top=2, segments=1, crops=1, out="")
    with pytest.raises(settings.UserError, match="must be positive"):
        predict.run(str(folder), classifier, top=0, segments=1, crops=1, out="")
    assert jax.device_count() == 8
