"""Exact frames by index or time from any container; a `DecodeError` and nothing else from broken files."""

import array
import pathlib

import av
import clips
import numpy as np
import pytest

from videomae_jax.data import decode, marks

# Frames that a player shows, counted with a plain full decode and checked against the containers.
REAL = {
    "maxtext.mp4": (151, 480, 454),
    "mmaction_demo.mp4": (280, 256, 340),
    "mmaction_st.mp4": (57, 256, 340),
    "mmaction_test.avi": (164, 240, 320),
    "mmaction_test.mp4": (300, 256, 340),
    "part_0.mp4": (32, 256, 340),
    "tc_av1_video.mkv": (125, 360, 640),
    "tc_bt709_full_range.mp4": (30, 720, 1280),
    "tc_h264_10bits.mp4": (30, 200, 200),
    "tc_h265_video.mp4": (10, 128, 128),
    "tc_nasa_13013.mp4": (390, 270, 480),  # its second, larger stream
    "video_0.mov": (3, 320, 568),
    "video_270.mov": (3, 568, 320),
}


def full_decode(path, stream: int = 0) -> np.ndarray:
    """Every frame in the order of presentation, as stored (not turned)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=stream)])


@pytest.mark.parametrize("name", REAL)
def test_real_files_equal_a_full_decode(real_videos, name, rng):
    count, height, width = REAL[name]
    expected = full_decode(real_videos / name, stream=int(name == "tc_nasa_13013.mp4"))
    if name == "video_270.mov":
        expected = np.rot90(expected, axes=(1, 2))  # stored 320x568, shown upright as 568x320
    with decode.Video(real_videos / name) as video:
        assert video.num_frames == len(expected) == count
        for _ in range(3):
            wanted = rng.integers(count, size=4)  # unordered, with repeats
            np.testing.assert_array_equal(video.read(wanted), expected[wanted])
        assert video.read([count - 1]).shape == (1, height, width, 3)


def test_every_real_file_is_listed(real_videos):
    assert {p.name for p in real_videos.iterdir()} == {*REAL, "corrupted.mp4"}


def test_a_corrupted_file_raises(real_videos):
    with decode.Video(real_videos / "corrupted.mp4") as video, pytest.raises(decode.DecodeError) as error:
        video.read(range(video.num_frames))
    assert "corrupted.mp4" in str(error.value)
    assert "Invalid data" in str(error.value)


FORMS = {
    "long_gop.mp4": dict(codec="libx264", g=250, bf=3),
    "short_gop.mkv": dict(codec="libx264", g=4, bf=2),
    "intra.mp4": dict(codec="libx264", g=1),
    "intra_refresh.mp4": {"codec": "libx264", "x264-params": "intra-refresh=1:keyint=10:bframes=0"},
    "packed.avi": dict(codec="mpeg4", bf=2, g=12),
    "stream.ts": dict(codec="mpeg2video", g=6, bf=2),
    "motion.mov": dict(codec="mpeg4", g=30),
}


@pytest.mark.parametrize("name", FORMS)
def test_frames_by_index_in_every_container(tmp_path, name, rng):
    noise = rng.integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    path = clips.write(tmp_path / name, noise, **FORMS[name])
    expected = full_decode(path)
    assert len({frame.tobytes() for frame in expected}) == 40
    with decode.Video(path) as video:
        assert video.num_frames == 40
        for wanted in ([0], [39], [7, 7, 3], range(40), rng.integers(40, size=6)):
            np.testing.assert_array_equal(video.read(wanted), expected[list(wanted)])


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "intra.mp4", clips.numbered_frames(40), g=1)
    with decode.Video(path) as video:
        fed = []
        plain = video._needed
        monkeypatch.setattr(video, "_needed", lambda *args: fed.append(list(plain(*args))) or fed[-1])
        monkeypatch.setattr(video, "frames", None)
        assert clips.frame_numbers(video.read([5, 20, 35])) == [5, 20, 35]
    assert [len(packets) for packets in fed] == [1, 1, 1]


def test_frames_that_nothing_depends_on_are_skipped(tmp_path, rng):
    noise = rng.integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    options = {"g": 250, "x264-params": "b-adapt=0:bframes=3:scenecut=0"}
    path = clips.write(tmp_path / "b.mp4", noise, codec="libx264", **options)
    with decode.Video(path) as video:
        start, last = video._keys[0], video._times[35]
        everything = len(list(video._decode(video._needed(start, {last}))))
        decoded = len(list(video._decode(video._needed(start, {last}), {last})))
        np.testing.assert_array_equal(video.read([35])[0], full_decode(path)[35])
    assert everything > 35
    assert decoded < 0.7 * everything


@pytest.mark.parametrize("name", ["mmaction_test.mp4", "maxtext.mp4", "tc_h264_10bits.mp4", "video_270.mov"])
def test_a_box_is_that_part_of_the_frame(real_videos, name, rng):
    with decode.Video(real_videos / name) as video:
        whole = video.read([2, 0])
        height, width = whole.shape[1:3]
        for _ in range(8):
            top, left = int(rng.integers(height)), int(rng.integers(width))
            box = (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
            seen = []
            part = video.read([2, 0], lambda *size, box=box, seen=seen: seen.append(size) or box)
            assert seen == [(height, width)]
            np.testing.assert_array_equal(part, whole[:, top : top + box[2], left : left + box[3]])
        beyond = video.read([0], lambda *_: (-2, -3, height + 4, 8))
        for border in (beyond[:, :2], beyond[:, :, :3], beyond[:, -2:]):
            assert not border.any()
        np.testing.assert_array_equal(beyond[0, 2:-2, 3:], whole[1, :, :5])


def test_bytes_and_files_are_the_same(tmp_path):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(12))
    with open(path, "rb") as file, decode.Video(file.read()) as video:
        np.testing.assert_array_equal(video.read([3, 9]), decode.read_clip(path, [3, 9]))


def test_a_colon_is_no_protocol(tmp_path, monkeypatch):
    clips.write(tmp_path / "a.mp4", clips.numbered_frames(3)) and (tmp_path / "a.mp4").rename(
        tmp_path / "a:b.mp4"
    )
    monkeypatch.chdir(tmp_path)
    assert len(decode.read_clip("a:b.mp4", [0, 2])) == 2


def test_frames_by_time(tmp_path):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(20), fps=10)
    avi = clips.write(tmp_path / "a.avi", clips.numbered_frames(20), codec="mpeg4", fps=10)
    for name in (path, avi):
        with decode.Video(name) as video:
            assert video.fps == 10
            found = [video.index_at(s) for s in (-1.0, 0.0, 0.05, 0.1, 0.25, 1.0, 1.99, 100.0)]
            assert found == [0, 0, 0, 1, 2, 10, 19, 19]


def test_indices_outside_the_video(tmp_path):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(5))
    with decode.Video(path) as video:
        for wanted in ([5], [-1], []):
            with pytest.raises(IndexError, match="of 5"):
                video.read(wanted)


def broken(name: str, good: bytes) -> bytes:
    """A file that cannot be decoded, by the name of its defect."""
    return {
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "no moov": good[: len(good) // 2],
        "zeros": bytes(len(good)),
        "header only": good[:40],
    }[name]


@pytest.mark.parametrize("name", ["empty", "text", "no moov", "zeros", "header only"])
def test_broken_files_raise_decode_errors(tmp_path, name):
    good = pathlib.Path(clips.write(tmp_path / "a.mp4", clips.numbered_frames(10))).read_bytes()
    path = tmp_path / "broken.mp4"
    path.write_bytes(broken(name, good))
    with pytest.raises(decode.DecodeError, match=r"broken\.mp4"):
        decode.read_clip(path, [0])


def test_damage_inside_the_stream_raises_and_replaces_nothing(tmp_path, rng):
    path = tmp_path / "a.mp4"
    frames = rng.integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    data = bytearray(pathlib.Path(clips.write(path, frames, g=10)).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(decode.DecodeError, match=r"a\.mp4: .*damaged"):
        decode.read_clip(path, range(30))


def test_missing_and_silent_files(tmp_path):
    with pytest.raises(decode.DecodeError, match=r"nowhere\.mp4: cannot be opened \(No such file"):
        decode.Video(tmp_path / "nowhere.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(decode.DecodeError, match="has no video stream"):
        decode.Video(tmp_path / "sound.mp4")


def test_write_video_is_the_same_each_time_and_even(tmp_path):
    frames = clips.numbered_frames(6)
    for name in ("a.mp4", "b.mp4"):
        decode.write_video(tmp_path / name, frames, fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with pytest.raises(ValueError, match="even frame size, not 47x32"):
        decode.write_video(tmp_path / "c.mp4", frames[:, :, :47], fps=8)


def test_a_file_is_gone_through_once(tmp_path, monkeypatch):
    """Its packets are remembered, and counted frames; of another file of its name nothing is."""
    path = tmp_path / "long.mkv"
    clips.write(path, clips.numbered_frames(40, 32, 48))
    passes = []
    real = decode.Video._demux
    monkeypatch.setattr(decode.Video, "_demux", lambda self: passes.append(self) or real(self))
    with decode.Video(path) as video:
        first = video.read([3, 30])
    before = len(passes)
    with decode.Video(path) as video:
        opened = len(passes)
        np.testing.assert_array_equal(video.read([3, 30]), first)
    assert opened == before
    clips.write(path, clips.numbered_frames(20, 32, 48))
    with decode.Video(path) as video:
        assert video.num_frames == 20


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(marks, "_MOST", 100)
    known = marks._Known()
    for number in range(5):
        known.keep((str(number), 0, 0), marks.Index(array.array("q", range(40)), [], True))
    assert known.find(("2", 0, 0)) is None
    assert known.find(("3", 0, 0)) is not None
    assert known.find(None) is None
