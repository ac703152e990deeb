"""When the packets of a file are shown, read once and kept: to go through a movie takes half a second."""

import array
import collections
import dataclasses
import os
import stat
import threading

Version = tuple[str, int, int]
"""Path, size and time of a file: of another version nothing is known."""

_MOST = 4_000_000  # frames of all files that a process remembers, a key frame for 16: some 40 MB


@dataclasses.dataclass(frozen=True)
class Mark:
    """What is kept of a packet: when it is shown and decoded, in ticks of the stream."""

    pts: int | None
    dts: int | None
    is_key: bool
    is_discard: bool


@dataclasses.dataclass
class Index:
    """The packets of a stream.

    Attributes:
        times: when frames are shown, rising.
        keys: packets that can be decoded by themselves, in order.
        is_timed: whether `times` are those of the frames that a full decode shows.
        counted: frames that a full decode shows, where that had to be found out by one.
    """

    times: array.array
    keys: list[Mark]
    is_timed: bool
    counted: int | None = None

    @property
    def weight(self) -> int:
        """What it takes to remember, in frames of 8 bytes."""
        return len(self.times) + 16 * len(self.keys)


class _Known:
    """Indexes of the files that were opened last."""

    def __init__(self):
        self._kept: collections.OrderedDict[Version, Index] = collections.OrderedDict()
        self._frames, self._lock = 0, threading.Lock()

    def find(self, version: Version | None) -> Index | None:
        """That of a file, if it is known."""
        with self._lock:
            if version is None or version not in self._kept:
                return None
            self._kept.move_to_end(version)
            return self._kept[version]

    def keep(self, version: Version | None, index: Index) -> None:
        """Remembers that of a file, and forgets those that were not asked for longest."""
        with self._lock:
            if version is None or version in self._kept:
                return
            self._kept[version] = index
            self._frames += index.weight
            while self._frames > _MOST:
                self._frames -= self._kept.popitem(last=False)[1].weight


known = _Known()


def version_of(path: str) -> Version | None:
    """What tells a file from a later one of its name; None: it is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (path, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
