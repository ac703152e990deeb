"""Videos that are images: of a folder, or JPEGs one after the other in a prepared record.

A prepared one is a header, the time and the end of each frame, and the images: any frame is found and decoded
by itself. All numbers are little-endian.

    magic 8 bytes, frames, height, width, tick (2 numbers), rate (2 numbers): uint32; a tick of 0: no times
    int64 [frames]    when each is shown, in ticks of numerator / denominator seconds
    uint64 [frames]   where each ends, from the first image on
    JPEG files        BT.601, full range, as JFIF has it
"""

import abc
import bisect
import fractions
import hashlib
import struct
from collections.abc import Iterator, Sequence

import av
import numpy as np
import simplejpeg

from videomae_jax.data import decode, rgb

MAGIC = b"vmjpegs1"
_HEADER = struct.Struct("<8s7I")


class Images(abc.ABC):
    """A video whose frames are found by their number; as `decode.Video`, for reading."""

    name: str

    def __enter__(self) -> "Images":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Nothing is open between reads."""
        return

    @property
    @abc.abstractmethod
    def num_frames(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def image(self, index: int) -> np.ndarray:
        """Frame `index`, uint8 RGB [H, W, 3].

        Raises:
            DecodeError: it cannot be read.
        """

    def where(self, index: int) -> str:
        """What an error calls frame `index`."""
        return f"{self.name}: frame {index}"

    @abc.abstractmethod
    def digest(self) -> str:
        """SHA-256 of what is stored."""

    @property
    def fps(self) -> float:
        """Frames per second; 0.0 where nothing says."""
        return 0.0

    @property
    def time_base(self) -> fractions.Fraction | None:
        """Seconds per tick; None where nothing says."""
        return None

    def time_of(self, _index: int) -> fractions.Fraction | None:
        """When a frame is shown, in seconds; None: unknown."""
        return None

    def index_at(self, _seconds: float) -> int:
        """As `decode.Video.index_at`.

        Raises:
            DecodeError: there is no frame rate.
        """
        raise decode.DecodeError(f"{self.name}: has no frame rate, so frames cannot be found by time")

    def frames(self, first: int = 0, last: int | None = None) -> Iterator[av.VideoFrame]:
        """Images [first, last), as `decode.Video.frames`.

        Raises:
            DecodeError: an image cannot be read.
        """
        for index in range(first, self.num_frames if last is None else last):
            yield av.VideoFrame.from_ndarray(self.image(index), format="rgb24")

    def read(
        self, indices: Sequence[int] | np.ndarray, choose_box: rgb.ChooseBox | None = None
    ) -> np.ndarray:
        """As `decode.Video.read`; images are taken as they are stored (no EXIF turn).

        Raises:
            DecodeError: an image cannot be read, or has another size than the first.
            IndexError: an index is outside 0..num_frames-1.
        """
        wanted = decode.in_range(indices, self.num_frames, self.name)
        return decode.placed(indices, wanted, self.each(wanted, choose_box))

    def each(self, wanted: Sequence[int], choose_box: rgb.ChooseBox | None = None) -> Iterator[np.ndarray]:
        """As `decode.Video.each`.

        Raises:
            DecodeError: an image cannot be read, or has another size than the first.
        """
        box, size = None, None
        for index in wanted:
            frame = self.image(index)
            size = size or frame.shape
            if frame.shape != size:
                raise decode.DecodeError(
                    f"{self.where(index)}: is {frame.shape[1]}x{frame.shape[0]}, not {size[1]}x{size[0]}"
                )
            if choose_box is not None:
                box = box or choose_box(*frame.shape[:2])
                frame = rgb.crop(frame, box)
            yield frame


class JpegFrames(Images):
    """The images of a prepared record.

    Args:
        data: what `pack` made.
        name: in errors.

    Raises:
        DecodeError: it is cut off, or what it says does not fit together.
    """

    def __init__(self, data: bytes | memoryview, name: str = "video"):
        self.name, self._data = name, memoryview(data)
        if len(data) < _HEADER.size:
            raise self._damaged("its header is cut off")
        magic, count, self._height, self._width, *tick_and_rate = _HEADER.unpack_from(data)
        table = _HEADER.size + 16 * count
        if magic != MAGIC or not count or len(data) < table:
            raise self._damaged("its header or its table of frames")
        self._times = np.frombuffer(data, "<i8", count, _HEADER.size)
        self._ends = np.frombuffer(data, "<u8", count, _HEADER.size + 8 * count)
        self._images = self._data[table:]
        if int(self._ends[-1]) != len(self._images) or (np.diff(self._ends.astype(np.int64)) <= 0).any():
            raise self._damaged("its table of frames does not fit its length")
        tick, self._rate = (
            fractions.Fraction(top, bottom) if bottom else fractions.Fraction(0)
            for top, bottom in (tick_and_rate[:2], tick_and_rate[2:])
        )
        self._tick = tick or None

    def _damaged(self, what: str) -> decode.DecodeError:
        return decode.DecodeError(f"{self.name}: is damaged ({what})")

    @property
    def num_frames(self) -> int:
        """Number of images."""
        return len(self._ends)

    @property
    def fps(self) -> float:
        """Frames per second; 0.0 where its source did not say."""
        return float(self._rate)

    @property
    def time_base(self) -> fractions.Fraction | None:
        """Seconds per tick; None where its source had no times."""
        return self._tick

    def time_of(self, index: int) -> fractions.Fraction | None:
        """When frame `index` is shown, in seconds; None: unknown."""
        return self._tick * int(self._times[index]) if self._tick else None

    def index_at(self, seconds: float) -> int:
        """As `decode.Video.index_at`.

        Raises:
            DecodeError: its source had neither times nor a frame rate.
        """
        if self._tick is None:
            return super().index_at(seconds)
        # Half a tick of tolerance: times are rounded to ticks.
        time = int(self._times[0]) + seconds / float(self._tick) + 0.5
        return min(max(bisect.bisect_right(self._times, time) - 1, 0), self.num_frames - 1)

    def digest(self) -> str:
        """SHA-256 of the record's video."""
        return hashlib.sha256(self._data).hexdigest()

    def image(self, index: int) -> np.ndarray:
        """Frame `index`, uint8 RGB [H, W, 3].

        Raises:
            DecodeError: the image is damaged.
        """
        start = int(self._ends[index - 1]) if index else 0
        try:
            image = simplejpeg.decode_jpeg(self._images[start : int(self._ends[index])], "RGB")
        except ValueError as error:
            raise self._damaged(f"frame {index}: {error}") from None
        if image.shape != (self._height, self._width, 3):
            raise self._damaged(f"frame {index} is {image.shape[1]}x{image.shape[0]}")
        return image


def pack(
    images: Sequence[bytes],
    times: Sequence[int],
    size: tuple[int, int],
    tick: fractions.Fraction | None,
    rate: fractions.Fraction,
) -> bytes:
    """The bytes of a prepared video.

    Args:
        times: when each is shown, in ticks, rising.
        size: (height, width).
        tick: seconds; None: unknown.
        rate: frames per second; 0: unknown.
    """
    tick = tick or fractions.Fraction(0)
    numbers = (len(images), *size, tick.numerator, tick.denominator, rate.numerator, rate.denominator)
    ends = np.cumsum([len(image) for image in images])
    head = _HEADER.pack(MAGIC, *numbers) + np.asarray(times, "<i8").tobytes() + ends.astype("<u8").tobytes()
    return b"".join([head, *images])
