"""From the loader to the devices: batches ahead of their reader, and the account of videos that fail."""

import collections
import dataclasses
import os
from collections.abc import Generator, Iterator
from typing import Any

import grain
import jax
import numpy as np

from videomae_jax import sharding
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline, processes
from videomae_jax.data.sources import Source
from videomae_jax.training import report
from videomae_jax.training.step import Batch

_AHEAD = 2  # batches on the device beyond the one in use


class TrainingError(Exception):
    """Training cannot go on, and not because of a setting; exit status 1."""


def loader_size(config: Config, host_batch_bytes: int, batch: str = "data.batch_size") -> pipeline.LoaderSize:
    """How many processes and threads the settings, this machine and batches of so many bytes give.

    Args:
        batch: the setting that the batches follow from.

    Raises:
        UserError: the batches do not fit `data.loader_gib`.
    """
    data, cores = config.data, processes.usable_cores()
    limit = int(data.loader_gib * 2**30)
    if not limit:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = memory // 3 * cores // max(os.cpu_count() or 1, cores)
    size = pipeline.loader_size(data.workers, data.threads, cores, host_batch_bytes, limit)
    if size.bytes > limit:
        raise UserError(
            f"the loader would take {size}, and may hold {limit / 2**30:.1f} GiB: lower data.workers, "
            f"data.threads or {batch}, or raise --config.data.loader_gib"
        )
    return size


def prefetch(
    dataset: grain.MapDataset,
    source: Source,
    host_videos: int,
    mesh: jax.sharding.Mesh,
    *,
    workers: int,
    threads: int,
    by_video: bool = False,
) -> Generator[tuple[Batch, dict[str, np.ndarray]]]:
    """Yields (global arrays, host-only fields) to the end, `_AHEAD` later batches already on their way.

    Batches of a source with targets have them as `target`, float32. `by_video`: see `pipeline.iterate`.
    """
    sizes = {"workers": workers, "threads": threads}
    iterator = pipeline.iterate(dataset, host_videos, by_video=by_video, **sizes)
    targets = np.asarray(source.targets, np.float32)
    queue: collections.deque = collections.deque()
    try:
        while True:
            while len(queue) <= _AHEAD and (local := _next(iterator)):
                host_fields = {name: local.pop(name) for name in pipeline.HOST_ONLY}
                host_fields["index"] = local["index"]
                if source.targets:
                    local["target"] = targets[host_fields["record"]]
                queue.append((sharding.global_batch(mesh, local), host_fields))
            if not queue:
                return
            yield queue.popleft()
    finally:
        iterator.close()


def _next(iterator: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next batch; empty at the end."""
    try:
        return next(iterator, {})
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise TrainingError(
            "a loader process was killed, perhaps for want of memory: the same command resumes from the last "
            "checkpoint; fewer processes (--config.data.workers) need less memory"
        ) from None


def failed(host_fields: dict[str, np.ndarray]) -> list[tuple[int, str, bool]]:
    """(place in the source, reason, whether it will stay so) of the clips of a host's batch that are none."""
    rows = zip(*(host_fields[name].tolist() for name in ("record", "error", "num_frames")), strict=True)
    return [(record, error, frames != pipeline.UNREAD) for record, error, frames in rows if error]


class TooManyBadVideos(UserError):
    """More than a run allows; what was trained until then is good."""


@dataclasses.dataclass
class BadVideos:
    """Names and counts the videos that could not be decoded, and stops the run above a limit.

    Attributes:
        max_fraction: of the source's videos.
        reasons: id -> why, of those that cannot be decoded.
        unread: likewise, of those that could not be read in the present epoch; they may be back in the next.
    """

    source: Source
    max_fraction: float
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    unread: dict[str, str] = dataclasses.field(default_factory=dict)
    _epoch: int = 0

    def count(self, failed: list[tuple[int, str, bool]], epoch: int) -> None:
        """Takes in what failed in a batch, see `failed`.

        Raises:
            TooManyBadVideos: of the source.
        """
        if epoch != self._epoch:
            self.unread.clear()
            self._epoch = epoch
        for record, error, is_final in failed:
            video = self.source.ids[record]
            if video in self.reasons or (video in self.unread and not is_final):
                continue
            self.unread.pop(video, None)
            (self.reasons if is_final else self.unread)[video] = error
            count = len(self.reasons) + len(self.unread)
            if count / len(self.source) > self.max_fraction:
                mend = "remove or replace it" if is_final else "see that it can be, then run this again"
                raise TooManyBadVideos(
                    f"{count} of {len(self.source)} videos cannot be decoded or read, the last is {error}: "
                    f"{mend}, or allow more with --config.data.max_bad_fraction="
                    f"{_round_up(count / len(self.source))} (now {self.max_fraction})"
                )
            report.say(f"bad video, trained without it: {error}")


def _round_up(fraction: float) -> float:
    return int(fraction * 100 + 1) / 100
