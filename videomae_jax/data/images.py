"""Videos that are images: of a folder, or JPEGs one after the other in a prepared record.

A prepared one is a header, the time and the end of each frame, and the images: any frame is found and decoded
by itself. All numbers are little-endian.

    magic 8 bytes, check uint32: the CRC-32 of what follows, up to the images
    frames, height, width, tick (2 numbers), rate (2 numbers): uint32; a tick of 0: no times
    int64 [frames]    when each is shown, in ticks of numerator / denominator seconds
    uint64 [frames]   where each ends, from the first image on
    uint32 [frames]   CRC-32 of each image: a JPEG with a wrong byte may well decode
    JPEG files        BT.601, full range, as JFIF has it
"""

import abc
import bisect
import fractions
import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence

import av
import numpy as np
import simplejpeg

from videomae_jax.data import decode, ranges, rgb

MAGIC = b"vmjpegs1"
_HEADER = struct.Struct("<8s8I")
_CHECKED_FROM = 12  # behind magic and check
_PER_FRAME = 8 + 8 + 4
_FIRST_READ = 2**13  # bytes: header and table of 400 frames


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
        data: what `pack` made; of a value in a file only what is needed is read.
        name: in errors.

    Attributes:
        check: of the whole record, frames too: what tells it from others.

    Raises:
        ReadError: it cannot be read.
        DecodeError: it is cut off, or what it says does not fit together.
    """

    def __init__(self, data: bytes | ranges.Value, name: str = "video"):
        self.name = name
        self._data = data if isinstance(data, ranges.Value) else memoryview(data)
        head = data[:_FIRST_READ]
        if len(head) < _HEADER.size:
            raise self._damaged("its header is cut off")
        magic, self.check, count, self._height, self._width, *tick_and_rate = _HEADER.unpack_from(head)
        self._table = _HEADER.size + _PER_FRAME * count
        if magic != MAGIC or not count or len(data) < self._table:
            raise self._damaged("its header or its table of frames")
        if len(head) < self._table:
            head += data[len(head) : self._table]
        if zlib.crc32(memoryview(head)[_CHECKED_FROM : self._table]) != self.check:
            raise self._damaged("its header or its table of frames")
        self._times = np.frombuffer(head, "<i8", count, _HEADER.size)
        self._ends = np.frombuffer(head, "<u8", count, _HEADER.size + 8 * count)
        self._checks = np.frombuffer(head, "<u4", count, _HEADER.size + 16 * count)
        if self._table + int(self._ends[-1]) != len(data):
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
        return hashlib.sha256(self._data[:]).hexdigest()

    def each(self, wanted: Sequence[int], choose_box: rgb.ChooseBox | None = None) -> Iterator[np.ndarray]:
        """As `decode.Video.each`.

        Raises:
            ReadError: the images cannot be read.
            DecodeError: one is damaged.
        """
        if isinstance(self._data, ranges.Value):
            self._data.look_ahead(self._place(wanted[0])[0], self._place(wanted[-1])[1])
        return super().each(wanted, choose_box)

    def _place(self, index: int) -> tuple[int, int]:
        start = int(self._ends[index - 1]) if index else 0
        return self._table + start, self._table + int(self._ends[index])

    def image(self, index: int) -> np.ndarray:
        """Frame `index`, uint8 RGB [H, W, 3].

        Raises:
            ReadError: the image cannot be read.
            DecodeError: it is damaged.
        """
        start, stop = self._place(index)
        data = self._data[start:stop]
        if zlib.crc32(data) != self._checks[index]:
            raise self._damaged(f"frame {index}")
        try:
            image = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            raise self._damaged(f"frame {index}: {error}") from None
        if image.shape != (self._height, self._width, 3):
            raise self._damaged(f"frame {index} is {image.shape[1]}x{image.shape[0]}")
        return image


def check_of(head: bytes) -> int:
    """`JpegFrames.check` of a record that begins so."""
    return _HEADER.unpack_from(head)[1]


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
    checks = [zlib.crc32(image) for image in images]
    columns = (np.asarray(times, "<i8"), ends.astype("<u8"), np.asarray(checks, "<u4"))
    head = _HEADER.pack(MAGIC, 0, *numbers) + b"".join(column.tobytes() for column in columns)
    check = struct.pack("<I", zlib.crc32(head[_CHECKED_FROM:]))
    return b"".join([MAGIC, check, head[_CHECKED_FROM:], *images])
