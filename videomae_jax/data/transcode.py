"""One video, verified by decoding all of it, shrunk, and encoded so that any frame is near.

Measured forms are in docs/performance.md. Colour range and matrix stay those of the source.
"""

import dataclasses
import fractions
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import av
import av.filter

from videomae_jax.data import decode, reading
from videomae_jax.data.reading import AnyVideo

# Options of the encoder; one thread and fixed options give the same bytes each time.
_X264 = {"preset": "fast", "tune": "fastdecode", "aq-mode": "0", **decode.SAME_ON_EVERY_CPU}
CODECS: dict[str, dict[str, str]] = {
    "h264_intra": {**_X264, "crf": "19", "g": "1"},
    "h264_gop": {**_X264, "crf": "20", "g": "16"},
    "mjpeg": {"qmin": "6", "qmax": "6"},
    "keep": {},
}
"""Forms of a prepared video -> options of their encoder; `keep` stores the file's own bytes."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How videos are stored.

    Attributes:
        codec: one of `CODECS`.
        short_side: pixels; larger frames are shrunk to it, smaller ones never enlarged, `keep` is as it was.
    """

    codec: str = "h264_intra"
    short_side: int = 256


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A prepared video, an MP4 file (`keep`: the source's bytes), and what is stored beside it."""

    video: bytes
    frames: int
    fps: float
    height: int
    width: int
    source_sha256: str


def transcode(path: str, form: Form, start: float | None = None, end: float | None = None) -> Encoded:
    """Decodes every frame of a video, or of its seconds [start, end), and encodes it in `form`.

    Frame k of the result shows frame k of the source, at the same time.

    Raises:
        DecodeError: the file cannot be read, or a frame of it cannot be decoded.
    """
    with reading.open_video(path) as video:
        if form.codec == "keep" and start is None and isinstance(video, decode.Video):
            return _keep(path, video)
        if start is not None and start > video.time_of(video.num_frames - 1) - video.time_of(0):
            raise decode.DecodeError(f"{path}: ends before second {start}")
        first = 0 if start is None else video.index_at(start)
        last = video.num_frames if end is None else max(video.index_at(end), first + 1)
        writer = _Writer(form, video)
        for index, frame in enumerate(_verified(video, first, last)):
            writer.write(frame, video.time_of(first + index) - video.time_of(first))
        encoded, height, width = writer.close()
        return Encoded(encoded, last - first, video.fps, height, width, video.digest())


def _keep(path: str, video: decode.Video) -> Encoded:
    sizes = [(frame.height, frame.width, frame.rotation) for frame in _verified(video)]
    height, width, rotation = sizes[0]
    if round(rotation / 90) % 2:
        height, width = width, height
    data = reading.read_bytes(path)
    return Encoded(data, len(sizes), video.fps, height, width, hashlib.sha256(data).hexdigest())


def _verified(video: AnyVideo, first: int = 0, last: int | None = None) -> Iterator[av.VideoFrame]:
    """The frames in [first, last), each of them whole and of one size."""
    last = video.num_frames if last is None else last
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


class _Writer:
    """Frames of a video -> an MP4 in memory."""

    def __init__(self, form: Form, video: AnyVideo):
        self._form, self._video = form, video
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        self._stream: Any = None
        self._time_base = video.time_base

    def write(self, frame: av.VideoFrame, time: fractions.Fraction) -> None:
        """Adds a frame to be shown `time` seconds after the first one."""
        if self._stream is None:
            self._start(frame)
        stream: Any = self._stream
        _, entry, end = self._graph
        entry.push(frame)
        ready: Any = end.pull()
        ready.time_base = self._time_base
        ready.pts = round(time / ready.time_base)
        ready.pict_type = 0  # the encoder chooses
        self._container.mux(stream.encode(ready))

    def close(self) -> tuple[bytes, int, int]:
        """(the file, height, width)."""
        stream: Any = self._stream
        self._container.mux(stream.encode(None))
        self._container.close()
        return self._buffer.getvalue(), stream.height, stream.width

    def _start(self, frame: av.VideoFrame) -> None:
        is_jpeg = self._form.codec == "mjpeg"
        is_full_range = is_jpeg or frame.color_range == 2 or frame.format.name.startswith("yuvj")
        pixels = "yuvj420p" if is_full_range else "yuv420p"
        turns = round(frame.rotation / 90) % 4
        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        self._graph = self._filters(frame, turns, height, width, pixels)
        self._stream = self._container.add_stream(
            "mjpeg" if is_jpeg else "libx264",
            rate=fractions.Fraction(self._video.fps or 25).limit_denominator(1 << 16),
            options=CODECS[self._form.codec],
        )
        self._stream.height, self._stream.width = shrunk(height, width, self._form.short_side)
        self._stream.pix_fmt = pixels
        context = self._stream.codec_context
        context.thread_count = 1
        context.time_base = self._time_base
        context.color_range = 2 if is_full_range else int(frame.color_range)
        context.colorspace = int(frame.colorspace)

    def _filters(self, frame: av.VideoFrame, turns: int, height: int, width: int, pixels: str) -> Any:
        """Upright, even, shrunk, 4:2:0: a graph with its entry and its exit."""
        graph = av.filter.Graph()
        graph.threads = 1
        size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
        colour = f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        nodes = [graph.add("buffer", f"{size}:{colour}")]
        if turns:
            nodes += [graph.add("transpose", "cclock") for _ in range(turns)]
        out_height, out_width = shrunk(height, width, self._form.short_side)
        if min(height, width) <= self._form.short_side:
            nodes.append(graph.add("crop", f"{out_width}:{out_height}:0:0"))
        convert = f"{out_width}:{out_height}:flags=bicubic"
        if pixels == "yuvj420p":
            convert += ":out_range=full"
        nodes += [graph.add("scale", convert), graph.add("format", pixels), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph, nodes[0], nodes[-1]


def shrunk(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Stored (height, width): even, the short side at most `short_side`, the shape kept."""
    scale = min(short_side / min(height, width), 1.0)
    return tuple(max(int(round(side * scale, 6)) // 2 * 2, 2) for side in (height, width))  # type: ignore[return-value]
