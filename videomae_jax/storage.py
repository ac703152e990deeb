"""Places to write: folders of this machine, and of object stores (gs://), which neither append nor rename.

A local place is a `pathlib.Path`, one in a store an `epath.Path`; the two have the same methods. What differs
stands here: how a file appears whole, how a log grows, and where work lies that must be on a disk.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence

from etils import epath

Place = pathlib.Path | epath.Path

PARTIAL = ".partial-"  # how the names of unfinished local files begin


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def at(path: str | os.PathLike) -> Place:
    """The absolute place that a path means."""
    return epath.Path(path) if is_remote(path) else pathlib.Path(path).absolute()


def cache() -> pathlib.Path:
    """The folder of this user for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home, "videomae_jax")


def scratch(place: Place) -> pathlib.Path:
    """Where work in progress for `place` lies: there, or for a store in the cache of this machine."""
    if not is_remote(place):
        return pathlib.Path(place)
    folder = cache() / "scratch" / hashlib.sha256(str(place.parent).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / place.name


@contextlib.contextmanager
def output(place: Place, writer: str = "") -> Iterator[pathlib.Path]:
    """A local file to write that becomes `place`, whole, when the block ends without an error.

    Args:
        writer: tells apart several who may write the same file at once.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(place):
        partial = pathlib.Path(place).with_name(f"{PARTIAL}{writer}{place.name}")
        try:
            yield partial
            partial.replace(place)
        except OSError as error:
            if error.filename:
                raise
            text = f"cannot be written ({error.strerror}): free some space, or choose another place"
            raise OSError(error.errno, text, str(place)) from error
        finally:
            partial.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, place.name)
        yield file
        _upload(file, place)


def write_text(place: Place, text: str, writer: str = "") -> None:
    """A whole file or none; see `output`."""
    with output(place, writer) as file:
        file.write_text(text)


def _upload(file: pathlib.Path, place: Place) -> None:
    with file.open("rb") as content, place.open("wb") as target:
        shutil.copyfileobj(content, target, 2**24)


def remove_tree(place: Place) -> None:
    """Removes a folder, if it is there, and all in it."""
    if not is_remote(place):
        shutil.rmtree(place, ignore_errors=True)
    elif place.exists():
        epath.Path(place).rmtree()


def modified(place: Place) -> float:
    """When a file was last written, in seconds since 1970, by the clock of its file system."""
    return float(epath.Path(place).stat().mtime) if is_remote(place) else os.stat(place).st_mtime


def trouble(folder: Place) -> str:
    """Why nothing can be written into a folder that is there or can be made; "" where it can."""
    if not is_remote(folder):
        existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        can = os.path.isdir(existing) and os.access(existing, os.W_OK)
        return "" if can else f"{existing} cannot be written"
    probe = folder / f"{PARTIAL}{os.getpid()}"
    try:
        write_text(probe, "")
        probe.unlink()
    except Exception as error:  # each store's client has its own
        return f"{folder} cannot be written ({type(error).__name__}: {error})"
    return ""


def _state(file: pathlib.Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


class Growing:
    """Files that grow line by line in a work folder.

    Those of a store grow in a folder of this machine, from what the store has of them, and are copied there
    as whole objects, at most every `EVERY` seconds. Use it as a context manager.

    Attributes:
        place: the work folder.
        folder: where to write.

    Args:
        names: of the files that go on where they were.
        is_writer: whether this process copies; of several hosts one does.
    """

    EVERY = 60.0

    def __init__(self, place: Place, names: Sequence[str], is_writer: bool = True):
        self.place, self._names, self._is_writer = place, names, is_writer
        self._local: tempfile.TemporaryDirectory | None = None
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._last = -self.EVERY
        self.folder = pathlib.Path(place)

    def __enter__(self) -> "Growing":
        if not is_remote(self.place):
            self.folder.mkdir(parents=True, exist_ok=True)
            return self
        self._local = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self._local.name)
        for name in self._names:
            if (self.place / name).exists():
                (self.folder / name).write_bytes((self.place / name).read_bytes())
                self._copied[self.folder / name] = _state(self.folder / name)
        return self

    def push(self, now: bool = False) -> None:
        """Copies what has changed, if it is time to, or `now`; what failed without `now` is tried again."""
        is_due = now or time.monotonic() - self._last >= self.EVERY
        if self._local is None or not self._is_writer or not is_due:
            return
        self._last = time.monotonic()
        try:
            self._copy()
        except Exception:  # each store's client has its own
            if now:
                raise

    def _copy(self) -> None:
        for file in (path for path in sorted(self.folder.rglob("*")) if path.is_file()):
            state = _state(file)
            if self._copied.get(file) != state:
                target = self.place / file.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                _upload(file, target)
                self._copied[file] = state

    def __exit__(self, *_exception: object) -> None:
        """Copies the rest."""
        if self._local is None:
            return
        try:
            self.push(now=True)
        finally:
            self._local.cleanup()
