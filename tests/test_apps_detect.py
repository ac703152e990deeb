"""The command `detect` on real files and generated ones: boxes of every origin, links, and what is drawn."""

import contextlib
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from flax import nnx
from onnx import TensorProto, helper

import videomae_jax as vm
from videomae_jax.apps import annotate, detect, people
from videomae_jax.apps.detect import Key, Options
from videomae_jax.config import UserError
from videomae_jax.data import decode, moving_scenes, moving_shapes
from videomae_jax.data.sources import SourceError
from videomae_jax.interop import export
from videomae_jax.models import heads, vit
from videomae_jax.models.detector import ActionDetector, DetectorConfig

SHARED = {
    "clip_size": (8, 32, 32),
    "tubelet": (2, 8, 8),
    "pixel_mean": (0.5,) * 3,
    "pixel_std": (0.25,) * 3,
    "encoder": vit.Stack(32, 1, 2, 64),
}


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "export"
    model = ActionDetector(
        DetectorConfig(**SHARED, classes=moving_scenes.ACTIONS, head_scale=1.0), rngs=nnx.Rngs(0)
    )
    export.save(model, path, {"stride": 2, "test_short": 48, "numbers": []})
    return str(path)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "scene.mp4"
    spec = moving_shapes.MovingShapes(size=64, frames=41, videos=8, seed=0)
    frames, _ = moving_scenes.render(spec, np.random.default_rng(0))
    decode.write_video(path, frames[:, :, 1:-1], 16)
    return str(path)


@pytest.mark.parametrize("boxes", ["whole", "csv"])
def test_a_video_with_boxes_and_its_json(detector, video, boxes, tmp_path, capsys):
    if boxes == "csv":
        (tmp_path / "boxes.csv").write_text(
            "scene,0.5,0.1,0.1,0.5,0.5\nscene,0.5,0.5,0.5,0.9,0.9,-1,0.7\nscene.mp4,1.5,0.12,0.1,0.5,0.5\n"
        )
    source = "whole" if boxes == "whole" else str(tmp_path / "boxes.csv")
    out = tmp_path / "out.mp4"
    found = detect.run(video, detector, str(out), Options(boxes=source, least=0.0))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    keys = found["key_frames"]
    assert [key["time"] for key in keys] == [0.5, 1.5]
    tracks = [[box["track"] for box in key["boxes"]] for key in keys]
    assert tracks == ([[0], [0]] if boxes == "whole" else [[0, 1], [0]])
    for box in keys[0]["boxes"]:
        scores = [action["score"] for action in box["actions"]]
        assert scores == sorted(scores, reverse=True)
        assert {action["name"] for action in box["actions"]} <= set(moving_scenes.ACTIONS)
    with decode.Video(video) as before, decode.Video(out) as after:
        assert after.num_frames == before.num_frames == 41
        assert after.fps == pytest.approx(16)
        drawn, plain = after.read([8])[0].astype(int), before.read([8])[0].astype(int)
    assert drawn.shape == (6 * 64, 6 * 62, 3)  # 64 pixels are too few to write on
    plain = plain.repeat(6, axis=0).repeat(6, axis=1)
    assert (np.abs(drawn - plain).max(-1) > 60).mean() > 0.02
    assert f"{len(keys)} key frames" in capsys.readouterr().out
    # Browsers begin to play when the index comes first.
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def key(time, *boxes):
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.full((len(corners), 2), time, np.float32)
    return Key(time, corners, np.ones(len(corners), np.float32), [], scores)


def test_the_same_person_keeps_its_number():
    keys = [
        key(0.0, (0, 0, 0.4, 0.4), (0.5, 0.5, 1, 1)),
        key(1.0, (0.52, 0.5, 1, 1), (0.05, 0, 0.45, 0.4)),
        key(2.0),
        key(3.0, (0.1, 0, 0.5, 0.4)),
    ]
    detect.link(keys)
    assert [k.tracks for k in keys] == [[0, 1], [1, 0], [], [2]]
    detect.smooth(keys)
    np.testing.assert_allclose(keys[0].scores, 0.5)
    np.testing.assert_allclose(keys[3].scores, 3.0)


def test_boxes_are_on_their_way_to_the_next_key_frame():
    keys = [key(0.0, (0, 0, 0.4, 0.4)), key(1.0, (0.2, 0, 0.6, 0.4))]
    detect.link(keys)
    options = Options(top=1, least=0.5)
    corners, texts, tracks = detect.at(keys, 0.25, ("run", "sit"), options)
    np.testing.assert_allclose(corners[0], [0.05, 0, 0.45, 0.4], atol=1e-6)
    assert texts == [""]  # 0.0 is below the least score
    assert tracks == [0]
    corners, texts, _ = detect.at(keys, 0.75, ("run", "sit"), options)
    np.testing.assert_allclose(corners[0], [0.15, 0, 0.55, 0.4], atol=1e-6)
    assert texts == ["run 1.00"]
    np.testing.assert_allclose(detect.at(keys, 9.0, ("a", "b"), options)[0][0], keys[1].corners[0])


def yolo(path, rows, layout):
    """An ONNX file that answers the same boxes to every frame."""
    table = np.array(rows, np.float32)[None]
    table = table.transpose(0, 2, 1) if layout == "v8" else table
    zero = helper.make_node("ReduceSum", ["images"], ["sum"], keepdims=0)
    nothing = helper.make_node("Mul", ["sum", "none"], ["nothing"])
    answer = helper.make_node("Add", ["table", "nothing"], ["output0"])
    graph = helper.make_graph(
        [zero, nothing, answer],
        "yolo",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, table.shape)],
        [
            helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.ravel()),
            helper.make_tensor("none", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


@pytest.mark.parametrize("layout", ["v8", "v5"])
def test_a_detector_of_ones_own(tmp_path, layout):
    """Boxes come back in parts of the frame; low scores and doubles are left out."""
    middle = [(16, 8, 16, 8), (16.5, 8, 16, 8), (40, 24, 8, 16), (50, 8, 8, 8)]
    sure = [(0.9, 0.1), (0.8, 0.1), (0.6, 0.3), (0.1, 0.9)]
    if layout == "v5":
        rows = [(*box, score[0] / 0.95, 0.95, score[1]) for box, score in zip(middle, sure, strict=True)]
        rows += [(0.0,) * 7] * 8
    else:
        rows = [(*box, *score) for box, score in zip(middle, sure, strict=True)] + [(0.0,) * 6] * 8
    yolo(tmp_path / "yolo.onnx", rows, layout)
    find = people.onnx(str(tmp_path / "yolo.onnx"), 0.4)
    corners, scores = find(np.zeros((32, 64, 3), np.uint8))
    np.testing.assert_allclose(corners, [[8 / 64, 4 / 32, 24 / 64, 12 / 32], [36 / 64, 0.5, 44 / 64, 1]])
    np.testing.assert_allclose(scores, [0.9, 0.6], rtol=1e-5)


def test_torchvision_gives_people_in_parts_of_the_frame(monkeypatch):
    """With a stand-in for the library, which is not installed here."""
    found = {
        "boxes": np.array([[0, 0, 32, 16], [1, 0, 32, 16], [32, 16, 64, 32], [0, 0, 9, 9]], np.float32),
        "labels": np.array([1, 1, 1, 2]),
        "scores": np.array([0.9, 0.8, 0.3, 0.99], np.float32),
    }
    seen = []

    class Model:
        def eval(self):
            return self

        def __call__(self, clips):
            seen.append(clips[0])
            return [found]

    class Pixels(np.ndarray):
        def float(self):
            return self.astype(np.float32)

    torch = SimpleNamespace(no_grad=contextlib.nullcontext, from_numpy=lambda x: x.view(Pixels))
    library = SimpleNamespace(fasterrcnn_resnet50_fpn=lambda weights: Model())
    modules = {"torch": torch, "torchvision.models.detection": library}
    monkeypatch.setattr(people.importlib, "import_module", modules.__getitem__)
    corners, scores = people.torchvision(0.4)(np.full((32, 64, 3), 255, np.uint8))
    np.testing.assert_allclose(corners, [[0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(scores, [0.9])
    assert seen[0].shape == (3, 32, 64)
    assert seen[0].max() == 1.0


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (32, 48), (480, 60), (600, 63)])
def test_opencv_looks_at_images_that_are_smaller_than_its_window(size):
    """Where it would read beyond them: in a process of its own, as it crashed."""
    code = (
        "import numpy as np; from videomae_jax.apps import people; "
        f"print(people.opencv()(np.zeros(({size[0]}, {size[1]}, 3), np.uint8))[1].size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_opencv_finds_nobody_in_noise_and_answers_in_parts(rng):
    corners, scores = people.opencv()(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    assert corners.shape == (len(scores), 4)
    assert (corners >= 0).all()
    assert (corners <= 1).all()


@pytest.mark.slow
def test_real_videos(detector, real_videos, tmp_path):
    for name in ("mmaction_demo.mp4", "video_0.mov"):
        found = detect.run(str(real_videos / name), detector, str(tmp_path / "out.mp4"), Options(every=2.0))
        assert len(found["key_frames"]) >= 1


def test_precisions_are_drawn():
    picture = annotate.draw_precisions({"run": 0.5, "sit": None, "wave": 0.0})
    assert picture.height == 2 * 18 + 40


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": "out.avi"}, UserError, "name a .mp4 file"),
        ({"every": 0.0}, UserError, "must be positive"),
        (
            {"boxes": "scene,0.5,0.5,0.1,0.1,0.5\n"},
            SourceError,
            "line 1: the box 0.5,0.1,0.1,0.5 is",
        ),
        (
            {"boxes": "other,0.5,0.1,0.1,0.5,0.5\n"},
            UserError,
            "has no box of scene.mp4 or scene",
        ),
        ({"boxes": "scene,99,0.1,0.1,0.5,0.5\n"}, decode.DecodeError, "has no frame at 99 s"),
        ({"boxes": "onnx:/nowhere.onnx"}, UserError, "onnx:/nowhere.onnx cannot be read"),
        ({"boxes": "peeple"}, UserError, "no such file: use whole, people, torchvision"),
    ],
)
def test_what_is_refused(detector, video, tmp_path, change, error, message):
    options = Options(every=change.get("every", 1.0), boxes=change.get("boxes", "whole"))
    if "," in options.boxes:
        (tmp_path / "boxes.csv").write_text(options.boxes)
        options = Options(boxes=str(tmp_path / "boxes.csv"))
    with pytest.raises(error, match=message):
        detect.run(video, detector, str(tmp_path / change.get("out", "out.mp4")), options)
    assert not (tmp_path / "out.mp4").exists()


def test_other_weights_are_refused(video, tmp_path):
    config = heads.ClassifierConfig(**SHARED, classes=("a", "b"))
    vm.save(heads.VideoClassifier(config, rngs=nnx.Rngs(0)), tmp_path / "clf")
    model = ActionDetector(DetectorConfig(**SHARED, classes=("a", "b")), rngs=nnx.Rngs(0))
    vm.save(model, tmp_path / "bare")
    with pytest.raises(UserError, match="does not tell its stride"):
        detect.run(video, str(tmp_path / "bare"), str(tmp_path / "out.mp4"), Options())
    with pytest.raises(UserError, match="holds no detector"):
        detect.run(video, str(tmp_path / "clf"), str(tmp_path / "out.mp4"), Options())


def test_a_video_without_any_box(detector, video, tmp_path, monkeypatch):
    nobody = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    monkeypatch.setattr(people, "opencv", lambda: lambda frame: nobody)
    with pytest.raises(UserError, match="no box in 2 key frames: pass --boxes=whole"):
        detect.run(video, detector, str(tmp_path / "out.mp4"), Options(boxes="people"))


def test_key_frames_that_a_list_says_are_empty_stay_empty(detector, video, tmp_path):
    box, listed = "0.1,0.1,0.5,0.5", tmp_path / "boxes.csv"
    listed.write_text(f"scene,0.5,{box},1,0.9\nscene,0.5,{box},2,0.01\nscene,1\nscene,1.5,{box},1,0.9\n")
    found = detect.run(video, detector, str(tmp_path / "o.mp4"), Options(boxes=str(listed), least=0.0))
    assert [(key["time"], len(key["boxes"])) for key in found["key_frames"]] == [(0.5, 1), (1.0, 0), (1.5, 1)]
    tracks = [box["track"] for key in found["key_frames"] for box in key["boxes"]]
    assert len(set(tracks)) == 2


def test_what_is_read_is_not_written_over(detector, video, tmp_path):
    copy = tmp_path / "a.mp4"
    copy.write_bytes(pathlib.Path(video).read_bytes())
    with pytest.raises(UserError, match=r"a\.mp4 is what is read: name another file"):
        detect.run(str(copy), detector, str(copy), Options(boxes="whole"))
    assert copy.read_bytes() == pathlib.Path(video).read_bytes()
