"""Whatever holds a video is opened in one way: folders of frames and remote files beside local ones."""

import pathlib
import re
import shutil

import clips
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videomae_jax.apps import videos
from videomae_jax.data import decode, pipeline, prepare, prepared, ranges, reading, sources, transcode
from videomae_jax.data.collection import Collection, Entry

CLIP = pipeline.MiddleClip(frames=4, stride=1, size=(16, 16))


def save_frames(folder: pathlib.Path, frames: np.ndarray, template: str = "img_{:05d}.png") -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / template.format(number))


def test_frames_are_in_the_order_of_their_numbers(tmp_path, rng):
    frames = rng.integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
    save_frames(tmp_path / "clip", frames, "frame{}.png")  # frame2 comes before frame10
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    with reading.open_video(str(tmp_path / "clip")) as video:
        assert video.num_frames == 12
        np.testing.assert_array_equal(video.read([10, 1, 1]), frames[[10, 1, 1]])
        part = video.read([3], lambda height, width: (height - 32 + 4, width - 48 + 8, 16, 10))
        np.testing.assert_array_equal(part[0], frames[3, 4:20, 8:18])
        with pytest.raises(IndexError):
            video.read([12])
        with pytest.raises(decode.DecodeError, match="has no frame rate"):
            video.index_at(1.0)


def test_broken_frames_are_errors(tmp_path):
    save_frames(tmp_path / "clip", clips.numbered_frames(3))
    (tmp_path / "clip" / "img_00002.png").write_bytes(b"no image")
    with reading.open_video(str(tmp_path / "clip")) as video:
        assert clips.frame_numbers(video.read([0, 2])) == [0, 2]
        with pytest.raises(decode.DecodeError, match=r"img_00002\.png: cannot be decoded"):
            video.read([0, 1])
        Image.new("RGB", (10, 10)).save(tmp_path / "clip" / "img_00002.png")
        with pytest.raises(decode.DecodeError, match=r"img_00002\.png: is 10x10, not 48x32"):
            video.read([0, 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(decode.DecodeError, match="empty: has no frames"):
        reading.open_video(str(tmp_path / "empty"))


def test_sources_find_folders_of_frames(tmp_path):
    for name in ("jump/a", "jump/b", "run/c"):
        save_frames(tmp_path / "videos" / name, clips.numbered_frames(6))
    clips.write(tmp_path / "videos" / "run" / "d.mp4", clips.numbered_frames(6))
    Image.new("RGB", (9, 9)).save(
        tmp_path / "videos" / "run" / "cover.jpg"
    )  # no frame: it lies beside a video
    source = sources.from_folder(tmp_path / "videos")
    assert source.ids == ("jump/a", "jump/b", "run/c", "run/d.mp4")
    assert source.labels == (0, 0, 1, 1)
    found, ids, bad = pipeline.middle_clips(source, CLIP)
    assert (found.shape, ids, bad) == ((4, 4, 16, 16, 3), list(source.ids), {})
    for clip in found[1:]:
        assert np.abs(clip.astype(int) - found[0]).max() <= 3
    (tmp_path / "list.csv").write_text("path,frames,label\nvideos/jump/a,6,0\nvideos/run/c,6,1\n")
    listed = prepared.open_source(str(tmp_path / "list.csv"), "train")
    assert listed.labels == (0, 1)
    assert listed[1]["video"] == str(tmp_path / "videos/run/c")


def test_remote_folders_lists_and_files(bucket):
    clips.write(bucket / "videos" / "a.mp4", clips.numbered_frames(8))
    save_frames(bucket / "videos" / "b.1", clips.numbered_frames(8))  # a folder with a dot
    (bucket / "list.csv").write_text("gs://bucket/videos/a.mp4 1\nvideos/b.1 0\n")
    assert epath.Path("gs://bucket/list.csv").exists()
    source = prepared.open_source("gs://bucket/videos", "train")
    assert source.ids == ("a.mp4", "b.1")
    assert source[0]["video"] == "gs://bucket/videos/a.mp4"
    found, ids, bad = pipeline.middle_clips(source, CLIP)
    assert (found.shape, ids, bad) == ((2, 4, 16, 16, 3), ["a.mp4", "b.1"], {})
    one = videos.find(["gs://bucket/videos/a.mp4"], "all")
    assert [(video.name, video.record()["video"]) for video in one] == [("a.mp4", "gs://bucket/videos/a.mp4")]
    before = videos.stamps(one[0].source)
    assert before[0][0][0] == (bucket / "videos" / "a.mp4").stat().st_size
    listed = prepared.open_source("gs://bucket/list.csv", "train")
    assert listed.labels == (1, 0)
    assert [row["video"] for row in (listed[0], listed[1])] == [
        "gs://bucket/videos/a.mp4",
        "gs://bucket/videos/b.1",
    ]
    with pytest.raises(decode.DecodeError, match=r"gs://bucket/videos/x\.mp4: cannot be read"):
        reading.open_video("gs://bucket/videos/x.mp4")


@pytest.mark.parametrize("codec", ["jpeg", "mjpeg"])
def test_prepared_data_in_a_bucket(bucket, endpoint, tmp_path, codec):
    """Whole records by ArrayRecord's own reader, all else through the file system: the same as locally."""
    videos = [clips.write(tmp_path / "in" / f"{i}.mp4", clips.numbered_frames(6 + i)) for i in range(5)]
    entries = [Entry(f"{i}.mp4", path, i % 2) for i, path in enumerate(videos)]
    collection = Collection("own", {"train": entries}, ("a", "b"))
    prepare.run(prepare.Job(collection, str(tmp_path / "set"), transcode.Form(codec), 2), 1)
    url, folder = f"gs://bucket/{codec}", bucket / codec
    shutil.copytree(tmp_path / "set", folder)
    local = prepared.open_source(str(tmp_path / "set"), "train")
    remote = prepared.open_source(url, "train")
    assert (remote.ids, remote.labels, remote.classes) == (local.ids, local.labels, local.classes)
    assert remote.fingerprint() == local.fingerprint()
    for i in (4, 0, 2):
        assert remote[i] | {"video": None} == local[i] | {"video": None}
        assert remote[i]["error"] == ""
        with (
            reading.open_video(remote[i]["video"]) as video,
            reading.open_video(local[i]["video"]) as expected,
        ):
            assert video.digest() == expected.digest()
    shards = {f"{codec}/own-train.array_record-0000{i}-of-00003" for i in (0, 1, 2)}
    if codec == "mjpeg":
        assert {name for name, _ in endpoint.sent} >= shards
    (folder / "own-train.array_record-00001-of-00003").unlink()
    prepared._opened.cache_clear()
    assert "own-train.array_record-00001-of-00003, record 0 (2.mp4): cannot be read" in remote[2]["error"]


@pytest.mark.parametrize("codec", ["jpeg", "mjpeg"])
def test_a_record_that_a_store_has_the_third_time_is_read(bucket, endpoint, tmp_path, monkeypatch, codec):
    monkeypatch.setattr(reading, "_PAUSES", (0.0, 0.0))
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(6))
    collection = Collection("own", {"train": [Entry("a.mp4", path)]})
    prepare.run(prepare.Job(collection, str(tmp_path / "set"), transcode.Form(codec), 2), 1)
    shutil.copytree(tmp_path / "set", bucket / f"again-{codec}")
    source, asked = prepared.open_source(f"gs://bucket/again-{codec}", "train"), []
    kind, name = (prepared._Shards, "read") if codec == "mjpeg" else (ranges._Remote, "_bytes")
    plain = getattr(kind, name)

    def unsteady(self, *place):
        asked.append(place)
        if len(asked) % 3:
            raise RuntimeError("503")
        return plain(self, *place)

    monkeypatch.setattr(kind, name, unsteady)
    record = source[0]
    assert (record["error"], len(asked)) == ("", 3)
    made = CLIP.map((0, record))
    assert (made["weight"], made["error"]) == (1, "")
    monkeypatch.setattr(kind, name, lambda *_: (_ for _ in ()).throw(RuntimeError("503")))
    assert "record 0 (a.mp4): cannot be read (" in source[0]["error"]
    assert "503" in source[0]["error"]


@settings(deadline=None)
@given(st.sets(st.from_regex(r"(a|b1)?[0-9]{1,3}(_[0-9]{1,2})?\.(jpg|png|txt)", fullmatch=True), min_size=1))
def test_names_of_one_pattern_are_sorted_like_all_others(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("frames")
    for name in names:
        (folder / name).touch()

    def by_number(name: str) -> tuple:
        parts = re.split(r"(\d+)", name)
        return [(int(part), "") if part.isdigit() else (0, part) for part in parts], name

    images = [name for name in names if not name.endswith("txt")]
    assert reading.frame_files(str(folder)) == sorted(images, key=by_number)
