"""One video, verified by decoding all of it, shrunk, and encoded so that any frame is near.

Measured forms are in docs/performance.md. Colour range and matrix stay those of the source, but for JPEG,
which has BT.601 in full range, and for RGB, which becomes BT.601.
"""

import dataclasses
import fractions
import functools
import hashlib
import io
import itertools
import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import av
import av.filter
from av.error import FFmpegError

from videomae_jax.data import decode, images, reading, rgb
from videomae_jax.data.reading import AnyVideo

# Options of the encoder; one thread and fixed options give the same bytes each time.
_X264 = {"preset": "fast", "tune": "fastdecode", "aq-mode": "0", **decode.SAME_ON_EVERY_CPU}
CODECS: dict[str, dict[str, str]] = {
    "jpeg": {"qmin": "6", "qmax": "6"},
    "h264_intra": {**_X264, "crf": "19", "g": "1"},
    "h264_gop": {**_X264, "crf": "20", "g": "16"},
    "mjpeg": {"qmin": "6", "qmax": "6"},
    "keep": {},
}
"""Forms of a prepared video -> options of their encoder.

`mjpeg` is a file of JPEGs, `jpeg` the same JPEGs as `images` has them; `keep` stores the file's own bytes.
"""


_RGB, _BT601 = 0, 6  # AVColorSpace
LARGEST = 2**31 - 2**20  # bytes of a video: a message of protobuf has less than 2 GiB


@dataclasses.dataclass(frozen=True)
class Form:
    """How videos are stored.

    Attributes:
        codec: one of `CODECS`.
        short_side: pixels; larger frames are shrunk to it, smaller ones never enlarged, `keep` is as it was.
    """

    codec: str = "jpeg"
    short_side: int = 256


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A prepared video, an MP4 file (`jpeg`: see `images`; `keep`: the source's bytes), and what is stored
    beside it.

    Attributes:
        early: seconds that the first frame of a part is on show before the part begins.
    """

    video: bytes
    frames: int
    fps: float
    height: int
    width: int
    source_sha256: str
    early: float = 0.0


def transcode(path: str, form: Form, start: float | None = None, end: float | None = None) -> Encoded:
    """Decodes every frame of a video, or of its seconds [start, end), and encodes it in `form`.

    Frame k of the result shows frame k of the source, at the same time.

    Raises:
        DecodeError: the file cannot be read, or a frame of it cannot be decoded or encoded.
    """
    if start is not None and form.codec != "keep":
        status = os.stat(path) if os.path.isfile(path) else None
        video, digest = _divided(path, status and (status.st_size, status.st_mtime_ns), threading.get_ident())
        return _part(video, digest, form, start, end)
    with reading.open_video(path) as video:
        if form.codec != "keep":
            return _part(video, video.digest(), form, start, end)
        if start is not None or not isinstance(video, decode.Video):
            raise decode.DecodeError(f"{path}: keep stores whole files only: use another codec")
        return _keep(path, video)


@functools.lru_cache(maxsize=2)
def _divided(path: str, _version: tuple[int, int] | None, _thread: int) -> tuple[AnyVideo, str]:
    """(a video of which several parts are stored, its hash): a movie of AVA has 900. One for each thread."""
    video = reading.open_video(path)
    return video, video.digest()


def _part(video: AnyVideo, digest: str, form: Form, start: float | None, end: float | None) -> Encoded:
    first, last = _span(video, start, end)
    try:
        encoded, height, width = _encode(video, first, last, form)
        if form.codec == "jpeg":
            encoded = _unpacked(video, encoded, last - first, (height, width))
    except (FFmpegError, ValueError, OverflowError, struct.error) as error:
        raise decode.DecodeError(f"{video.name}: cannot be encoded as {form.codec} ({error})") from None
    _check_length(video, encoded)
    begin, shown = video.time_of(0), video.time_of(first)
    if start is None or begin is None or shown is None:
        return Encoded(encoded, last - first, video.fps, height, width, digest)
    early = start - float(shown - begin)
    return Encoded(encoded, last - first, video.fps, height, width, digest, early)


def _unpacked(video: AnyVideo, mp4: bytes, length: int, size: tuple[int, int]) -> bytes:
    """The JPEGs of a file of them, with the file's times, as `images` has them.

    Its ticks are fine, where those of a source can be as long as a frame.
    """
    with av.open(io.BytesIO(mp4), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        ticks = container.streams.video[0].time_base
        assert ticks is not None
        tick = fractions.Fraction(ticks.numerator, ticks.denominator)
    if len(packets) != length:
        raise ValueError(f"{len(packets)} of {length} images")
    times = [packet.pts or 0 for packet in packets]
    rate = fractions.Fraction(video.fps).limit_denominator(1 << 16)
    return images.pack([bytes(p) for p in packets], times, size, tick if video.time_base else None, rate)


def _span(video: AnyVideo, start: float | None, end: float | None) -> tuple[int, int]:
    """Frames [first, last) that are on show in the seconds [start, end)."""
    if start is None or end is None:
        return 0, video.num_frames
    first = video.index_at(start)
    times = [video.time_of(index) for index in (0, video.num_frames - 1)]
    length = float(times[1] - times[0]) if times[0] is not None and times[1] is not None else 0.0
    if start > length:
        raise decode.DecodeError(f"{video.name}: ends before second {start}")
    return first, video.num_frames if end > length else max(video.index_at(end), first + 1)


def _check_length(video: AnyVideo, data: bytes) -> None:
    if len(data) > LARGEST:
        raise decode.DecodeError(
            f"{video.name}: takes {len(data) / 2**30:.1f} GiB, and a record holds less than two: cut it into "
            f"parts, or prepare it smaller (--short_side, --codec)"
        )


def _keep(path: str, video: decode.Video) -> Encoded:
    try:
        sizes = [rgb.orientation(frame).size(frame) for frame in _verified(video, 0, video.num_frames)]
    except ValueError as error:
        raise decode.DecodeError(f"{video.name}: {error}") from None
    height, width = sizes[0]
    data = reading.read_bytes(path)
    _check_length(video, data)
    return Encoded(data, len(sizes), video.fps, height, width, hashlib.sha256(data).hexdigest())


def _verified(video: AnyVideo, first: int, last: int) -> Iterator[av.VideoFrame]:
    """The frames in [first, last), each of them whole and of one size."""
    count, size = 0, None
    for frame in video.frames(first, last):
        size = size or (frame.width, frame.height)
        if frame.is_corrupt or size != (frame.width, frame.height):
            fault = "is damaged" if frame.is_corrupt else "changes the frame size"
            raise decode.DecodeError(f"{video.name}: frame {first + count} {fault}")
        count += 1
        yield frame
    if count != last - first:
        raise decode.DecodeError(f"{video.name}: {count} of {last - first} frames can be decoded")


def _encode(video: AnyVideo, first: int, last: int, form: Form) -> tuple[bytes, int, int]:
    """(an MP4 of the frames [first, last), its height, its width)."""
    buffer = io.BytesIO()
    frames = _verified(video, first, last)
    sample = next(frames)
    is_jpeg = form.codec in ("mjpeg", "jpeg")
    is_full_range = is_jpeg or sample.color_range == 2 or sample.format.name.startswith("yuvj")
    pixels = "yuvj420p" if is_full_range else "yuv420p"
    # JPEG has one matrix, and RGB none: both become BT.601, as readers take them.
    has_matrix = not is_jpeg and sample.format.components[0].is_luma and int(sample.colorspace) != _RGB
    graph, entry, end = _filters(sample, pixels, form.short_side, "" if has_matrix else "bt601")
    tick = video.time_base or fractions.Fraction(1, 25)
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "mjpeg" if is_jpeg else "libx264",
            rate=fractions.Fraction(video.fps or 25).limit_denominator(1 << 16),
            options=CODECS[form.codec],
        )
        if video.time_base is None:
            container.metadata["comment"] = decode.NO_RATE
        stream.height, stream.width = shrunk(*rgb.orientation(sample).size(sample), form.short_side)
        stream.pix_fmt = pixels
        context = stream.codec_context
        context.thread_count = 1
        context.time_base = tick
        context.color_range = 2 if is_full_range else int(sample.color_range)
        context.colorspace = int(sample.colorspace) if has_matrix else _BT601
        for index, frame in enumerate(itertools.chain([sample], frames), first):
            entry.push(frame)
            ready = end.pull()
            ready.time_base = tick
            ready.pts = _ticks(video, first, index)
            ready.pict_type = 0  # the encoder chooses
            container.mux(stream.encode(ready))
        container.mux(stream.encode(None))
    del graph  # its filters do not keep it alive
    return buffer.getvalue(), stream.height, stream.width


def _ticks(video: AnyVideo, first: int, index: int) -> int:
    """Time of a frame after that of `first`, in ticks; one a frame where times are unknown."""
    start, time = video.time_of(first), video.time_of(index)
    if start is None or time is None or video.time_base is None:
        return index - first
    return round((time - start) / video.time_base)


def _filters(
    frame: av.VideoFrame, pixels: str, short_side: int, matrix: str
) -> tuple[av.filter.Graph, Any, Any]:
    """(a graph that turns frames upright, makes them even, shrinks them to 4:2:0, its entry, its exit).

    `matrix` of the result; "": that of the frame.
    """
    graph = av.filter.Graph()
    graph.threads = 1
    size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
    colour = f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    nodes = [graph.add("buffer", f"{size}:{colour}")]
    way = rgb.orientation(frame)
    nodes += [graph.add("transpose", "cclock_flip")] if way.is_transposed else []
    nodes += [graph.add("hflip")] if way.is_mirrored else []
    nodes += [graph.add("vflip")] if way.is_flipped else []
    height, width = shrunk(*way.size(frame), short_side)
    if min(way.size(frame)) <= short_side:
        nodes.append(graph.add("crop", f"{width}:{height}:0:0"))
    out_range = ":out_range=full" if pixels == "yuvj420p" else ""
    out_matrix = f":out_color_matrix={matrix}" if matrix else ""
    nodes.append(graph.add("scale", f"{width}:{height}:flags=bicubic{out_range}{out_matrix}"))
    nodes += [graph.add("format", pixels), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph, nodes[0], nodes[-1]


def shrunk(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Stored (height, width): even, the short side at most `short_side`, the shape kept."""
    scale = min(short_side / min(height, width), 1.0)

    def even(side: int) -> int:
        return max(int(round(side * scale, 6)) // 2 * 2, 2)

    return even(height), even(width)
