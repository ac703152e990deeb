"""Parts of the values that an ArrayRecord file holds, by their place: its own reader takes records whole.

Below it lies Riegeli: values stand one after the other, and the file is cut into blocks of 64 KiB, each of
which begins with 24 bytes that belong to no value (doc/riegeli_records_file_format.md in google/riegeli). A
place here counts the other bytes only. Files must be written uncompressed.
"""

import abc
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from videomae_jax.data import decode
from videomae_jax.storage import is_remote

_BLOCK, _HEADER = 2**16, 24
_BETWEEN = 4096  # more than Riegeli writes between two records


class Value:
    """The bytes of a value in a file, read when they are asked for: `value[start:stop]`.

    Args:
        path: of the file, local or remote (gs://).
        place: of the value's first byte.
        length: of the value, in bytes.

    Raises:
        ReadError: the file cannot be opened.
    """

    def __init__(self, path: str, place: int, length: int):
        self._file: _File = (_Remote if is_remote(path) else _Local)(path)
        self._place, self._length = place, length
        self._ahead, self._ahead_from = b"", 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        """Bytes of the value.

        Raises:
            ReadError: the file cannot be read, or ends before.
        """
        start, stop, _ = part.indices(self._length)
        if self._ahead_from <= start and stop <= self._ahead_from + len(self._ahead):
            return self._ahead[start - self._ahead_from : stop - self._ahead_from]
        return self._read(start, stop)

    def look_ahead(self, start: int, stop: int) -> None:
        """Says that of these bytes many will be read: a remote file is asked once for all of them."""
        if isinstance(self._file, _Remote):
            self._ahead, self._ahead_from = self._read(start, stop), start

    def _read(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        first, last = (_in_file(self._place + at) for at in (start, stop - 1))
        data = self._file.read(first, last + 1)
        if len(data) != last + 1 - first:
            raise decode.ReadError(f"{self._file.path}: is cut off")
        rest = _BLOCK - first % _BLOCK  # up to the next block's header
        if len(data) <= rest:
            return data
        blocks = (data[at + _HEADER : at + _BLOCK] for at in range(rest, len(data), _BLOCK))
        return b"".join([data[:rest], *blocks])


def _in_file(place: int) -> int:
    return place // (_BLOCK - _HEADER) * _BLOCK + _HEADER + place % (_BLOCK - _HEADER)


class _File(abc.ABC):
    def __init__(self, path: str):
        self.path = path

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of the file, fewer where it ends. Raises ReadError."""
        try:
            return self._bytes(start, stop)
        except Exception as error:  # what remote file systems raise is theirs
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> decode.ReadError:
        return decode.ReadError(f"{self.path}: cannot be read ({getattr(error, 'strerror', None) or error})")

    @abc.abstractmethod
    def _bytes(self, start: int, stop: int) -> bytes: ...


class _Local(_File):
    """Open as long as somebody holds it: a loader has one for each record that it is reading."""

    def __init__(self, path: str):
        super().__init__(path)
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._unreadable(error) from None

    def _bytes(self, start: int, stop: int) -> bytes:
        return os.pread(self._file, stop - start, start)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


class _Remote(_File):
    def _bytes(self, start: int, stop: int) -> bytes:
        import fsspec  # with the extra [gcs]

        system, path = fsspec.url_to_fs(self.path)
        return system.cat_file(path, start=start, end=stop)


class Written(NamedTuple):
    """A value of a record that was written: how it begins, its length and hash, and the record's length."""

    begin: bytes
    length: int
    sha256: bytes
    record: int


def places(path: str, values: Iterable[Written]) -> Iterator[int]:
    """Where the values of a file's records stand, one of each record, in order.

    Raises:
        ReadError: the file does not hold one of them as it was.
    """
    end, rest, size = 0, 0, os.path.getsize(path)
    whole = Value(path, 0, size // _BLOCK * (_BLOCK - _HEADER) + max(size % _BLOCK - _HEADER, 0))
    for value in values:
        # Between two values is what else is in their records, and what Riegeli writes before each.
        around = value.record - value.length
        start = end + max(whole[end : end + rest + around + _BETWEEN].find(value.begin), 0)
        end, rest = start + value.length, around
        if hashlib.sha256(whole[start:end]).digest() != value.sha256:
            raise decode.ReadError(f"{path}: a record is not found as it was written")
        yield start
