"""Prepared JPEGs: exact places, times and pixels; whatever is damaged is an error of the video."""

import contextlib
import fractions
import io

import clips
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videomae_jax.data import decode, images, reading, transcode


def jpeg(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=95)
    return out.getvalue()


FRAMES = clips.numbered_frames(12)
JPEGS = [jpeg(frame) for frame in FRAMES]
SIZE = FRAMES[0].shape[:2]
TICK, RATE = fractions.Fraction(1, 600), fractions.Fraction(30)
PACKED = images.pack(JPEGS, [40 * i for i in range(12)], SIZE, TICK, RATE)


def test_frames_have_their_places_times_and_pixels():
    with reading.open_video(PACKED, "one") as video:
        assert isinstance(video, images.JpegFrames)
        assert (video.num_frames, video.fps, video.time_base) == (12, 30.0, TICK)
        assert clips.frame_numbers(video.read([11, 0, 5, 5])) == [11, 0, 5, 5]
        assert video.time_of(7) == fractions.Fraction(280, 600)
        # A frame is on show until the next one.
        assert [video.index_at(t) for t in (-1.0, 0.0, 0.1, 0.13, 0.134, 99.0)] == [0, 0, 1, 1, 2, 11]
        expected = np.asarray(Image.open(io.BytesIO(JPEGS[3])).convert("RGB"))
        assert (video.read([3])[0] == expected).all()
        box = video.read([3, 4], lambda _height, _width: (2, -3, 10, 12))
        assert (box[0, :, 3:] == expected[2:12, :9]).all()
        assert (box[0, :, :3] == 0).all()
        with pytest.raises(IndexError):
            video.read([12])
        assert len(list(video.frames(3, 7))) == 4


def test_only_wanted_images_are_decoded(monkeypatch):
    seen = []
    plain = images.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        images.simplejpeg, "decode_jpeg", lambda data, *rest: (seen.append(len(data)), plain(data, *rest))[1]
    )
    with reading.open_video(PACKED) as video:
        video.read([2, 9, 2])
    assert seen == [len(JPEGS[2]), len(JPEGS[9])]


def test_the_images_are_those_of_a_file_of_them(tmp_path):
    """`jpeg` and `mjpeg` differ in what is around the images only."""
    clips.write(tmp_path / "a.mp4", FRAMES, codec="libx264", g=6)
    packed, file = (
        transcode.transcode(str(tmp_path / "a.mp4"), transcode.Form(codec)) for codec in ("jpeg", "mjpeg")
    )
    assert (packed.frames, packed.fps, packed.height) == (file.frames, file.fps, file.height)
    with reading.open_video(packed.video) as ours, decode.Video(file.video) as theirs:
        assert ours.num_frames == theirs.num_frames
        assert [ours.time_of(i) for i in range(12)] == [theirs.time_of(i) for i in range(12)]
        assert ours.fps == pytest.approx(theirs.fps)
        # Two decoders: they differ in how colour is interpolated.
        assert np.abs(ours.read(range(12)).astype(int) - theirs.read(range(12))).mean() < 3
        assert clips.frame_numbers(ours.read([0, 11])) == [0, 11]
    again = transcode.transcode(str(tmp_path / "a.mp4"), transcode.Form("jpeg"))
    assert again.video == packed.video


def test_other_sizes_are_damage():
    other = jpeg(np.zeros((16, 16, 3), np.uint8))
    with reading.open_video(images.pack([JPEGS[0], other], [0, 1], SIZE, TICK, RATE), "one") as video:
        video.read([0])
        with pytest.raises(decode.DecodeError, match=r"one: is damaged \(frame 1 is 16x16"):
            video.read([0, 1])


@pytest.mark.parametrize("length", [8, 20, 36, 100, 220, len(PACKED) - 1])
def test_what_is_cut_off_is_refused(length):
    with pytest.raises(decode.DecodeError, match=r"is damaged|cannot be opened"):
        reading.open_video(PACKED[:length], "one")


@settings(max_examples=2000, deadline=None)
@given(st.integers(8, len(PACKED) - 1), st.integers(1, 255))
def test_a_changed_byte_gives_an_error_or_frames_of_the_right_shape(place, change):
    """Never another exception: it would end the loader. JPEG has no checksum, so pixels may be wrong."""
    data = bytearray(PACKED)
    data[place] ^= change
    with contextlib.suppress(decode.DecodeError), reading.open_video(bytes(data), "one") as video:
        assert video.read(range(video.num_frames)).shape == (12, *SIZE, 3)
