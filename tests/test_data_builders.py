"""Known data sets on miniature folders in their official layouts, prepared and opened by TFDS."""

import csv
import json
import pathlib

import clips
import numpy as np
import pytest
import tensorflow_datasets as tfds

from videomae_jax.apps import prepare as command
from videomae_jax.data import detection_clips, reading, scenes, sources, transcode
from videomae_jax.data.builders import BUILDERS


def video(path: pathlib.Path, seconds: float = 0.5, codec: str = "libx264") -> None:
    clips.write(path, clips.numbered_frames(round(seconds * 10)), codec=codec)


def table(path: pathlib.Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def kinetics(root: pathlib.Path, classes: int) -> None:
    header = ["label", "youtube_id", "time_start", "time_end", "split"]
    names = [f"class {i:03d}" for i in reversed(range(classes))]
    rows = [[name, f"id-{i:07d}", i, i + 10, "train"] for i, name in enumerate(names)]
    table(root / "annotations" / "train.csv", [header, *rows])
    table(root / "annotations" / "validate.csv", [header, ["class 007", "validation0", "5", "15", "val"]])
    for i in (0, 1):
        video(root / "videos" / "train" / names[i] / f"id-{i:07d}_{i:06d}_{i + 10:06d}.mp4")
    video(root / "videos" / "val" / "validation0.mp4")


def ssv2(root: pathlib.Path) -> None:
    folder = root / "annotations"
    folder.mkdir()
    labels = {f"Doing {i} with something": str(173 - i) for i in range(174)}
    (folder / "labels.json").write_text(json.dumps(labels))
    row = {"id": "12", "label": "doing 3 with a cup", "template": "Doing 3 with [something]"}
    (folder / "train.json").write_text(json.dumps([row]))
    (folder / "validation.json").write_text(json.dumps([row | {"id": "7"}]))
    (folder / "test.json").write_text(json.dumps([{"id": "9"}]))
    for name in ("12", "7", "9"):
        video(root / "videos" / f"{name}.webm", codec="libvpx-vp9")


def ucf101(root: pathlib.Path) -> None:
    folder = root / "annotations" / "ucfTrainTestlist"
    folder.mkdir(parents=True)
    classes = [f"Class{i:03d}" for i in range(101)]
    (folder / "classInd.txt").write_text("".join(f"{i + 1} {name}\r\n" for i, name in enumerate(classes)))
    for number in (1, 2, 3):
        path = f"Class005/v_Class005_g0{number}_c01.avi"
        (folder / f"trainlist0{number}.txt").write_text(f"{path} 6\n")
        (folder / f"testlist0{number}.txt").write_text(f"Class100/v_Class100_g0{number}_c01.avi\n")
        video(root / "videos" / path, codec="mpeg4")
        video(root / "videos" / "Class100" / f"v_Class100_g0{number}_c01.avi", codec="mpeg4")


def hmdb51(root: pathlib.Path) -> None:
    folder = root / "annotations" / "testTrainMulti_7030_splits"
    folder.mkdir(parents=True)
    for label in range(51):
        lines = "".join(f"clip_{label}_{i}.avi {i} \n" for i in (0, 1, 2)) if label < 2 else ""
        for number in (1, 2, 3):
            (folder / f"act{label:02d}_test_split{number}.txt").write_text(lines)
    for label in (0, 1):
        for i in (0, 1, 2):
            video(root / "videos" / f"act{label:02d}" / f"clip_{label}_{i}.avi", codec="mpeg4")


def ava(root: pathlib.Path) -> None:
    folder = root / "annotations"
    folder.mkdir()
    items = "".join(f'label {{\n  name: "act {i}"\n  label_id: {i}\n}}\n' for i in range(1, 81))
    (folder / "ava_action_list_v2.2.pbtxt").write_text(items)
    box, other = ("0.1", "0.2", "0.5", "0.9"), ("0.6", "0.1", "0.8", "0.7")
    rows = [
        ("m1", "0004", *box, "12", "0"),
        ("m1", "0004", *box, "80", "0"),
        ("m1", "0004", *other, "1", "7"),
    ]
    rows += [("m1", "0005", *box, "3", "0"), ("m1", "0006", "", "", "", "", "", "")]
    table(folder / "ava_train_v2.2.csv", rows)
    table(folder / "ava_val_v2.2.csv", [("m2", "0003", *box, "5", "2")])
    table(folder / "ava_train_excluded_timestamps_v2.2.csv", [("m1", "5")])  # without the zeros
    table(folder / "ava_val_excluded_timestamps_v2.2.csv", [])
    for name in ("m1", "m2"):
        frames = np.repeat(clips.numbered_frames(20, 32, 48), 4, axis=0)  # 8 seconds of 10 frames
        clips.write(root / "videos" / f"{name}.mkv", frames)


def ava_kinetics(root: pathlib.Path) -> None:
    ava(root)
    folder, box = root / "annotations", ("0.1", "0.2", "0.5", "0.9")
    rows = [("abcdefghi_k", "12.5", *box, "7", "0"), ("abcdefghi_k", "12.5", *box, "9", "0")]
    table(folder / "kinetics_train_v1.0.csv", rows)
    table(folder / "kinetics_val_v1.0.csv", [("abcdefghi_k", "10.5", *box, "7"), ("abcdefghi_k", "11.5")])
    video(root / "videos" / "kinetics" / "abcdefghi_k_000010_000020.mkv", seconds=5)


MAKE = {
    "kinetics400": lambda root: kinetics(root, 400),
    "kinetics600": lambda root: kinetics(root, 600),
    "kinetics700": lambda root: kinetics(root, 700),
    "ssv2": ssv2,
    **{f"ucf101_{i}": ucf101 for i in (1, 2, 3)},
    **{f"hmdb51_{i}": hmdb51 for i in (1, 2, 3)},
    "ava": ava,
    "ava_kinetics": ava_kinetics,
}
# name -> split -> [(id, label)]
EXPECTED = {
    **{
        f"kinetics{n}": {
            "train": [("id-0000000_000000_000010", n - 1), ("id-0000001_000001_000011", n - 2)],
            "validation": [("validation0_000005_000015", 7)],
        }
        for n in (400, 600, 700)
    },
    "ssv2": {"train": [("12", 170)], "validation": [("7", 170)], "test": [("9", -1)]},
    **{
        f"ucf101_{i}": {
            "train": [(f"Class005/v_Class005_g0{i}_c01", 5)],
            "test": [(f"Class100/v_Class100_g0{i}_c01", 100)],
        }
        for i in (1, 2, 3)
    },
    **{
        f"hmdb51_{i}": {
            "train": [("act00/clip_0_1", 0), ("act01/clip_1_1", 1)],
            "test": [("act00/clip_0_2", 0), ("act01/clip_1_2", 1)],
        }
        for i in (1, 2, 3)
    },
    "ava": {"train": [("m1/4", -1), ("m1/6", -1)], "validation": [("m2/3", -1)]},
    "ava_kinetics": {
        "train": [("m1/4", -1), ("m1/6", -1), ("abcdefghi_k_000010_000020/2.5", -1)],
        "validation": [
            ("m2/3", -1),
            ("abcdefghi_k_000010_000020/0.5", -1),
            ("abcdefghi_k_000010_000020/1.5", -1),
        ],
    },
}


def prepare(name: str, root: pathlib.Path, **options) -> pathlib.Path:
    folder = root / "out"
    given = {"dataset": name, "videos": str(root / "videos"), "processes": 1, **options}
    command.run(str(root / "annotations"), str(folder), command.Options(**given))
    return folder


def test_every_builder_is_tested():
    assert set(MAKE) == set(BUILDERS) - {"boxes"}  # which test_data_scenes has


@pytest.mark.parametrize("name", MAKE)
def test_official_layout(name, tmp_path):
    MAKE[name](tmp_path)
    folder = prepare(name, tmp_path, allow_missing=name.startswith("kinetics"))
    builder = tfds.builder_from_directory(folder)
    assert builder.name == name
    found = {}
    for split in builder.info.splits:
        rows = builder.as_data_source(split)
        found[split] = [(rows[i]["id"].decode(), int(rows[i]["label"])) for i in range(len(rows))]
        with reading.open_video(rows[0]["video"]) as stored:
            assert stored.num_frames == rows[0]["frames"] > 0
    assert found == EXPECTED[name]
    assert builder.info.features["label"].num_classes in (51, 80, 101, 174, 400, 600, 700)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["absent"]) == (int(name[-3:]) - 2 if name.startswith("kinetics") else 0)


def test_labels_have_the_official_numbers(tmp_path):
    ssv2(tmp_path)
    names = tfds.builder_from_directory(prepare("ssv2", tmp_path)).info.features["label"].names
    assert names[173] == "Doing 0 with something"


def test_ava_keeps_boxes_and_cuts_clips(tmp_path):
    ava(tmp_path)
    rows = tfds.builder_from_directory(prepare("ava", tmp_path)).as_data_source("train")
    first, empty = rows[0], rows[1]
    np.testing.assert_allclose(first["boxes"], [[0.1, 0.2, 0.5, 0.9], [0.6, 0.1, 0.8, 0.7]], rtol=1e-6)
    assert [np.flatnonzero(row).tolist() for row in first["actions"]] == [[11, 79], [0]]
    assert first["persons"].tolist() == [0, 7]
    train = scenes.open_scenes(str(tmp_path / "out"), "train")
    assert train.ids == ("m1,4000",)  # the other key frame has nobody in it
    assert train.scenes[0].actions == ((11, 79), (0,))
    assert detection_clips.KeyView(4, 2, (32, 48), 2, 80).map((0, train[0]))["weight"] == 1
    assert (first["timestamp"], first["frames"]) == (4.0, 30)
    # Seconds 2.5 to 5.5: frames 25 to 54, each number shown four times.
    with reading.open_video(first["video"]) as stored:
        assert clips.frame_numbers(stored.read([0, 14, 29])) == [25 // 4, 39 // 4, 54 // 4]
    assert empty["boxes"].shape == (0, 4)
    assert empty["actions"].shape == (0, 80)


@pytest.mark.parametrize(
    ("made", "asked", "text"),
    [
        ("kinetics400", "kinetics600", "has 400 classes, not the 600 of Kinetics-600"),
        ("ssv2", "kinetics400", "holds no train list (train.csv or kinetics_train.csv)"),
        ("ucf101_1", "ssv2", "holds no labels file"),
        ("hmdb51_1", "ucf101_1", "holds no list of classes (classInd.txt)"),
        ("ucf101_1", "hmdb51_1", "has 0 lists *_test_split1.txt, not the 51 of HMDB51"),
        ("kinetics400", "ava", "holds no action list"),
    ],
)
def test_annotations_of_another_data_set(tmp_path, made, asked, text):
    MAKE[made](tmp_path)
    with pytest.raises(sources.SourceError) as error:
        prepare(asked, tmp_path)
    assert text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_absent_videos_are_counted_and_named(tmp_path):
    kinetics(tmp_path, 400)
    with pytest.raises(sources.SourceError, match="398 of 401 videos are absent, the first is id-0000002_"):
        prepare("kinetics400", tmp_path)


def test_unknown_labels_and_doubled_names(tmp_path):
    ssv2(tmp_path)
    file = tmp_path / "annotations" / "validation.json"
    file.write_text(json.dumps([{"id": "7", "template": "Dancing"}]))
    with pytest.raises(sources.SourceError, match="video 7 has the label 'Dancing'"):
        prepare("ssv2", tmp_path)
    file.write_text("{")
    with pytest.raises(sources.SourceError, match=r"validation\.json is no JSON"):
        prepare("ssv2", tmp_path)
    file.write_text("[]")
    video(tmp_path / "videos" / "other" / "13.mp4")  # in nobody's way
    video(tmp_path / "videos" / "other" / "again" / "13.mp4")
    prepare("ssv2", tmp_path)
    video(tmp_path / "videos" / "other" / "12.mp4")
    with pytest.raises(sources.SourceError, match="have the same name: keep one"):
        prepare("ssv2", tmp_path)
    with pytest.raises(sources.SourceError, match="is no folder of videos"):
        prepare("ssv2", tmp_path, videos=str(tmp_path / "nowhere"))


def test_a_movie_is_opened_and_hashed_once_for_its_parts(tmp_path, monkeypatch):
    ava(tmp_path)
    opened = []
    real = reading.open_video
    monkeypatch.setattr(reading, "open_video", lambda path, *name: opened.append(path) or real(path, *name))
    movie, form = str(tmp_path / "videos" / "m1.mkv"), transcode.Form("h264_intra", 32)
    parts = [transcode.transcode(movie, form, start, start + 3.0) for start in (0.0, 4.0, 2.0, 0.0)]
    assert opened == [movie]
    assert parts[0] == parts[3]
    assert len({part.source_sha256 for part in parts}) == 1
    whole = transcode.transcode(movie, form)
    assert whole.source_sha256 == parts[0].source_sha256
    clips.write(tmp_path / "videos" / "m1.mkv", clips.numbered_frames(70, 32, 48))  # another file now
    assert transcode.transcode(movie, form, 0.0, 3.0).source_sha256 != parts[0].source_sha256
