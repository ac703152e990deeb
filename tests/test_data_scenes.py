"""Boxes of key frames: their arithmetic as published, files of one's own, generated ones, and clips."""

import fractions
import json
import os
import pathlib
import pickle
import shutil

import clips
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videomae_jax.apps import prepare
from videomae_jax.data import (
    boxes,
    decode,
    detection_clips,
    moving_scenes,
    moving_shapes,
    pipeline,
    prepared,
    proposals,
    reading,
    sampling,
    scenes,
)
from videomae_jax.data.sources import SourceError

SPEC = moving_shapes.MovingShapes(size=48, frames=24, videos=16, seed=0)


def test_pixels_include_the_last_one():
    corners = np.array([[0.25, 0.5, 1.0, 1.0], [0.0, 0.0, 0.004, 1.0]], np.float32)
    pixels = proposals.to_pixels(corners, 100, 200)
    np.testing.assert_allclose(pixels[0], [50, 50, 199, 99])
    assert proposals.has_area(pixels).tolist() == [True, False]  # less than a pixel wide
    np.testing.assert_allclose(proposals.to_parts(pixels, 100, 200)[0], corners[0])


def test_flip_and_crop_as_published():
    box = np.array([[10, 20, 49, 99]], np.float32)
    np.testing.assert_array_equal(proposals.flipped(box, 224), [[174, 20, 213, 99]])  # W - right - 1
    np.testing.assert_array_equal(proposals.flipped(proposals.flipped(box, 224), 224), box)
    np.testing.assert_array_equal(proposals.cropped(box, 30, 0, 60, 40), [[10, 0, 40, 60]])
    assert not proposals.has_area(proposals.cropped(box, 0, 60, 224, 100)).any()


def test_a_resized_frame_and_its_boxes_as_published(rng):
    """OpenCV's bilinear without anti-aliasing; the last pixel is counted before, and its place scaled."""
    frames = rng.integers(0, 256, (2, 360, 640, 3), dtype=np.uint8)
    corners = np.array([[0.25, 0.5, 1.0, 0.75]], np.float32)
    made, boxes = detection_clips.shortened(frames, corners, 256)
    assert made.shape == (2, 256, 455, 3)
    for frame, found in zip(frames, made, strict=True):
        plain = cv2.resize(frame, (455, 256), interpolation=cv2.INTER_LINEAR)
        assert np.abs(found.astype(int) - plain).max() <= 1
    scale = 455 / 640
    np.testing.assert_allclose(boxes[0, [0, 2]], [160 * scale, 639 * scale], rtol=1e-6)
    np.testing.assert_allclose(boxes[0, [1, 3]], [180 * 256 / 360, 269 * 256 / 360], rtol=1e-6)


def test_enlarged_by_a_tenth_and_a_twentieth():
    box = np.array([[50, 50, 149, 149], [0, 0, 99, 223]], np.float32)
    found = proposals.enlarged(box, 224, 224)
    np.testing.assert_allclose(found[0], [45, 47.5, 154, 151.5])
    np.testing.assert_allclose(found[1], [0, 0, 104, 223])


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_jitter_keeps_its_bounds(seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 200, (20, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 23, (20, 2))], axis=1).astype(np.float32)
    found = proposals.jittered(boxes, 224, 224, rng)
    wide, high = (boxes[:, 2:] - boxes[:, :2] + 1).T
    inner, moved = np.float32(1e-3), found - boxes
    assert proposals.has_area(found).all()
    assert (found >= 0).all()
    assert (found <= 223).all()
    assert (moved[:, 0] >= -0.2 * wide - inner).all()
    assert (moved[:, 1] >= -0.1 * high - inner).all()
    assert (moved[:, 0] <= 0.1 * wide + inner).all()
    assert (moved[:, 1] <= 0.05 * high + inner).all()
    assert (moved[:, 2] <= 0.2 * wide + inner).all()
    assert (moved[:, 3] <= 0.1 * high + inner).all()


def test_clips_around_the_key_as_published():
    """64 frames, of which every fourth from the second: the key is the first of their right half."""
    whole = sampling.key_clip(2000, 1000, 16, 4)
    np.testing.assert_array_equal(whole, 1000 - 32 + 1 + 4 * np.arange(16))
    start = sampling.key_clip(2000, 5, 16, 4)
    assert start.min() == 0
    assert (np.diff(start) >= 0).all()
    np.testing.assert_array_equal(start[9:], whole[9:] - 995)
    assert sampling.key_clip(2000, 1999, 16, 4).max() == 1999


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return moving_scenes.generate(SPEC, tmp_path_factory.mktemp("scenes"), processes=1)


def test_generated_boxes_move_as_their_actions_say(folder):
    train = scenes.open_scenes(str(folder), "train")
    assert len(train) == 3 * SPEC.videos
    assert train.classes == moving_scenes.ACTIONS
    by_video = {}
    for name, scene in zip(train.ids, train.scenes, strict=True):
        by_video.setdefault(name.rpartition(",")[0], []).append(scene)
    seen = set()
    for first, middle, last in by_video.values():
        assert first.time < middle.time < last.time
        assert len({actions[0] for actions in middle.actions}) == len(middle.actions) >= 1
        for before, after, actions in zip(first.corners, last.corners, middle.actions, strict=True):
            down, right = moving_shapes.DIRECTIONS[train.classes[actions[0]]]
            if min(before.min(), after.min()) > 0 and max(before.max(), after.max()) < 1:
                moved = (after[:2] + after[2:] - before[:2] - before[2:]) / 2
                np.testing.assert_array_equal(np.sign(moved.round(2)), [right, down])
                seen.add(actions[0])
    assert len(seen) == 8


def test_generated_videos_show_their_boxes(folder):
    """In its box a shape differs from the muted background around it."""
    test = scenes.open_scenes(str(folder), "test")
    record = test[1]
    with reading.open_video(record["video"]) as video:
        key = video.index_at(record["scene"].time)
        assert key == 12
        frame = video.read([key])[0].astype(float)
    for left, top, right, bottom in (record["scene"].corners * 48).round().astype(int):
        inside = frame[top:bottom, left:right].mean((0, 1))
        assert np.abs(inside - np.median(frame, (0, 1))).max() > 5


def own(tmp_path, rows="a,1.5,0.1,0.1,0.5,0.5,1\n", classes="1,run\n2,sit\n", videos=("a",)):
    (tmp_path / "videos").mkdir(exist_ok=True)
    for name in videos:
        decode.write_video(tmp_path / "videos" / f"{name}.mp4", np.zeros((40, 32, 48, 3), np.uint8), 10)
    (tmp_path / "classes.csv").write_text(classes)
    (tmp_path / "train.csv").write_text(rows)
    return str(tmp_path)


def test_boxes_of_ones_own(tmp_path):
    rows = "a,1.50,0.1,0.1,0.5,0.5,2,7\na,1.5,0.1,0.1,0.5,0.5,1,7\na,1.5,0.2,0.1,0.5,0.5,1,8\n"
    rows += "a,3,0,0,1,1,2\nb,1\n"
    found = scenes.open_scenes(own(tmp_path, rows), "train")
    assert found.ids == ("a,1500", "a,3000")
    assert found.scenes[0].actions == ((0, 1), (0,))
    assert found.select([1]).scenes == (found.scenes[1],)
    assert found.fingerprint() != found.select([1, 0]).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "a,1,0.5,0.1,0.1,0.5,1\n"}, "train.csv line 1: the box 0.5,0.1,0.1,0.5 is none"),
        ({"rows": "a,1,0.1,0.1,0.5,1.5,1\n"}, "train.csv line 1: the box"),
        (
            {"rows": "a,1,0.1,0.1,0.5,0.5,1\na,1,0.1,0.1,0.5,0.5,3\n"},
            "line 2: action 3 is not in classes.csv",
        ),
        ({"rows": "z,1,0.1,0.1,0.5,0.5,1\n"}, "line 1: there is no video z in"),
        ({"rows": "a,1\n"}, "train.csv has no box in it"),
    ],
)
def test_boxes_that_are_refused(tmp_path, change, message):
    with pytest.raises(SourceError, match=message):
        scenes.open_scenes(own(tmp_path, **change), "train")
    with pytest.raises(SourceError, match=r"has no validation.csv"):
        scenes.open_scenes(str(tmp_path), "validation")


def test_boxes_of_a_detector(tmp_path):
    source = scenes.open_scenes(own(tmp_path), "train")
    file = tmp_path / "found.csv"
    file.write_text(
        "a,1.5,0.1,0.1,0.5,0.6,,0.9\n".replace(",,", ",1,") + "a,1.5,0.3,0.1,0.5,0.6,1,0.7\nz,1,0,0,1,1,1,1\n"
    )
    found = scenes.detected(source, str(file), 0.8)
    assert found.ids == ("a,1500",)
    np.testing.assert_allclose(found.scenes[0].scores, [0.9])
    with pytest.raises(SourceError, match=r"none of score 0.95 or more"):
        scenes.detected(source, str(file), 0.95)
    file.write_text("")
    with pytest.raises(SourceError, match="no box in it"):
        scenes.detected(source, str(file), 0.8)
    file.write_text("a,2,0,0,1,1,1,1\n")
    with pytest.raises(SourceError, match="no key frame in common"):
        scenes.detected(source, str(file), 0.8)


CLIP = detection_clips.DetectClip(8, 2, (32, 32), (40, 44), True, 4, 10)


def test_training_clips(folder):
    source = scenes.open_scenes(str(folder), "train")
    dataset = pipeline.clips(source, CLIP, seed=0, batch_size=16)
    batch = next(pipeline.iterate(dataset, 16, workers=0, threads=1))
    assert batch["video"].shape == (16, 8, 32, 32, 3)
    assert batch["boxes"].shape == (16, 4, 4)
    boxes, weight = batch["boxes"][batch["box_weight"] > 0], batch["box_weight"]
    assert proposals.has_area(boxes).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 31
    assert 16 <= weight.sum() <= 48
    assert (batch["actions"][weight > 0].sum(-1) >= 1).all()
    assert not batch["actions"][weight == 0].any()
    again = next(pipeline.iterate(dataset, 16, workers=0, threads=2))
    np.testing.assert_array_equal(batch["boxes"], again["boxes"])


def test_more_boxes_than_slots_keep_their_own_labels(tmp_path):
    rows = "".join(f"a,1.5,{i / 10},0.1,{i / 10 + 0.1},0.9,{1 + i % 2}\n" for i in range(9))
    source = scenes.open_scenes(own(tmp_path, rows), "train")
    clip = detection_clips.DetectClip(4, 1, (32, 48), (32, 32), False, 3, 2)
    for seed in range(5):
        made = clip.random_map((0, source[0]), np.random.default_rng(seed))
        assert made["box_weight"].sum() == 3
        middles = made["boxes"][0, :, [0, 2]].mean(0) / 48 * 10
        wanted = np.eye(2)[middles.astype(int) % 2]
        np.testing.assert_array_equal(made["actions"][0], wanted)


def test_a_damaged_video_has_weight_0_and_no_box(tmp_path):
    source = scenes.open_scenes(own(tmp_path), "train")
    (tmp_path / "videos" / "a.mp4").write_bytes(b"nothing")
    made = detection_clips.DetectClip(4, 1, (32, 32), (32, 32), False, 3, 2).random_map(
        (0, source[0]), np.random.default_rng(0)
    )
    assert made["weight"] == 0
    assert made["error"]
    assert not made["box_weight"].any()


def test_a_key_beyond_the_video_is_said(tmp_path):
    source = scenes.open_scenes(own(tmp_path, "a,99,0.1,0.1,0.5,0.5,1\n"), "train")
    made = detection_clips.KeyView(4, 1, (32, 48), 3, 2).map((0, source[0]))
    assert made["weight"] == 0
    assert "99" in made["error"]


def test_test_views(folder):
    source = scenes.open_scenes(str(folder), "test")
    made = detection_clips.KeyView(8, 2, (48, 48), 4, 10).map((0, source[0]))
    count = len(source.scenes[0].corners)
    assert made["box_weight"].sum() == count
    plain = proposals.to_pixels(source.scenes[0].corners, 48, 48)
    assert (made["boxes"][0, :count, 0] <= plain[:, 0]).all()
    empty = detection_clips.KeyView(8, 2, (48, 48), 4, 10).map((3, None))
    assert empty["weight"] == 0
    assert empty["boxes"].shape == (1, 4, 4)


def test_prepared_key_frames_are_those_of_the_files(tmp_path):
    """`prepare --dataset=boxes`: the same boxes and the same frames around the key."""
    rows = "a,1.5,0.1,0.1,0.5,0.5,1,7\na,1.5,0.1,0.1,0.5,0.5,2,7\na,3,0.25,0,1,1,2,8\na,0.5,0,0,1,1,1,9\n"
    numbered = clips.numbered_frames(40, 32, 48)
    (tmp_path / "own").mkdir()
    path = own(tmp_path / "own", rows)
    decode.write_video(tmp_path / "own" / "videos" / "a.mp4", numbered, 10)
    (tmp_path / "own" / "validation.csv").write_text("a,2,0,0,1,1,1\n")
    out = str(tmp_path / "out")
    prepare.run(path, out, prepare.Options(dataset="boxes", processes=1, short_side=32))
    for part in ("train", "validation"):
        plain, stored = scenes.open_scenes(path, part), scenes.open_scenes(out, part)
        assert plain.ids == stored.ids
        assert plain.classes == stored.classes
        assert [scene.actions for scene in plain.scenes] == [scene.actions for scene in stored.scenes]
        for ours, theirs in zip(plain.scenes, stored.scenes, strict=True):
            np.testing.assert_array_equal(ours.corners, theirs.corners)
        assert set(stored.frame_sizes()) == set(plain.frame_sizes()) == {(32, 48)}
        view = detection_clips.KeyView(4, 2, (32, 48), 3, 2)
        for place in range(len(plain)):
            first, second = (view.map((0, source[place])) for source in (plain, stored))
            assert first["weight"] == second["weight"] == 1
            differences = np.abs(first["video"].astype(int) - second["video"].astype(int))
            assert differences.mean() < 2
            np.testing.assert_array_equal(first["boxes"], second["boxes"])
    assert scenes.has_boxes(out)


def detections(tmp_path, form):
    """One box, in each of the published forms."""
    file = tmp_path / f"found{form}"
    if form == ".csv":
        file.write_text("m,0902,0.25,0.5,0.75,1.0,,0.9\n")
    elif form == ".json":
        file.write_text(
            json.dumps([{"image_id": 7, "category_id": 1, "bbox": [50, 50, 100, 50], "score": 0.9}])
        )
        images = [{"id": 7, "movie": "m", "timestamp": "0902", "width": 200, "height": 100}]
        (tmp_path / "ava_val_v2.2_min.json").write_text(json.dumps({"images": images, "annotations": []}))
    else:
        table = np.array([[0.25, 0.5, 0.75, 1.0, 0.9]])
        file.write_bytes(pickle.dumps({"m,0902": table}, protocol=2))
    return str(file)


@pytest.mark.parametrize("form", boxes.DETECTIONS)
def test_published_forms_of_detections(tmp_path, form):
    (row,) = boxes.read_detections(detections(tmp_path, form))
    assert row.frame == ("m", 902000)
    assert row.corners == (0.25, 0.5, 0.75, 1.0)
    assert row.extra == 0.9


class Calls:
    """A pickle that runs a command when it is read carelessly."""

    def __reduce__(self):
        return os.system, ("touch /tmp/videomae_jax_was_here",)


def test_detections_that_are_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"m,1": Calls()}))
    with pytest.raises(SourceError, match=r"asks for (posix|nt).system: detections are dicts of arrays"):
        boxes.read_detections(str(tmp_path / "x.pkl"))
    assert not os.path.exists("/tmp/videomae_jax_was_here")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SourceError, match="no images beside"):
        boxes.read_detections(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(SourceError, match="is not understood"):
        boxes.read_detections(str(tmp_path / "x.json"))
    with pytest.raises(SourceError, match=r"are .csv, .json, .pkl files"):
        boxes.read_detections(str(tmp_path / "x.txt"))


def test_what_counts_and_what_is_excluded_goes_with_prepared_data(tmp_path):
    (tmp_path / "own").mkdir()
    path = own(tmp_path / "own", "a,1.5,0.1,0.1,0.5,0.5,1,7\na,0.5,0.1,0.1,0.5,0.5,2,7\na,2\n")
    (tmp_path / "own" / "scored.csv").write_text("2,sit\n")
    (tmp_path / "own" / "excluded_train.csv").write_text("a,0.5\n")
    (tmp_path / "own" / "detected_train.csv").write_text(
        "a,1.5,0,0,1,1,,0.7\na,2,-0.1,0,0.5,1.0003,,0.9\na,2,1,0,1.5,1,,0.9\na,1,0,0,1,1,,0.7\n"
    )
    prepare.run(path, str(tmp_path / "out"), prepare.Options(dataset="boxes", processes=1, short_side=32))
    for folder in (path, str(tmp_path / "out")):
        source = scenes.open_scenes(folder, "train")
        assert source.scored == (1,)
        assert source.excluded == {"a,500"}
        found = scenes.detected(source, scenes.detected_file(folder, "train"), 0.6)
        # Nobody is annotated at 1 and 2 s: what is found there is wrong.
        assert found.ids == ("a,1000", "a,1500", "a,2000")
        np.testing.assert_allclose(found.scenes[2].corners, [[0, 0, 0.5, 1]])
        assert not found.notes
        with open(scenes.detected_file(folder, "train"), "a") as file:
            file.write("a,3,0,0,1,1,,0.7\n")
    with_more = scenes.detected(source, scenes.detected_file(folder, "train"), 0.6)
    assert with_more.ids == found.ids
    assert "1 boxes are of key frames that are not among the prepared ones" in with_more.notes[0]
    assert (source.beyond(30), source.beyond(31)) == (0, 2)  # frames of 3 s


def test_key_frames_that_were_not_prepared_are_said(tmp_path):
    (tmp_path / "own").mkdir()
    path = own(tmp_path / "own", "a,1.5,0.1,0.1,0.5,0.5,1\nb,1,0.1,0.1,0.5,0.5,2\n", videos=("a", "b"))
    (tmp_path / "own" / "videos" / "b.mp4").write_bytes(b"nothing")
    how = prepare.Options(dataset="boxes", processes=1, short_side=32, max_failed=0.5)
    prepare.run(path, str(tmp_path / "out"), how)
    source = scenes.open_scenes(str(tmp_path / "out"), "train")
    assert source.missing == 1
    assert "1 key frames are not among the prepared ones" in source.notes[0]


@pytest.mark.parametrize("rate", [10, 15, 24, 25, 30, fractions.Fraction(30000, 1001)])
def test_the_key_frame_is_the_same_one_in_prepared_data(tmp_path, rate):
    """Also where times are no whole seconds, and three of them no whole frames."""
    times = (0.7, 1.5, 1.71, 2, 2.219, 2.24, 2.26, 2.333, 2.999, 3, 3.1415, 4.72)
    (tmp_path / "own").mkdir()
    path = own(tmp_path / "own", "".join(f"a,{time},0.1,0.1,0.5,0.5,1\n" for time in times))
    grey = (np.arange(round(5 * rate)) % 16 * 15).astype(np.uint8)
    frames = np.broadcast_to(grey[:, None, None, None], (len(grey), 32, 48, 3))
    decode.write_video(tmp_path / "own" / "videos" / "a.mp4", frames, rate, crf=1)
    prepare.run(path, str(tmp_path / "out"), prepare.Options(dataset="boxes", processes=1, short_side=32))
    plain, stored = (scenes.open_scenes(folder, "train") for folder in (path, str(tmp_path / "out")))
    for place, time in enumerate(times):
        shown = []
        for source in (plain, stored):
            made = detection_clips.KeyView(1, 1, (32, 48), 1, 2).map((0, source[place]))
            shown.append(made["video"].astype(int).mean())
        assert abs(shown[0] - shown[1]) < 7, time


def test_records_that_do_not_say_where_their_key_frame_is(tmp_path):
    (tmp_path / "own").mkdir()
    path, out = own(tmp_path / "own", "a,2,0.1,0.1,0.5,0.5,1\n"), str(tmp_path / "out")
    prepare.run(path, out, prepare.Options(dataset="boxes", processes=1, short_side=32))
    table = tmp_path / "out" / prepared.RECORDS
    rows = [line.split(",") for line in table.read_text().splitlines()]
    place = rows[0].index("early")
    table.write_text("".join(",".join(row[:place] + row[place + 1 :]) + "\n" for row in rows))
    with pytest.raises(SourceError, match="where in a record its key frame is: prepare into another"):
        scenes.open_scenes(out, "train")


def test_a_detected_box_that_stands_there_twice_is_one(tmp_path):
    """SlowFast's lists name it once for each of its actions."""
    source = scenes.open_scenes(own(tmp_path), "train")
    file = tmp_path / "found.csv"
    file.write_text(
        "a,1.5,0.1,0.1,0.5,0.5,1,0.85\na,1.5,0.1,0.1,0.5,0.5,2,0.9\na,1.5,0.2,0.1,0.5,0.5,1,0.95\n"
    )
    (scene,) = scenes.detected(source, str(file), 0.8).scenes
    np.testing.assert_allclose(scene.scores, [0.9, 0.95], rtol=1e-6)


def test_two_videos_of_one_name_are_told_apart(tmp_path):
    folder = own(tmp_path)
    videos = pathlib.Path(folder) / "videos"
    (name,) = [file.name for file in videos.iterdir()]
    shutil.copy(videos / name, videos / "a.mkv")
    with pytest.raises(
        SourceError, match=rf"train.csv line 1: .* has a.mkv and {name}: name a with its suffix"
    ):
        scenes.open_scenes(folder, "train")
    (pathlib.Path(folder) / "train.csv").write_text("a.mkv,1.5,0.1,0.1,0.5,0.5,1\n")
    assert scenes.open_scenes(folder, "train").files == (("a.mkv", str(videos / "a.mkv")),)


def test_own_sizes_of_a_list_of_detections_come_first(tmp_path):
    file = detections(tmp_path, ".json")  # beside ava_val_v2.2_min.json, of other images with these numbers
    images = [{"id": 7, "movie": "own", "timestamp": "3", "width": 100, "height": 200}]
    boxes_there = [{"image_id": 7, "bbox": [25, 50, 25, 50], "score": 0.9}]
    pathlib.Path(file).write_text(json.dumps({"images": images, "annotations": boxes_there}))
    (row,) = boxes.read_detections(file)
    assert (row.frame, row.corners) == (("own", 3000), (0.25, 0.25, 0.5, 0.5))


def test_lists_as_spreadsheets_write_them(tmp_path):
    path = own(tmp_path, "\ufeffa,1.5,0.1,0.1,0.5,0.5,1\r\n", classes="\ufeff1,run\r\n2,sit\r\n")
    assert scenes.open_scenes(path, "train").classes == ("run", "sit")
    with pytest.raises(SourceError, match="a name stands there twice"):
        scenes.open_scenes(own(tmp_path, classes="1,run\n2,run\n"), "train")
    own(tmp_path, "a,1,0.1,0.1,0.5,0.5,7\n", classes="3,run\n7,sit\n")
    with pytest.raises(SourceError, match="number the classes from 1 on"):
        prepare.run(path, str(tmp_path / "out"), prepare.Options(dataset="boxes", processes=1))


def test_images_of_one_number_in_two_lists_are_refused(tmp_path):
    """Their detections would be given to another movie."""
    file = detections(tmp_path, ".json")
    images = [{"id": 7, "movie": "other", "timestamp": "0902", "width": 200, "height": 100}]
    (tmp_path / "ava_test_v2.2_min.json").write_text(json.dumps({"images": images, "annotations": []}))
    with pytest.raises(SourceError, match=r"image 7 is of (m|other) in one .*min\.json of its folder and"):
        boxes.read_detections(file)


def test_a_finished_folder_has_its_lists(tmp_path, monkeypatch):
    """Killed while they are copied, it is not finished."""
    (tmp_path / "own").mkdir()
    path = own(tmp_path / "own", "a,1.5,0.1,0.1,0.5,0.5,1\n")
    (tmp_path / "own" / "scored.csv").write_text("1,run\n")
    monkeypatch.setattr(prepare.prepare, "run", lambda *_args, **_more: None)
    prepare.run(path, str(tmp_path / "out"), prepare.Options(dataset="boxes", processes=1, short_side=32))
    assert (tmp_path / "out" / "scored.csv").exists()
    assert not (tmp_path / "out" / prepared.MANIFEST).exists()
