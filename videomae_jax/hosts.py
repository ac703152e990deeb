"""Several hosts, one run: what each must know of the others, when all of them stop, and what ends a hang.

A host is a process with devices of its own. All run the same command on their share of every batch; host 0
alone writes, but for checkpoints, of which each writes its part.
"""

import contextlib
import faulthandler
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from videomae_jax import config as settings
from videomae_jax import storage
from videomae_jax.config import Config, UserError
from videomae_jax.data.sources import Source
from videomae_jax.storage import Place

T = TypeVar("T")


def is_writer() -> bool:
    """Whether this host writes what a run leaves."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The `value` of every host, in their order; plain JSON data. All hosts must ask."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def wait(name: str) -> None:
    """Returns when all hosts are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@functools.cache
def code_version() -> str:
    """A hash of the package's source files."""
    folder = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


_FIXES = {
    "code": "install the same sources everywhere",
    "versions": "install the same versions everywhere",
    "devices": "give every host as many devices of one kind",
    "videos": "let data.path name the same videos everywhere",
    "checkpoint": "name the same weights everywhere",
    "weights": "name the same weights everywhere, of a run that has ended",
    "newest checkpoint": "wait until all see the same files in the work folder",
    "compute": "use the same devices and drivers everywhere",
}
_OWN = re.compile(r"data\.(path|workers|threads)")  # settings that each host may have for itself


def check_same(**more: Any) -> None:
    """Refuses hosts with other code, versions or devices, or with other facts of what is run.

    Raises:
        UserError: the same on every host, naming the first difference.
    """
    facts = {
        "code": code_version(),
        "versions": f"jax {jax.__version__}, Python {sys.version.split()[0]}",
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        **more,
    }
    everyone = gather(facts)
    for host, theirs in enumerate(everyone):
        for name, fact in theirs.items():
            if fact != everyone[0][name]:
                raise UserError(
                    f"host {host} has other {name} ({fact}) than host 0 ({everyone[0][name]}): {_FIXES[name]}"
                )


def agreed(prepare: Callable[[], T]) -> T:
    """What `prepare` returns, if it does so on every host.

    Raises:
        UserError: it failed elsewhere; here, its own error.
    """
    try:
        value = prepare()
    except Exception as error:
        gather(f"{type(error).__name__}: {error}")
        raise
    for host, problem in enumerate(gather("")):
        if problem:
            raise UserError(f"host {host} stopped: {problem}")
    return value


def check_weights(arrays: Any) -> None:
    """Refuses hosts that have read other weights, a tree of arrays that should be the same on all.

    Raises:
        UserError: the same on every host, naming the first that differs.
    """
    if jax.process_count() == 1:
        return
    total = 0
    for path, array in jax.tree_util.tree_leaves_with_path(arrays):
        total = zlib.crc32(str(path).encode(), total)
        total = zlib.crc32(np.asarray(array).tobytes(), total)
    check_same(weights=f"hash {total:08x}")


def check_agreement(config: Config, videos: Sequence[Source], workdir: Place, **facts: Any) -> None:
    """Refuses hosts that do not run the same: settings, code, versions, videos, work folder, more `facts`.

    Raises:
        UserError: the same on every host, naming the first difference.
    """
    if jax.process_count() == 1:
        return
    everyone = gather(settings.flatten(config))
    for host, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0].get(key) and not _OWN.fullmatch(key):
                raise UserError(
                    f"host {host} has other settings than host 0 ({key}: {everyone[0].get(key)} -> {value}): "
                    f"start all alike"
                )
    check_same(videos=[[len(source), source.fingerprint()] for source in videos], **facts)
    _check_workdir(workdir)


def _check_workdir(workdir: Place) -> None:
    """Refuses a work folder that some host cannot write, or that is not the same one on all of them."""
    token = gather(os.urandom(8).hex())[0]
    names = [f".host-{host}-{token}" for host in range(jax.process_count())]
    mine = workdir / names[jax.process_index()]
    trouble = ""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        mine.touch()
    except OSError as error:
        trouble = f"cannot write {workdir} ({error.strerror or error}): give it the right to"
    problems = gather(trouble)
    if not any(problems):
        seen = [name for name in names if (workdir / name).exists()]
        if len(seen) < len(names):
            trouble = f"has a {workdir} of its own: name a --workdir that all hosts share"
        problems = gather(trouble)
    wait("work folder")
    with contextlib.suppress(OSError):
        mine.unlink()
    for host, problem in enumerate(problems):
        if problem:
            raise UserError(f"host {host} {problem}")


class Interrupt:
    """While active, the first SIGTERM only sets a flag; the loop then saves and ends.

    Of several hosts each may get the signal, at any time: all then stop after the same step.
    """

    _is_set = False
    # JAX compares for equality with one above the largest number so far, which is 0 before the first: steps
    # of a resumed run would pass over it. All hosts ask as often.
    _asked = itertools.count(1)

    def __enter__(self) -> "Interrupt":
        # With several hosts JAX's own handler tells the others.
        self._is_alone = jax.process_count() == 1
        if self._is_alone:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, *_signal: object) -> None:
        self._is_set = True
        signal.signal(signal.SIGTERM, self._before)  # a second one ends the process at once

    def is_due(self) -> bool:
        """Whether to stop after this step; asked once a step, by all hosts."""
        if self._is_alone:
            return self._is_set
        return multihost_utils.reached_preemption_sync_point(next(self._asked))

    def end(self) -> None:
        """Lets the next SIGTERM end the process at once; JAX's handler would swallow it for ever."""
        signal.signal(signal.SIGTERM, self._before if self._is_alone else signal.SIG_DFL)

    def __exit__(self, *_exception: object) -> None:
        self.end()


def _process_space() -> str:
    """What process numbers count in; "" where that is not known."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


class Lock:
    """A file that says which process works here; use it as a context manager, before anything is written.

    That of a process that is gone is taken over: one of this host is looked up, one of another is gone where
    the file was not touched for two minutes. Of several hosts of one run, host 0 holds it for all.

    Args:
        path: of the file, in a folder that exists or can be made.

    Raises:
        UserError: another process works here.
    """

    _EVERY, _STALE, _SETTLED = 20.0, 120.0, 1.0  # seconds

    def __init__(self, path: Place):
        self.path, self._stop = path, threading.Event()

    def __enter__(self) -> "Lock":
        agreed(self._acquire)
        return self

    def _acquire(self) -> None:
        if not is_writer():
            return
        self._is_new = not self.path.parent.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path.parent} is no folder and cannot be made one: {error}") from None
        if not self._take():
            other = self._other()
            if other is not None:
                raise UserError(
                    f"process {other.get('pid')} on {other.get('host')} works with {self.path.parent} since "
                    f"{other.get('since')}: wait for it, end it, or use another place (lock {self.path})"
                )
            self._set_aside()
            if not self._take():
                raise UserError(f"another process has just begun with {self.path.parent}: wait for it")
        threading.Thread(target=self._touch, daemon=True).start()

    def _take(self) -> bool:
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        mine["space"] = _process_space()
        mine["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self._text = json.dumps(mine)
        if storage.is_remote(self.path):  # no exclusive creation there: of several the last one has it
            if self.path.exists():
                return False
            self.path.write_text(self._text)
            time.sleep(self._SETTLED)
            return self.path.read_text() == self._text
        try:
            with self.path.open("x") as file:
                file.write(self._text)
        except FileExistsError:
            return False
        return True

    def _other(self) -> dict[str, Any] | None:
        """Who holds the file, if that process is still there."""
        try:
            self._judged = self.path.read_text()
            other = json.loads(self._judged)
            age = self._now() - storage.modified(self.path)
        except FileNotFoundError:
            return None
        except ValueError:  # being written, or cut off
            other, age = {}, self._now() - storage.modified(self.path)
        # Containers may share a name and see none of each other's processes.
        is_here = other.get("host") == socket.gethostname()
        if is_here and other.get("space", _process_space()) == _process_space():
            return other if other.get("started") == _started(other["pid"]) else None
        return other if age < self._STALE else None

    def _set_aside(self) -> None:
        """Removes the lock that was found stale, and none that another process has taken since."""
        if storage.is_remote(self.path):
            self.path.unlink(missing_ok=True)
            return
        aside = self.path.with_name(f".{self.path.name}.{socket.gethostname()}-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)  # one process alone gets it
            if aside.read_text() == self._judged:
                aside.unlink()
            else:
                aside.rename(self.path)

    def _now(self) -> float:
        """The time of the file system, which may be another host's."""
        probe = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        probe.touch()
        now = storage.modified(probe)
        probe.unlink(missing_ok=True)
        return now

    def _touch(self) -> None:
        while not self._stop.wait(self._EVERY):
            try:
                if self.path.read_text() != self._text:
                    self._lose()
                self.path.write_text(self._text) if storage.is_remote(self.path) else os.utime(self.path)
            except Exception:  # the next time will do; each store's client has its own
                continue

    def _lose(self) -> None:
        """Ends a process that stood still for so long that another one took its place."""
        print(f"another process has taken {self.path.parent} meanwhile, ending at once", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        if is_writer():
            with contextlib.suppress(FileNotFoundError):
                if self.path.read_text() == self._text:
                    self.path.unlink()
            if self._is_new and not storage.is_remote(self.path):
                with contextlib.suppress(OSError):  # something was made in it
                    self.path.parent.rmdir()


def _started(pid: int) -> str:
    """When a process of this host began, in ticks; "" where there is none. Their numbers are used again."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class Watchdog:
    """Ends the process with a stack dump and status 1 where a step takes longer than a limit.

    A lost host leaves the others waiting in a sum over all of them, for ever.

    Args:
        seconds: the limit; 0: none.
    """

    def __init__(self, seconds: int):
        self.seconds = seconds

    def beat(self) -> None:
        """A step is done, the next one begins."""
        if self.seconds:
            # Not sys.stderr, which notebooks and tests replace by what is no file.
            stderr = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=stderr)

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """While something else than a step runs."""
        self.stop()
        yield
        self.beat()

    def stop(self) -> None:
        """Ends the watch."""
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "Watchdog":
        self.beat()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        """Ends the watch; after an error on one of several hosts ending may take no longer than a step."""
        self.stop()
        if kind and jax.process_count() > 1:
            self.beat()
