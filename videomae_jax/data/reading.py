"""One way to open whatever holds a video: a file, a remote file, bytes of one, or a folder of images."""

import hashlib
import io
import os
import re
import stat
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import av
import numpy as np
from etils import epath
from PIL import Image

from videomae_jax.data import decode
from videomae_jax.data.images import MAGIC, Images, JpegFrames
from videomae_jax.data.sources import IMAGE_SUFFIXES, SUFFIXES
from videomae_jax.storage import is_remote


class FrameFolder(Images):
    """A folder of images, one per frame, in the order of the numbers in their names.

    Raises:
        DecodeError: there is no image in it.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)
        self._files = frame_files(self.name)
        if not self._files:
            raise decode.DecodeError(f"{self.name}: has no frames")

    @property
    def num_frames(self) -> int:
        """Number of images."""
        return len(self._files)

    def where(self, index: int) -> str:
        """The file."""
        return os.path.join(self.name, self._files[index])

    def digest(self) -> str:
        """SHA-256 of the images' bytes, one after the other."""
        total = hashlib.sha256()
        for index in range(len(self._files)):
            total.update(read_bytes(self.where(index)))
        return total.hexdigest()

    def image(self, index: int) -> np.ndarray:
        """Frame `index`, uint8 RGB [H, W, 3].

        Raises:
            DecodeError: the image cannot be read.
        """
        data = read_bytes(self.where(index))
        try:
            return _image(data)
        except Exception as error:  # what Pillow and libav raise of a broken or huge image is theirs
            raise decode.DecodeError(f"{self.where(index)}: cannot be decoded ({error})") from None


def _image(data: bytes) -> np.ndarray:
    """An image as uint8 RGB [H, W, 3]."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        # 16 bits per channel, which Pillow clips or cuts: scaled by libav.
        with av.open(io.BytesIO(data), "r", format="png_pipe") as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


T = TypeVar("T")
AnyVideo = decode.Video | Images


def frame_files(folder: str) -> list[str]:
    """Names of the images in a folder, by the numbers in them: frame_2 comes before frame_10.

    Raises:
        ReadError: it cannot be listed.
    """

    def by_number(name: str) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"(\d+)", name)
        return [(int(part), "") if part.isdigit() else (0, part) for part in parts], name

    try:
        remote = epath.Path(folder) if is_remote(folder) else None
        names = [file.name for file in remote.iterdir()] if remote else os.listdir(folder)
    except Exception as error:  # what remote file systems raise is theirs
        raise _unreadable(folder, error) from None
    images = (name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
    names = [name for name in images if not name.startswith(".")]
    # Names that differ in digits only, as nearly all do, are in that order as texts: a tenth of the time.
    return sorted(names, key=by_number if len({name.translate(_DIGITS) for name in names}) > 1 else None)


_DIGITS = str.maketrans("123456789", "000000000")


def read_bytes(path: str | os.PathLike) -> bytes:
    """A whole local or remote (gs://) file.

    Raises:
        DecodeError: it cannot be read.
    """
    try:
        if not is_remote(os.fspath(path)) and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("is no regular file")  # a pipe would be waited for
        return epath.Path(path).read_bytes()
    except Exception as error:  # what remote file systems raise is theirs
        raise _unreadable(path, error) from None


def _unreadable(path: str | os.PathLike, error: Exception) -> decode.ReadError:
    return decode.ReadError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


_PAUSES = (0.1, 0.5)  # seconds, before what could not be read is read again


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns; tried again after short pauses where a file could not be read.

    Raises:
        ReadError: it could not be read the last time either.
        DecodeError: it cannot be decoded; that is not tried again.
    """
    for pause in _PAUSES:
        try:
            return read()
        except decode.ReadError:
            time.sleep(pause)
    return read()


def open_video(source: str | bytes | JpegFrames, name: str = "video") -> AnyVideo:
    """A local path, a remote one (gs://, read whole), a folder of images, bytes of a file, or opened JPEGs.

    Raises:
        DecodeError: it cannot be opened.
    """
    if isinstance(source, JpegFrames):
        return source
    if isinstance(source, bytes):
        return JpegFrames(source, name) if source[:8] == MAGIC else decode.Video(source, name=name)
    if not is_remote(source):
        return FrameFolder(source) if os.path.isdir(source) else decode.Video(source)
    if epath.Path(source).suffix.lower() in SUFFIXES:
        return decode.Video(read_bytes(source), name=source)
    return FrameFolder(source)
