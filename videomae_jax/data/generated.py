"""What generated data sets have in common: processes that render, and a cache that is whole or not there."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FPS = 16
NAMES = ("moving_shapes", "moving_digits")
"""What `data.path` may name instead of a place."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to generate.

    Attributes:
        size: height and width in pixels, even.
        frames: frames per video.
        videos: training videos; validation and test have an eighth of it each.
        seed: everything is a function of it.
    """

    size: int
    frames: int
    videos: int
    seed: int
    classes: ClassVar[tuple[str, ...]]

    def splits(self) -> dict[str, int]:
        """Videos per split."""
        held = max(self.videos // 8, len(self.classes))
        return {"train": self.videos, "validation": held, "test": held}


AnySpec = TypeVar("AnySpec", bound=Spec)
Result = TypeVar("Result")


def each_video(
    write: Callable[[AnySpec, pathlib.Path, str, int], Result],
    spec: AnySpec,
    folder: pathlib.Path,
    processes: int,
) -> list[tuple[str, int, Result]]:
    """Calls `write(spec, folder, split, number)` for every video; its results, by split and number."""
    # Spawned, not forked: the parent may run threads of JAX.
    context, parts = multiprocessing.get_context("spawn"), 8 * processes
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        jobs = [pool.submit(_part, write, spec, folder, part, parts) for part in range(parts)]
        return sorted((result for job in jobs for result in job.result()), key=lambda found: found[:2])


def _part(
    write: Callable[[AnySpec, pathlib.Path, str, int], Result],
    spec: AnySpec,
    folder: pathlib.Path,
    part: int,
    parts: int,
) -> list[tuple[str, int, Result]]:
    every = [(split, number) for split, videos in spec.splits().items() for number in range(videos)]
    return [(split, number, write(spec, folder, split, number)) for split, number in every[part::parts]]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def cached(
    kind: str,
    version: int,
    spec: Spec,
    cache: str | os.PathLike,
    fill: Callable[[pathlib.Path], None],
) -> pathlib.Path:
    """The folder of generated data; `fill` makes it where it is not there.

    It appears only when it is whole; one interrupted is begun anew.
    """
    identity = json.dumps({"version": version, **dataclasses.asdict(spec)})
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = pathlib.Path(cache, f"{kind}-{name}")
    if folder.is_dir():
        return folder
    # By machine, which may share the cache with others: a process is looked for here only.
    own = f"{folder.name}.partial-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{own}*"):
        process = left.name.removeprefix(own)  # or a part of a longer host's name
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{own}{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _turn(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return folder
        _fill(folder, partial, fill)
    return folder


@contextlib.contextmanager
def _turn(lock: pathlib.Path) -> Iterator[None]:
    """One process of a machine at a time: another would only make the same again."""
    if fcntl is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _fill(folder: pathlib.Path, partial: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    try:
        fill(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
