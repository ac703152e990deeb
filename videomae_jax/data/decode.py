"""Video files to exact RGB frames by index or time, or a `DecodeError`; nothing is guessed or replaced.

Frame k is the k-th frame that a plain full decode shows. Where the container stores presentation times,
decoding starts at the last key frame before each wanted frame; elsewhere it starts at the beginning. So it
does where what a container says turns out wrong: times that are those of decoding, key frames that are none.
"""

import array
import bisect
import collections
import contextlib
import fractions
import hashlib
import io
import itertools
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from videomae_jax.data import marks
from videomae_jax.data.marks import Mark
from videomae_jax.data.rgb import ChooseBox, ToRgb

# Containers whose packets carry the times at which frames are shown. Others (AVI, MPEG program streams)
# have libav guess them, wrongly for packed B-frames, so their frames are counted by decoding.
_TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

# Demuxers of files that are one video each. Others open what a file names (concat, playlists), or guess.
_CONTAINERS = (
    *("mov", "matroska", "avi", "flv", "mpeg", "mpegvideo", "mpegts", "ogg", "asf", "gif", "mxf", "dv", "rm"),
    *("nut", "ivf", "yuv4mpegpipe", "apng", "wtv", "gxf", "amv", "h264", "hevc", "m4v", "mjpeg"),
)

NO_RATE = "videomae_jax: no frame rate"
"""Comment in a prepared video whose source has no times: those of its container mean nothing."""


class DecodeError(Exception):
    """A video, or a wanted frame of it, cannot be decoded; the text names the file and the reason."""


class ReadError(DecodeError):
    """A file cannot be read, or not at present: it says nothing of the video."""


class Video:
    """An open video; use it as a context manager.

    It keeps the times of the frames, not the packets: memory does not grow with the file's bytes.

    Args:
        source: a local path, or the file's bytes.
        name: in errors, of bytes.

    Raises:
        DecodeError: the file is missing, is no video, or holds no frame.
    """

    def __init__(self, source: str | os.PathLike | bytes, name: str = "video"):
        self.name = name if isinstance(source, bytes) else os.fspath(source)
        self._source = source
        self._open()
        try:
            self._has_no_times = self._container.metadata.get("comment") == NO_RATE
            self._rate = self._read_rate()
            self._index()
        except BaseException:
            self._container.close()
            raise

    def _open(self) -> None:
        """Opens the file at its first packet, with an empty decoder."""
        options = {"format_whitelist": ",".join(_CONTAINERS), "protocol_whitelist": "file"}
        try:
            # PyAV's types know neither demux nor seek of it. Tags need not be UTF-8.
            self._container: Any = av.open(self._file(), metadata_errors="replace", container_options=options)
        except (FFmpegError, OSError, ValueError) as error:  # ValueError: odd paths
            raise self._error("cannot be opened", error) from None
        try:
            self._stream = self._best_stream()
            if self._stream.codec_context is None:
                raise self._error("is stored in a codec that this build of PyAV cannot decode")
            self._stream.codec_context.thread_count = 1  # loaders have many workers
            self._is_at_start = True
        except BaseException:
            self._container.close()
            raise

    def _file(self) -> str | io.BytesIO:
        """What libav opens.

        Raises:
            DecodeError: no regular file; a pipe would be waited for.
        """
        if isinstance(self._source, bytes):
            return io.BytesIO(self._source)
        # An absolute path: libav would take the part before a colon for a protocol.
        path = os.path.abspath(self._source)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise self._error("is no regular file")
        return path

    def _best_stream(self) -> Any:
        """The stream that `ffmpeg -i FILE` decodes: the largest, one marked as default before all others.

        Raises:
            DecodeError: there is none but pictures, such as the cover of a song.
        """
        pictures = Disposition.attached_pic | Disposition.timed_thumbnails
        videos = [stream for stream in self._container.streams.video if not stream.disposition & pictures]
        if not videos:
            raise self._error("has no video stream")

        def score(stream: Any) -> int:
            context = stream.codec_context
            area = context.width * context.height if context else 0
            return area + 5_000_000 * bool(stream.disposition & Disposition.default)

        return max(videos, key=score)

    def _index(self) -> None:
        version = None if isinstance(self._source, bytes) else marks.version_of(os.path.abspath(self._source))
        self._known = marks.known.find(version) or self._read_index()
        self._times, self._keys, self._is_timed = self._known.times, self._known.keys, self._known.is_timed
        self._key_times: list[int] = [mark.pts for mark in self._keys if mark.pts is not None]
        if self.num_frames == 0:
            raise self._error("has no frames")
        marks.known.keep(version, self._known)

    def _read_index(self) -> marks.Index:
        found = self._container_index() or [_mark(packet) for packet in self._demux()]
        # Packets marked as discarded by an edit list are decoded, never shown.
        times = sorted(m.pts for m in found if m.pts is not None and not m.is_discard)
        keys = [mark for mark in found if mark.is_key and mark.pts is not None]
        key_times = [mark.pts for mark in keys if mark.pts is not None]
        # Rising with decoding although the codec reorders: remuxed from a form without times.
        shown = [mark.pts for mark in found if mark.pts is not None]
        are_of_decoding = bool(self._stream.codec_context.has_b_frames) and shown == sorted(shown)
        is_timed = (
            self._container.format.name in _TIMED_CONTAINERS
            and not are_of_decoding
            and all(mark.pts is not None for mark in found)
            and len(set(times)) == len(times)
            and keys[:1] == found[:1]
            and key_times == sorted(key_times)
        )
        return marks.Index(array.array("q", times), keys, is_timed)

    def _container_index(self) -> list[Mark]:
        """The packets as an MP4's own index has them, if it is enough: every frame a key frame, in order.

        It lacks the times of presentation, which differ where frames are decoded out of order. A file without
        a table of key frames says the same of all its frames; `_read_timed` finds out.
        """
        if self._container.format.name != _TIMED_CONTAINERS[0] or self._stream.codec_context.has_b_frames:
            return []
        found = [
            Mark(e.timestamp, e.timestamp, e.is_keyframe, e.is_discard) for e in self._stream.index_entries
        ]
        if not found or not all(mark.is_key for mark in found):
            return []
        return found if [_mark(packet) for packet in itertools.islice(self._demux(), 1)] == found[:1] else []

    def _error(self, what: str, cause: Exception | None = None) -> DecodeError:
        reason = f" ({getattr(cause, 'strerror', None) or cause})" if cause else ""
        # libav's errors of the system are errors of Python's system too.
        kind = ReadError if isinstance(cause, OSError) else DecodeError
        return kind(f"{self.name}: {what}{reason}")

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._container.close()

    @property
    def num_frames(self) -> int:
        """Frames that a full decode shows.

        Raises:
            DecodeError: they had to be counted by decoding, and decoding failed.
        """
        if self._is_timed:
            return len(self._times)
        if self._known.counted is None:
            self._known.counted = sum(1 for _ in self.frames())
        return self._known.counted

    @property
    def fps(self) -> float:
        """Average frames per second; 0.0 where the file does not say."""
        return float(self._rate)

    def _read_rate(self) -> fractions.Fraction:
        rate = self._stream.average_rate or self._stream.guessed_rate
        if self._has_no_times or not rate:
            return fractions.Fraction(0)
        return fractions.Fraction(rate.numerator, rate.denominator)  # PyAV has rationals of its own

    def digest(self) -> str:
        """SHA-256 of the file's bytes.

        Raises:
            DecodeError: it has gone.
        """
        if isinstance(self._source, bytes):
            return hashlib.sha256(self._source).hexdigest()
        try:
            with open(self._source, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._error("cannot be read", error) from None

    def index_at(self, seconds: float) -> int:
        """Index of the frame on show `seconds` after the first one; the last frame after the end.

        Raises:
            DecodeError: the file has neither times nor a frame rate.
        """
        if self._is_timed and not self._has_no_times:
            time = self._times[0] + seconds / float(self._stream.time_base or 1)
            # Half a tick of tolerance: container times are rounded to ticks.
            index = bisect.bisect_right(self._times, time + 0.5) - 1
        elif self.fps:
            index = int(seconds * self.fps + 1e-6)
        else:
            raise self._error("has no frame rate, so frames cannot be found by time")
        return min(max(index, 0), self.num_frames - 1)

    def read(self, indices: Sequence[int] | np.ndarray, choose_box: ChooseBox | None = None) -> np.ndarray:
        """Returns the frames at `indices` (any order, repeats allowed), uint8 RGB [T, H, W, 3], upright.

        With `choose_box` only that box of each frame is converted and returned; the pixels are those of the
        whole frames.

        Raises:
            DecodeError: a wanted frame cannot be decoded.
            IndexError: an index is outside 0..num_frames-1.
        """
        wanted = in_range(indices, self.num_frames, self.name)
        return placed(indices, wanted, self.each(wanted, choose_box))

    def each(self, wanted: Sequence[int], choose_box: ChooseBox | None = None) -> Iterator[np.ndarray]:
        """The frames at rising indices, as `read` has them, one after the other in one pass over the file.

        Raises:
            DecodeError: a wanted frame cannot be decoded.
        """
        to_rgb, size, left = ToRgb(choose_box), None, collections.deque(wanted)
        for index, frame in self._found(list(wanted)):
            if index != left[0]:
                break
            left.popleft()
            if frame.is_corrupt:
                raise self._error("is damaged (the decoder marks a frame as corrupt)")
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise self._error("changes its frame size")
            try:
                image = to_rgb(frame)
            except (FFmpegError, ValueError) as error:
                raise self._error("has a frame that cannot be converted to RGB", error) from None
            yield image
        if left:
            raise self._error(f"frame {left[0]} of {self.num_frames} is damaged")

    def _found(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) of what can be decoded of rising indices.

        Counted from the first on that cannot be had by its time: of a file without times, or whose key frames
        are not enough to start from (intra refresh) or none.
        """
        done = 0
        for index, frame in self._read_timed(wanted):
            if index != wanted[done]:
                break
            yield index, frame
            done += 1
        yield from self._read_counted(wanted[done:])

    @property
    def time_base(self) -> fractions.Fraction | None:
        """Seconds per tick, of `time_of`; None: unknown."""
        base = self._stream.time_base
        if self._is_timed and base and not self._has_no_times:
            return fractions.Fraction(base.numerator, base.denominator)
        return 1 / self._rate if self._rate else None

    def time_of(self, index: int) -> fractions.Fraction | None:
        """When frame `index` is shown, in seconds; by the rate where there are no times; None: unknown."""
        base = self.time_base
        return None if base is None else base * (self._times[index] if self._is_timed else index)

    def frames(self, first: int = 0, last: int | None = None) -> Iterator[av.VideoFrame]:
        """Frames [first, last) in the order of presentation, as stored (not turned), whole or corrupt.

        Raises:
            DecodeError: the file is damaged.
        """
        if first and self._is_timed:
            last = self.num_frames if last is None else last
            yield from (frame for _, frame in self._found(list(range(first, last))))
            return
        if not self._is_at_start:
            self._container.close()
            self._open()
        yield from itertools.islice(self._decode(self._demux()), first, last)

    def _read_counted(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        asked = set(wanted)
        for index, frame in enumerate(self.frames()) if wanted else ():
            if index in asked:
                yield index, frame
            if index == wanted[-1]:
                return

    def _read_timed(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        index_of = {self._times[i]: i for i in wanted} if self._is_timed else {}
        groups: dict[Mark, set[int]] = {}
        for time in index_of:
            start = self._keys[max(bisect.bisect_right(self._key_times, time) - 1, 0)]
            groups.setdefault(start, set()).add(time)
        for start, times in groups.items():
            before = None
            try:
                for frame in self._decode(self._needed(start, set(times)), times):
                    if before is None and not frame.key_frame:
                        return  # no key frame, whatever the container says: frames are counted
                    if before is not None and frame.pts is not None and frame.pts <= before:
                        return  # not the times of presentation
                    before = frame.pts
                    if frame.pts in times and not frame.is_corrupt:
                        yield index_of[frame.pts], frame
            except DecodeError:
                return  # what did not start at a key frame fails too: counting tells

    def _needed(self, start: Mark, times: set[int]) -> Iterator[av.Packet]:
        """Packets from the key frame `start` to the last of those shown at `times`."""
        self._is_at_start = False
        try:
            self._container.seek(start.dts if start.dts is not None else start.pts, stream=self._stream)
        except FFmpegError:
            return  # a file without a usable index: its frames are counted
        for packet in itertools.dropwhile(lambda packet: packet.pts != start.pts, self._demux()):
            yield packet
            times.discard(packet.pts)
            if not times:
                return

    def _demux(self) -> Iterator[av.Packet]:
        self._is_at_start = False
        try:
            # Closed here: a demuxer that is merely dropped half-way leaks a kilobyte.
            with contextlib.closing(self._container.demux(self._stream)) as packets:
                for packet in packets:
                    if packet.size:
                        yield packet
        except FFmpegError as error:
            raise self._error("cannot be read", error) from None

    def _decode(
        self, packets: Iterable[av.Packet], times: Collection[int] | None = None
    ) -> Iterator[av.VideoFrame]:
        """Frames of consecutive packets in the order of presentation, then leaves the decoder empty.

        With `times`, frames shown at other times are left out where no frame depends on them.
        """
        context = self._stream.codec_context
        try:
            context.flush_buffers()
            for packet in itertools.chain(packets, [None]):
                is_wanted = times is None or packet is None or packet.pts in times
                context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
                yield from context.decode(packet)
        except FFmpegError as error:
            raise self._error("is damaged", error) from None


def in_range(indices: Sequence[int] | np.ndarray, num_frames: int, name: str) -> list[int]:
    """The frames at `indices`, each once, rising.

    Raises:
        IndexError: one is outside 0..num_frames-1, or there is none.
    """
    wanted = sorted({int(i) for i in indices})
    if not wanted or wanted[0] < 0 or wanted[-1] >= num_frames:
        raise IndexError(f"{name}: frames {wanted} of {num_frames}")
    return wanted


def placed(
    indices: Sequence[int] | np.ndarray, wanted: Sequence[int], frames: Iterable[np.ndarray]
) -> np.ndarray:
    """Frames [H, W, C] of `wanted` as `indices` ask for them, uint8 [T, H, W, C]."""
    found = dict(zip(wanted, frames, strict=True))
    return np.stack([found[int(i)] for i in indices])


def _mark(packet: av.Packet) -> Mark:
    return Mark(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)


SAME_ON_EVERY_CPU = {"x264-params": "cpu-independent=1"}
"""Option of libx264 without which its bytes differ between processors, and for tiny frames between calls."""


def read_clip(source: str | os.PathLike | bytes, indices: Sequence[int]) -> np.ndarray:
    """Opens `source`, reads the frames at `indices`, closes it; see `Video.read`."""
    with Video(source) as video:
        return video.read(indices)


def write_video(
    path: str | os.PathLike, frames: Iterable[np.ndarray], fps: int | fractions.Fraction, crf: int = 18
) -> None:
    """Writes uint8 RGB frames [H, W, 3] of even size as an H.264 file, one thread: same bytes each time.

    Raises:
        ValueError: an odd width or height, which 4:2:0 colour cannot store; no frame.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("a video needs a frame")
    height, width, _ = first.shape
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs an even frame size, not {width}x{height}")
    options = {"crf": str(crf), "preset": "veryfast", **SAME_ON_EVERY_CPU}
    # Players begin before they have all of it.
    with av.open(str(path), "w", container_options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in itertools.chain([first], frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
