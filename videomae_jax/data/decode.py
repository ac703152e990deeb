"""Video files to exact RGB frames by index or time, or a `DecodeError`; nothing is guessed or replaced.

Frame k is the k-th frame that a plain full decode shows. Where the container stores presentation times,
decoding starts at the last key frame before each wanted frame; elsewhere it starts at the beginning.
"""

import bisect
import functools
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

# Containers whose packets carry the times at which frames are shown. Others (AVI, MPEG program streams)
# have libav guess them, wrongly for packed B-frames, so their frames are counted by decoding.
_TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


class DecodeError(Exception):
    """A video, or a wanted frame of it, cannot be decoded; the text names the file and the reason."""


class Video:
    """An open video; use it as a context manager.

    Packets stay in memory while it is open, so memory grows with the file, not with its frames.

    Args:
        source: a local path, or the file's bytes.
        threads: decoder threads; one per loader worker is best, 0 lets libav choose.

    Raises:
        DecodeError: the file is missing, is no video, or holds no frame.
    """

    def __init__(self, source: str | os.PathLike | bytes, threads: int = 1):
        self.name = "video" if isinstance(source, bytes) else os.fspath(source)
        # An absolute path: libav would take the part before a colon for a protocol.
        file = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
        try:
            self._container: Any = av.open(file)  # PyAV's types know neither demux nor seek of it
        except (FFmpegError, OSError, ValueError) as error:  # ValueError: odd paths
            raise self._error("cannot be opened", error) from None
        try:
            self._open(threads)
        except BaseException:
            self._container.close()
            raise

    def _open(self, threads: int) -> None:
        if not self._container.streams.video:
            raise self._error("has no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise self._error("is stored in a codec that this build of PyAV cannot decode")
        self._stream.codec_context.thread_count = threads
        self._reformatter = VideoReformatter()
        try:
            packets = [p for p in self._container.demux(self._stream) if p.size]
        except FFmpegError as error:
            raise self._error("cannot be read", error) from None
        self._packets = packets
        # Packets marked as discarded by an edit list are decoded, never shown.
        shown = sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
        keys = [i for i, p in enumerate(packets) if p.is_keyframe and p.pts is not None]
        key_times = [packets[i].pts for i in keys]
        self._is_timed = (
            self._container.format.name in _TIMED_CONTAINERS
            and all(p.pts is not None for p in packets)
            and len(set(shown)) == len(shown)
            and keys[:1] == [0]
            and key_times == sorted(key_times)
        )
        self._times, self._keys, self._key_times = shown, keys, key_times
        if self.num_frames == 0:
            raise self._error("has no frames")

    def _error(self, what: str, cause: Exception | None = None) -> DecodeError:
        reason = f" ({getattr(cause, 'strerror', None) or cause})" if cause else ""
        return DecodeError(f"{self.name}: {what}{reason}")

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._container.close()

    @functools.cached_property
    def num_frames(self) -> int:
        """Frames that a full decode shows.

        Raises:
            DecodeError: they had to be counted by decoding, and decoding failed.
        """
        return len(self._times) if self._is_timed else sum(1 for _ in self._decode(self._packets))

    @property
    def fps(self) -> float:
        """Average frames per second; 0.0 where the file does not say."""
        return float(self._stream.average_rate or 0)

    def index_at(self, seconds: float) -> int:
        """Index of the frame on show `seconds` after the first one; the last frame after the end.

        Raises:
            DecodeError: the file has neither presentation times nor a frame rate.
        """
        if self._is_timed:
            time = self._times[0] + seconds / float(self._stream.time_base or 1)
            # Half a tick of tolerance: container times are rounded to ticks.
            index = bisect.bisect_right(self._times, time + 0.5) - 1
        elif self.fps:
            index = int(seconds * self.fps + 1e-6)
        else:
            raise self._error("has no frame rate, so frames cannot be found by time")
        return min(max(index, 0), self.num_frames - 1)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the frames at `indices` (any order, repeats allowed), uint8 RGB [T, H, W, 3], upright.

        Raises:
            DecodeError: a wanted frame cannot be decoded.
            IndexError: an index is outside 0..num_frames-1.
        """
        wanted = sorted({int(i) for i in indices})
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise IndexError(f"{self.name}: frames {wanted} of {self.num_frames}")
        frames = dict(self._read_timed(wanted)) if self._is_timed else {}
        missing = [i for i in wanted if i not in frames]
        if missing:  # not timed, or key frames that are not enough to start from (intra refresh)
            frames |= self._read_counted(missing)
        missing = [i for i in wanted if i not in frames]
        if missing:
            raise self._error(f"frame {missing[0]} of {self.num_frames} is damaged")
        if len({frame.shape for frame in frames.values()}) > 1:
            raise self._error("changes its frame size")
        return np.stack([frames[int(i)] for i in indices])

    def _read_counted(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index, frame in enumerate(self._decode(self._packets)):
            if index in wanted:
                yield index, self._to_rgb(frame)
            if index == wanted[-1]:
                return

    def _read_timed(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        index_of = {self._times[i]: i for i in wanted}
        groups: dict[int, set[int]] = {}
        for time in index_of:
            start = self._keys[max(bisect.bisect_right(self._key_times, time) - 1, 0)]
            groups.setdefault(start, set()).add(time)
        for start, times in groups.items():
            left, end = set(times), start
            while left:
                left.discard(self._packets[end].pts)
                end += 1
            for frame in self._decode(self._packets[start:end]):
                if frame.pts in times and not frame.is_corrupt:
                    yield index_of[frame.pts], self._to_rgb(frame)

    def _decode(self, packets: Sequence[av.Packet]) -> Iterator[av.VideoFrame]:
        """All frames of consecutive packets, in the order of presentation, then leaves the decoder empty."""
        context = self._stream.codec_context
        try:
            context.flush_buffers()
            for packet in [*packets, None]:
                yield from context.decode(packet)
        except FFmpegError as error:
            raise self._error("is damaged", error) from None

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.is_corrupt:
            raise self._error("is damaged (the decoder marks a frame as corrupt)")
        try:
            # One thread: the default starts a pool for each frame, three times the cost of a small one.
            rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        except (FFmpegError, ValueError) as error:
            raise self._error("has a frame that cannot be converted to RGB", error) from None
        # The display matrix counts quarter turns counter-clockwise, as rot90 does.
        return np.rot90(rgb, round(frame.rotation / 90) % 4)


def read_clip(source: str | os.PathLike | bytes, indices: Sequence[int]) -> np.ndarray:
    """Opens `source`, reads the frames at `indices`, closes it; see `Video.read`."""
    with Video(source) as video:
        return video.read(indices)


def write_video(path: str | pathlib.Path, frames: np.ndarray, fps: int, crf: int = 18) -> None:
    """Writes uint8 RGB frames [T, H, W, 3] of even size as an H.264 file, one thread: same bytes each time.

    Raises:
        ValueError: an odd width or height, which 4:2:0 colour cannot store.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs an even frame size, not {width}x{height}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
