"""Columns of a table of many videos: arrays in place of tuples, mapped into memory where they lie in files.

Ten million ids are 0.3 GB that all processes of a host share. A pickled column is the name of its file.
"""

import abc
import array
import hashlib
import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, SupportsIndex, TypeVar, overload

import numpy as np

from videomae_jax import storage

T = TypeVar("T")
_CHUNK = 2**16  # rows that an iterator takes at once
_LARGE = 2**20  # bytes of an array that is not sent to each process


class Column(Sequence, abc.ABC, Generic[T]):
    """A value for each row, as a tuple would have them.

    Args:
        arrays: that hold the values.
        rows: those of their rows that count, in order; None: all.
    """

    def __init__(self, *arrays: np.ndarray, rows: np.ndarray | None = None):
        self._arrays, self._rows = arrays, rows

    @abc.abstractmethod
    def _values(self, rows: np.ndarray | slice) -> list[T]:
        """The values in some rows of the arrays."""

    @property
    @abc.abstractmethod
    def _length(self) -> int:
        """Rows of the arrays."""

    def take(self, indices: Sequence[int] | np.ndarray) -> "Column[T]":
        """The values at `indices`, in that order, of the same arrays."""
        rows = np.asarray(indices, np.uint32)
        rows = rows if self._rows is None else self._rows[rows]
        return type(self)(*self._arrays, rows=rows)

    def __len__(self) -> int:
        return self._length if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(self._values(index if self._rows is None else self._rows[index]))
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index % len(self) if self._rows is None else int(self._rows[index])
        return self._values(slice(row, row + 1))[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows)"

    def __reduce__(self) -> Any:
        return _again, (type(self), tuple(map(packed, self._arrays)), self._rows)


class Numbers(Column[int]):
    """Of whole numbers: one array [N]."""

    @property
    def _length(self) -> int:
        return len(self._arrays[0])

    def _values(self, rows: np.ndarray | slice) -> list[int]:
        return self._arrays[0][rows].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self._arrays[0] if self._rows is None else self._arrays[0][self._rows]
        return np.array(found, dtype)

    def count(self, value: int) -> int:
        """How many rows have it."""
        return int(np.count_nonzero(np.asarray(self) == value))


class Texts(Column[str]):
    """Of texts: their UTF-8 bytes, uint8, one after the other, and where each ends, uint64 [N]."""

    @property
    def _length(self) -> int:
        return len(self._arrays[1])

    def _values(self, rows: np.ndarray | slice) -> list[str]:
        ends = np.asarray(self._arrays[1])  # no memmap, of which each slice is costly
        data = np.asarray(self._arrays[0]).data
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(ends))
            if step == 1 and start < stop:
                cuts = ends[start:stop].astype(np.int64)
                first = int(ends[start - 1]) if start else 0
                text = data[first : int(cuts[-1])]
                begins = [0, *(cuts - first).tolist()]
                return [str(text[a:b], "utf-8") for a, b in itertools.pairwise(begins)]
            rows = np.arange(start, stop, step)
        begins = np.where(rows > 0, ends[np.maximum(rows, 1) - 1], 0).tolist()
        return [str(data[a:b], "utf-8") for a, b in zip(begins, ends[rows].tolist(), strict=True)]


def take(values: Sequence[T], indices: Sequence[int] | np.ndarray) -> Sequence[T]:
    """The values at `indices` of a column, or of a tuple, which may be empty: it has none for anybody."""
    if isinstance(values, Column):
        return values.take(indices)
    return tuple(values[i] for i in indices) if values else ()


def texts(values: Iterable[str]) -> Texts:
    """A column of texts."""
    data, ends = bytearray(), array.array("Q")
    for value in values:
        data += value.encode()
        ends.append(len(data))
    return Texts(_shared(np.frombuffer(data, np.uint8)), _shared(np.array(ends, np.uint64)))


def numbers(values: Iterable[int]) -> Numbers:
    """A column of whole numbers of 32 bits."""
    return Numbers(_shared(np.fromiter(values, np.int32)))


def _shared(column: np.ndarray) -> np.ndarray:
    """A large array from a file in the cache, called after its content: each process has the same memory."""
    if column.nbytes < _LARGE:
        return column
    place = storage.cache() / "columns" / f"{hashlib.sha256(column.data).hexdigest()[:32]}.npy"
    if not place.exists():
        try:
            with storage.output(place, writer=uuid.uuid4().hex) as path, path.open("wb") as file:
                np.save(file, column)
        except OSError:  # no cache, or a full one: it saves memory, no more
            return column
    return mapped(str(place))


def packed(array: np.ndarray) -> Any:
    """What to pickle of an array: of a mapped file its name, for it would be pickled with all it holds."""
    is_mapped = isinstance(array, np.memmap) and array.filename is not None
    return str(array.filename) if is_mapped else array  # pyright: ignore[reportAttributeAccessIssue]


def unpacked(array: Any) -> np.ndarray:
    """The array that was packed."""
    return mapped(array) if isinstance(array, str) else array


def _again(kind: type[Column], arrays: tuple[Any, ...], rows: np.ndarray | None) -> Column:
    return kind(*map(unpacked, arrays), rows=rows)


def mapped(file: str) -> np.ndarray:
    """The array in a local file, mapped into memory."""
    return np.load(file, mmap_mode="r")
