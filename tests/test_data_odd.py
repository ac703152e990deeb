"""Files that mislead a reader: their frames are those of a plain full decode, or they are refused by name."""

import fractions
import os
import pathlib
import shutil

import av
import clips
import numpy as np
import pytest
from PIL import Image

from videomae_jax.data import decode, pipeline, prepare, prepared, reading, rgb, sources, transcode
from videomae_jax.data.collection import Collection, Entry


@pytest.fixture(scope="session")
def odd(real_videos) -> pathlib.Path:
    folder = real_videos.parent / "odd"
    if not folder.is_dir():
        pytest.skip(f"no odd files at {folder}: set VIDEOMAE_JAX_FIXTURES")
    return folder


def shown(path, stream: int = 0) -> np.ndarray:
    """Every frame of a stream in the order of a plain full decode, as stored (not turned)."""
    with av.open(str(path), metadata_errors="replace") as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=stream)])


def agree(path, expected: np.ndarray, tmp_path) -> None:
    """`read` in any order, training's view and `prepare` all have the expected frames."""
    with decode.Video(path) as video:
        assert video.num_frames == len(expected)
        for wanted in ([len(expected) - 1], [7, 3, 3], range(len(expected)), range(5, len(expected), 9)):
            np.testing.assert_array_equal(video.read(list(wanted)), expected[list(wanted)])
    with decode.Video(path) as video:
        for first in (0, 4):
            frames = [f.to_ndarray(format="rgb24") for f in video.frames(first, first + 6)]
            unturned = rgb.orientation(next(iter(video.frames())))
            turned = np.stack([unturned.apply(frame) for frame in frames])
            np.testing.assert_array_equal(turned, expected[first : first + 6])
    made = transcode.transcode(str(path), transcode.Form("h264_intra", 4096))
    stored = decode.Video(made.video).read(range(len(expected))).astype(int)
    errors = np.abs(stored - expected).mean(axis=(1, 2, 3))
    others = np.abs(stored[1:] - expected[:-1]).mean()
    assert errors.max() < max(4.0, 0.5 * others)


def test_times_that_are_those_of_decoding(odd, tmp_path):
    path = odd / "packed_bframes_remuxed.mp4"
    agree(path, shown(path), tmp_path)


def test_a_known_file_that_is_counted_is_opened_once(odd, monkeypatch):
    """From its beginning, where it is anyway; opening takes longer than decoding a few small frames."""
    path, opened, plain = odd / "packed_bframes_remuxed.mp4", [], av.open
    expected = decode.read_clip(path, [0, 3])
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args) or plain(*args, **kwargs))
    with decode.Video(path) as video:
        np.testing.assert_array_equal(video.read([0, 3]), expected)
        assert len(opened) == 1
        np.testing.assert_array_equal(video.read([0, 3]), expected)
        assert len(opened) == 2


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("source", ["b.avi", "b.h264"])
def test_reordered_streams_remuxed_without_times(tmp_path, rng, source, suffix):
    noise = rng.integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    codec = {"b.avi": "mpeg4", "b.h264": "libx264"}[source]
    raw = clips.write(tmp_path / source, noise, codec=codec, bf=2, g=12)
    path = tmp_path / f"remuxed{suffix}"
    with av.open(raw) as inner, av.open(str(path), "w") as outer:
        stream = outer.add_stream_from_template(inner.streams.video[0])
        for number, packet in enumerate(p for p in inner.demux(video=0) if p.size):
            packet.pts = packet.dts = number * 1000
            packet.time_base, packet.stream = fractions.Fraction(1, 10000), stream
            outer.mux(packet)
    agree(path, shown(path), tmp_path)


def without_sync_table(path: pathlib.Path) -> pathlib.Path:
    """An MP4 whose table of key frames is called otherwise, so that all frames count as such."""
    data = path.read_bytes()
    assert b"stss" in data
    path.write_bytes(data.replace(b"stss", b"free"))
    return path


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "libvpx-vp9", "mpeg2video"])
@pytest.mark.parametrize("bf", [0, 2])
def test_every_frame_claims_to_be_a_key_frame(tmp_path, rng, codec, bf):
    noise = rng.integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    options = {"libvpx-vp9": {}, "libx264": {"bf": bf, "sc_threshold": 0}}.get(codec, {"bf": bf})
    path = without_sync_table(
        pathlib.Path(clips.write(tmp_path / "a.mp4", noise, codec=codec, g=12, **options))
    )
    agree(path, shown(path), tmp_path)


def test_a_stored_file_without_a_sync_table(odd, tmp_path):
    agree(odd / "nostss_libvpx-vp9.mp4", shown(odd / "nostss_libvpx-vp9.mp4"), tmp_path)


def test_prepared_files_are_still_read_from_their_index(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(40))
    made = transcode.transcode(path, transcode.Form("h264_intra"))
    demuxed, plain = [], decode._mark
    monkeypatch.setattr(decode, "_mark", lambda packet: demuxed.append(packet) or plain(packet))
    with decode.Video(made.video) as video:
        monkeypatch.setattr(video, "frames", None)
        assert len(demuxed) == 1
        assert clips.frame_numbers(video.read([5, 20, 35])) == [5, 20, 35]


# What each of the eight display matrices (a, b, c, d) makes of a stored frame [H, W, C].
MATRICES = {
    "none": ((1, 0, 0, 1), lambda x: x),
    "hflip": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "vflip": ((1, 0, 0, -1), lambda x: x[::-1]),
    "180": ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "counter-clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "transpose": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    "transverse": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
}


def with_matrix(path: pathlib.Path, a: float, b: float, c: float, d: float) -> pathlib.Path:
    """Writes a display matrix into the track header of an MP4."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], float) * 65536
    data[place : place + 36] = matrix.astype(">i4").tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_mirrored_and_turned(tmp_path, rng, name):
    matrix, turn = MATRICES[name]
    noise = rng.integers(0, 256, (12, 8, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    path = with_matrix(pathlib.Path(clips.write(tmp_path / "a.mp4", noise)), *matrix)
    expected = np.stack([turn(frame) for frame in shown(path)])
    agree(path, expected, tmp_path)
    with decode.Video(path) as video:
        part = video.read([2], lambda height, width: (8, 16, height - 20, width - 30))
    np.testing.assert_array_equal(part[0], expected[2, 8:-12, 16:-14])


def test_a_matrix_of_another_angle_is_refused(tmp_path):
    path = pathlib.Path(clips.write(tmp_path / "a.mp4", clips.numbered_frames(5)))
    with_matrix(path, 0.8, 0.6, -0.6, 0.8)
    with pytest.raises(decode.DecodeError, match=r"a\.mp4: .*no quarter turn"):
        decode.read_clip(path, [0])
    with pytest.raises(decode.DecodeError, match="no quarter turn"):
        transcode.transcode(str(path), transcode.Form())
    with pytest.raises(decode.DecodeError, match="no quarter turn"):
        transcode.transcode(str(path), transcode.Form("keep"))
    with_matrix(path, 1.0, 0.01, -0.01, 1.0)  # less than a degree
    assert clips.frame_numbers(decode.read_clip(path, [3])) == [3]


def test_a_stored_mirrored_file(odd, tmp_path):
    path = odd / "matrix_hflip.mp4"
    agree(path, shown(path)[:, :, ::-1], tmp_path)


def test_the_best_stream_is_read(odd, real_videos, tmp_path):
    path = odd / "two_video_streams_second_is_default.mkv"
    agree(path, shown(path, stream=1), tmp_path)
    with decode.Video(real_videos / "tc_nasa_13013.mp4") as video:
        assert video.num_frames == 390
        assert video.read([0, 389]).shape == (2, 270, 480, 3)


def test_cover_art_is_no_video(odd):
    with pytest.raises(decode.DecodeError, match=r"audio_only_with_cover\.mp4: has no video stream"):
        decode.Video(odd / "audio_only_with_cover.mp4")


def test_tags_need_not_be_utf8(odd, tmp_path):
    agree(odd / "latin1_tags.avi", shown(odd / "latin1_tags.avi"), tmp_path)


def test_times_are_told_or_unknown(tmp_path):
    ogv = clips.write(
        tmp_path / "a.ogv", clips.numbered_frames(20), codec="libtheora" if _has("libtheora") else "vp8"
    )
    with decode.Video(ogv) as video:
        assert video.fps == pytest.approx(10)
        assert float(video.time_of(15) - video.time_of(0)) == pytest.approx(1.5)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(clips.numbered_frames(6)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    with reading.open_video(str(tmp_path / "frames")) as video:
        assert (video.fps, video.time_base, video.time_of(3)) == (0.0, None, None)
    for codec in ("h264_intra", "h264_gop", "mjpeg", "jpeg"):
        made = transcode.transcode(str(tmp_path / "frames"), transcode.Form(codec))
        with reading.open_video(made.video) as video:
            assert (made.fps, video.fps, video.time_of(3)) == (0.0, 0.0, None)
            assert clips.frame_numbers(video.read([1, 5])) == [1, 5]
            with pytest.raises(decode.DecodeError, match="no frame rate"):
                video.index_at(0.1)


def _has(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def write_png16(path: pathlib.Path, values: np.ndarray) -> None:
    """A 16-bit PNG of uint16 [H, W] or [H, W, 3]."""
    kind = "gray16be" if values.ndim == 2 else "rgb48be"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = values.shape[:2]
        stream.pix_fmt = kind
        frame = av.VideoFrame(values.shape[1], values.shape[0], kind)
        row = values.astype(">u2").reshape(len(values), -1).view(np.uint8)
        plane = np.frombuffer(frame.planes[0], np.uint8).reshape(len(values), -1)
        plane[:, : row.shape[1]] = row
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_are_scaled(tmp_path, channels):
    ramp = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    write_png16(tmp_path / "1.png", ramp if channels == 1 else np.stack([ramp] * 3, axis=-1))
    found = reading.FrameFolder(tmp_path).read([0])[0]
    np.testing.assert_allclose(found.mean(axis=-1), ramp / 257, atol=1.5)


def test_no_oddity_ends_the_set(tmp_path, monkeypatch):
    """Each is its own video's failure, named; nothing hangs, and no other file is opened in its place."""
    good = clips.write(tmp_path / "set" / "good.mp4", clips.numbered_frames(8))
    folder = tmp_path / "set"
    shutil.copy(good, tmp_path / "elsewhere.mp4")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path}/elsewhere.mp4\n")
    (folder / "list.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n{tmp_path}/elsewhere.mp4\n"
    )
    os.mkfifo(folder / "pipe.mp4")
    (folder / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    shutil.copy(good, os.fsencode(folder) + b"/caf\xe9.mp4")
    (folder / "huge").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "huge" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    source = sources.from_folder(folder)
    clip = pipeline.MiddleClip(frames=4, stride=1, size=(16, 16))
    found, ids, bad = pipeline.middle_clips(source, clip)
    assert (len(found), ids) == (1, ["good.mp4"])
    reasons = {
        "concat.mp4": "cannot be opened",
        "list.mp4": "cannot be opened",
        "pipe.mp4": "is no regular file",
        "dangling.mp4": "cannot be opened",
        "caf\\xe9.mp4": "the name is not UTF-8",
        "huge": "cannot be decoded",
    }
    assert set(bad) == set(reasons)
    for name, reason in reasons.items():
        assert reason in bad[name], bad[name]
    entries = [Entry(name, str(source[i]["video"])) for i, name in enumerate(source.ids)]
    job = prepare.Job(
        Collection("odd", {"train": entries}), str(tmp_path / "out"), transcode.Form(), shard_videos=8
    )
    manifest = prepare.run(job, 1)
    assert {failure["id"] for failure in manifest["failed"]} == set(reasons) - {
        "huge"
    }  # the limit is this process's


# Saturated patches, by the matrix and range that a source stores them with.
PATCHES = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


def patches(tmp_path, name: str) -> str:
    image = np.zeros((64, 96, 3), np.uint8)
    for i, colour in enumerate(PATCHES):
        image[i // 3 * 32 :][:32, i % 3 * 32 :][:, :32] = colour
    if name == "png":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        return str(tmp_path / name)
    if name == "gif":
        images = [Image.fromarray(image)] * 3
        images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
        return str(tmp_path / "a.gif")
    matrix, is_full = {
        "bt601": (6, False),
        "bt709": (1, False),
        "bt709 full": (1, True),
        "bt2020": (9, False),
    }[name]
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuvj420p" if is_full else "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if is_full else 1
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=2 if is_full else 1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("codec", ["h264_intra", "h264_gop", "mjpeg", "jpeg"])
@pytest.mark.parametrize("name", ["bt601", "bt709", "bt709 full", "bt2020", "gif", "png"])
def test_colours_stay_what_they_are(tmp_path, name, codec):
    path = patches(tmp_path, name)
    with reading.open_video(path) as video:
        source = video.read([0])[0].astype(float)
    with reading.open_video(transcode.transcode(path, transcode.Form(codec)).video) as video:
        stored = video.read([0])[0]
    for top in (8, 40):
        for left in (8, 40, 72):
            inner = (slice(top, top + 16), slice(left, left + 16))
            assert np.abs(source[inner] - PATCHES[top // 32 * 3 + left // 32]).mean() < 4
            assert np.abs(stored[inner] - source[inner]).mean() < 3


def test_gif_is_a_video_too(tmp_path):
    images = [Image.fromarray(frame) for frame in clips.numbered_frames(8)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    assert sources.from_folder(tmp_path).ids == ("a.gif",)
    assert clips.frame_numbers(decode.read_clip(tmp_path / "a.gif", [2, 7])) == [2, 7]
    with pytest.raises(sources.SourceError, match="is a video"):
        prepared.open_source(str(tmp_path / "a.gif"), "train")
