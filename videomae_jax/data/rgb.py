"""Decoded frames to what a player shows of them: turned upright, a box of them, in 8-bit RGB."""

from collections.abc import Callable
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels; may pass the frame's edges, what lies outside is black."""

ChooseBox = Callable[[int, int], Box]
"""(frame height, frame width) -> the box that is wanted of every frame; called once per read."""

_ONE_DEGREE = 0.0175  # less than that is no turn, as for FFmpeg


class Orientation(NamedTuple):
    """How a stored frame becomes the upright one, in this order; `any` of it: not as it is."""

    is_transposed: bool = False
    is_mirrored: bool = False
    is_flipped: bool = False

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(height, width) as shown."""
        return (frame.width, frame.height) if self.is_transposed else (frame.height, frame.width)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The upright image [H, W, C], a view."""
        image = image.transpose(1, 0, 2) if self.is_transposed else image
        return image[:: -1 if self.is_flipped else 1, :: -1 if self.is_mirrored else 1]


def orientation(frame: av.VideoFrame) -> Orientation:
    """What a frame's display matrix says: nothing, or one of the eight turns and mirrorings of a rectangle.

    Raises:
        ValueError: another angle.
    """
    side_data: Any = frame.side_data  # PyAV's types say text
    data = next((bytes(data) for data in side_data if data.type == Type.DISPLAYMATRIX), b"")
    if not data:
        return Orientation()
    # (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].astype(float)
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > _ONE_DEGREE * max(straight, turned):
        raise ValueError("it is shown at an angle that is no quarter turn")
    if turned > straight:
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


class ToRgb:
    """Decoded frames -> upright uint8 RGB of one box, the same box for all of them.

    Raises:
        ValueError: a frame that is shown turned by anything but quarters.
    """

    # libav converts these pixel by pixel where the height is even: a part of the frame equals that part of
    # the whole. Elsewhere it interpolates colour across the edge.
    _LOCAL_FORMATS = ("yuv420p", "yuvj420p")
    _GRID = 8  # pixels; a multiple of what libav converts at a time

    def __init__(self, choose_box: ChooseBox | None):
        self._choose_box = choose_box
        self._box: Box | None = None
        self._reformatter = VideoReformatter()
        self._graph: tuple[Any, Any, Any] | None = None  # a filter that crops, its entry and its exit

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        way = orientation(frame)
        if self._choose_box is None:
            return way.apply(self._convert(frame))
        height, width = way.size(frame)
        self._box = self._box or self._choose_box(height, width)
        if any(way) or frame.format.name not in self._LOCAL_FORMATS or frame.height % 2:
            return crop(way.apply(self._convert(frame)), self._box)
        top, left = (max(start, 0) // self._GRID * self._GRID for start in self._box[:2])
        bottom, right = (
            min(-(-(start + length) // self._GRID) * self._GRID, edge)
            for start, length, edge in zip(self._box[:2], self._box[2:], (height, width), strict=True)
        )
        if (bottom - top, right - left) != (height, width):
            frame = self._cropped(frame, (top, left, bottom - top, right - left))
        return crop(self._convert(frame), (self._box[0] - top, self._box[1] - left, *self._box[2:]))

    def _cropped(self, frame: av.VideoFrame, box: Box) -> av.VideoFrame:
        """A view of the frame's planes, not a copy."""
        if self._graph is None:
            top, left, height, width = box
            graph = av.filter.Graph()
            graph.threads = 1
            size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
            colour = f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
            filters = [
                graph.add("buffer", f"{size}:{colour}"),
                graph.add("crop", f"{width}:{height}:{left}:{top}:exact=1"),
                graph.add("buffersink"),
            ]
            graph.link_nodes(*filters).configure()
            # The graph too: its filters do not keep it alive, and crash without it.
            self._graph = graph, filters[0], filters[2]
        _, entry, end = self._graph
        entry.push(frame)
        return end.pull()

    def _convert(self, frame: av.VideoFrame) -> np.ndarray:
        # One thread: the default starts a pool for each frame, three times the cost of a small one.
        return self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()


def crop(frame: np.ndarray, box: Box) -> np.ndarray:
    """A box of one frame [H, W, C]; what lies outside the frame is black."""
    top, left, height, width = box
    inside = frame[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == (height, width):
        return inside
    padded = np.zeros((height, width, frame.shape[-1]), frame.dtype)
    y, x = max(-top, 0), max(-left, 0)
    padded[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return padded
