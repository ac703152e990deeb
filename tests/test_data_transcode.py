"""Forms that videos are stored in: exact frames, size and closeness, what cannot be encoded."""

import clips
import numpy as np
import pytest

from videomae_jax.data import decode, prepare, reading, transcode
from videomae_jax.data.collection import Entry


@pytest.mark.parametrize("codec", transcode.CODECS)
def test_every_form_of_every_real_file_has_its_frames(real_videos, codec, rng):
    """Random access into the stored form equals its plain full decode; its frames are those of the source."""
    for path in sorted(real_videos.iterdir()):
        if path.name == "corrupted.mp4":
            failure = prepare.encode(Entry("x", str(path)), transcode.Form(codec))
            assert failure.is_final
            assert "damaged" in failure.reason
            continue
        stored = transcode.transcode(str(path), transcode.Form(codec, 128))
        with reading.open_video(stored.video) as video, decode.Video(path) as source:
            assert video.num_frames == source.num_frames == stored.frames
            whole = np.stack([f.to_ndarray(format="rgb24") for f in video.frames()])
            wanted = rng.integers(stored.frames, size=5)
            found = video.read(wanted)
            turns = int(whole.shape[1:3] != found.shape[1:3])
            np.testing.assert_array_equal(found, np.rot90(whole[wanted], turns, axes=(1, 2)))
            assert found.shape[1:3] == (stored.height, stored.width)
            half = (video.num_frames - 1) / max(video.fps, 1) / 2
            assert abs(video.index_at(half) - source.index_at(half)) <= 1
            original = source.read(wanted)
            if codec != "keep":
                assert min(stored.height, stored.width) == min(128, *original.shape[1:3])
                colours = original.mean(axis=(1, 2)) - found.mean(axis=(1, 2))
                assert np.abs(colours).max() < 4, path.name


def test_the_default_form_is_close_and_not_twice_the_size(real_videos):
    path = real_videos / "mmaction_test.mp4"
    stored = transcode.transcode(str(path), transcode.Form())
    wanted = range(0, 300, 20)
    error = decode.read_clip(path, wanted).astype(float) - reading.open_video(stored.video).read(wanted)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 36
    assert len(stored.video) < 2 * path.stat().st_size


def test_shrunk_is_even_and_never_larger():
    assert transcode.shrunk(256, 340, 256) == (256, 340)
    assert transcode.shrunk(480, 640, 256) == (256, 340)
    assert transcode.shrunk(1920, 1080, 256) == (454, 256)
    assert transcode.shrunk(101, 75, 256) == (100, 74)


@pytest.mark.parametrize("codec", ["jpeg", "keep"])
def test_what_no_record_can_hold_is_named(tmp_path, monkeypatch, codec):
    path = clips.write(tmp_path / "long.mp4", clips.numbered_frames(6))
    monkeypatch.setattr(transcode, "LARGEST", 1000)
    made = prepare.encode(Entry("long.mp4", path), transcode.Form(codec))
    assert isinstance(made, prepare.Failure)
    assert "long.mp4: takes" in made.reason
    assert made.is_final


def test_keep_never_encodes(real_videos, tmp_path):
    path = str(real_videos / "part_0.mp4")
    with pytest.raises(decode.DecodeError, match="keep stores whole files only"):
        transcode.transcode(path, transcode.Form("keep"), 0.2, 0.5)


def test_a_part_of_a_video(tmp_path):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(30), g=7)  # 3 seconds
    for start, end, expected in ((0.5, 1.2, range(5, 12)), (2.5, 9.0, range(25, 30)), (1.0, 1.01, [10])):
        part = transcode.transcode(path, transcode.Form(), start, end)
        assert clips.frame_numbers(reading.open_video(part.video).read(range(part.frames))) == list(expected)
    with pytest.raises(decode.DecodeError, match=r"ends before second 3\.5"):
        transcode.transcode(path, transcode.Form(), 3.5, 4.0)
