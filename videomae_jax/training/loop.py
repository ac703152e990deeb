"""One loop for every task: set up, restore, step; look at the numbers one step late."""

import collections
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Generator, Iterator
from typing import Any

import grain
import jax
import numpy as np

from videomae_jax import config as settings
from videomae_jax import sharding
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline, processes
from videomae_jax.data.sources import Source
from videomae_jax.training import checkpoint, optim, report, step, tasks

_AHEAD = 2  # batches on the device beyond the one in use


class TrainingError(Exception):
    """Training cannot go on, and not because of a setting; exit status 1."""


def run(config: Config, workdir: pathlib.Path, started: float) -> dict[str, Any]:
    """Trains to the end, resuming from the work folder's newest checkpoint; returns the summary.

    Writes WORKDIR/config.json, log.jsonl, tensorboard/, checkpoints/, pictures and summary.json. After a
    SIGTERM it saves a checkpoint and returns a summary with `interrupted`.

    Args:
        started: `time.time()` at the start of the process, for the seconds by phase.

    Raises:
        UserError: settings, data or a work folder that do not fit.
        TrainingError: too many steps in a row without a usable gradient.
    """
    phases = _Phases(started)
    settings.check_bounds(config)
    with _Interrupt() as interrupt:
        try:
            mesh = sharding.make_mesh(**config.mesh)
        except ValueError as error:
            raise UserError(str(error)) from None
        _check_batch(config, mesh)
        task = tasks.make_task(config)
        phases.end("set-up")
        train_source, held_out = tasks.open_data(config)
        schedule = settings.finalize(config, len(train_source))
        _claim(workdir, config, train_source)
        phases.end("data")
        _announce(config, task, train_source, schedule, mesh)
        state, last = _train(config, workdir, task, train_source, schedule, mesh, interrupt, phases)
        interrupted = interrupt.is_set and int(state.step) < schedule.total_steps
        # Nothing left to do but the pictures: speed and seconds stay those of the run itself.
        path = workdir / "summary.json"
        is_rerun = "first step" not in phases.seconds and path.exists()
        before = json.loads(path.read_text()) if is_rerun else {}
        summary = last | before | {"task": config.task, "interrupted": interrupted}
        if not interrupted:
            summary |= task.finish(state.params, held_out, config, workdir)
            phases.end("pictures")
        summary["seconds"] = before.get("seconds", phases.seconds)
        report.write_json(path, summary)
    return summary


def _train(
    config: Config,
    workdir: pathlib.Path,
    task: tasks.Pretrain,
    source: Source,
    schedule: settings.Schedule,
    mesh: jax.sharding.Mesh,
    interrupt: "_Interrupt",
    phases: "_Phases",
) -> tuple[step.TrainState, dict[str, Any]]:
    """Restores or initialises, then steps; returns the final state and the figures for the summary."""
    tx = optim.adamw(
        config.optim.betas, config.optim.epsilon, config.optim.weight_decay, config.optim.clip_norm
    )
    bad = BadVideos(source, config.data.max_bad_fraction)
    with checkpoint.Checkpoints(workdir, config.checkpoint.keep_last, schedule.keep_steps) as checkpoints:
        if checkpoints.latest_step is None:
            state, shardings = step.init_state(task.init, tx, mesh, config.seed)
        else:
            abstract, shardings = step.abstract_state(task.init, tx, mesh)
            state, meta = checkpoints.restore(abstract, shardings)
            bad.reasons.update(meta["bad_videos"])
            report.say(f"resuming from step {int(state.step)} in {checkpoints.folder}")
        rate = optim.schedule(schedule.peak_lr, schedule.end_lr, schedule.warmup_steps, schedule.total_steps)
        train_step = step.make_train_step(task.loss, tx, rate, mesh, shardings)
        start = int(state.step)
        root = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
        log = report.Report(workdir, start, schedule.total_steps, config.data.batch_size, config.log.steps)
        guard = _Guard(workdir, source, root, config.optim.max_skipped, start)
        dataset = pipeline.clips(
            source,
            task.clip_transform,
            seed=config.seed,
            batch_size=config.data.batch_size,
            start_step=start,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        phases.end("restore")
        host_videos = config.data.batch_size // config.data.clips_per_video // jax.process_count()
        batches = prefetch(dataset, host_videos, mesh, *_loader_size(config)[:2])

        def finish_step(number: int, metrics: step.Metrics, host_fields: dict[str, np.ndarray]) -> None:
            log.step(number + 1, guard.look(number, metrics, host_fields))

        try:
            pending = None
            for number in range(start, schedule.total_steps):
                waiting = time.perf_counter()
                batch, host_fields = next(batches)
                log.waited(time.perf_counter() - waiting)
                bad.count(host_fields)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = train_step(state, batch, root)
                # The step before has finished by now, or nearly so: the device is never kept waiting.
                if pending is not None:
                    finish_step(*pending)
                pending = (number, metrics, host_fields)
                if number == start:
                    jax.block_until_ready(metrics)
                    phases.end("first step")
                last = interrupt.is_set or number + 1 == schedule.total_steps
                if interrupt.is_set:
                    report.say("SIGTERM: saving a checkpoint, then ending")
                if last or (number + 1) % schedule.checkpoint_steps == 0:
                    # Logged before it is saved, so that no resumed log lacks a line.
                    finish_step(*pending)
                    pending = None
                    checkpoints.save(state, task.metadata() | {"bad_videos": bad.reasons})
                if last:
                    break
            checkpoints.wait()
            phases.end("steps")
        finally:
            batches.close()
            log.close()
    figures = {
        "step": int(state.step),
        "bad_videos": dict(sorted(bad.reasons.items())),
        "skipped_steps": guard.skipped,
    }
    return state, log.last | log.totals() | figures


def prefetch(
    dataset: grain.MapDataset, host_videos: int, mesh: jax.sharding.Mesh, workers: int, threads: int
) -> Generator[tuple[step.Batch, dict[str, np.ndarray]]]:
    """Yields (global arrays, host-only fields), with `_AHEAD` later batches already on their way."""
    iterator = pipeline.iterate(dataset, host_videos, workers=workers, threads=threads)
    queue: collections.deque = collections.deque()
    try:
        while True:
            while len(queue) <= _AHEAD:
                local = _next(iterator)
                host_fields = {name: local.pop(name) for name in pipeline.HOST_ONLY}
                host_fields["index"] = local["index"]
                queue.append((sharding.global_batch(mesh, local), host_fields))
            yield queue.popleft()
    finally:
        iterator.close()


def _next(iterator: Iterator[dict[str, Any]]) -> dict[str, Any]:
    try:
        return next(iterator)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise TrainingError(
            "a loader process was killed, perhaps for want of memory: the same command resumes from the last "
            "checkpoint; fewer processes (--config.data.workers) need less memory"
        ) from None


@dataclasses.dataclass
class BadVideos:
    """Names and counts the videos that could not be decoded, and stops the run above a limit.

    Attributes:
        max_fraction: of the source's videos.
        reasons: id -> why.
    """

    source: Source
    max_fraction: float
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def count(self, host_fields: dict[str, np.ndarray]) -> None:
        """Looks through a batch.

        Raises:
            UserError: too many videos of the source are bad.
        """
        for record, error in zip(host_fields["record"], host_fields["error"], strict=True):
            video = self.source.ids[record]
            if not error or video in self.reasons:
                continue
            self.reasons[video] = str(error)
            fraction = len(self.reasons) / len(self.source)
            if fraction > self.max_fraction:
                raise UserError(
                    f"{len(self.reasons)} of {len(self.source)} videos cannot be decoded, the last is "
                    f"{error}: remove or replace it, or allow more with --config.data.max_bad_fraction="
                    f"{_round_up(fraction)} (now {self.max_fraction})"
                )
            report.say(f"bad video, trained without it: {error}")


def _round_up(fraction: float) -> float:
    return int(fraction * 100 + 1) / 100


class _Guard:
    """Fetches metrics and records steps that changed nothing because loss or gradient were not finite."""

    def __init__(self, workdir: pathlib.Path, source: Source, root: jax.Array, limit: int, start_step: int):
        self.path, self.source, self.limit = workdir / "skipped_steps.jsonl", source, limit
        self.root = np.asarray(jax.random.key_data(root)).tolist()
        self.skipped = report.keep_lines(self.path, start_step)
        self._in_a_row = 0

    def look(self, number: int, metrics: Any, host_fields: dict) -> dict[str, float]:
        """The metrics of step `number` (from 0) as numbers.

        Raises:
            TrainingError: the limit of skipped steps in a row is reached.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values["skipped"]:
            self._in_a_row = 0
            return values
        self.skipped += 1
        self._in_a_row += 1
        entry = {
            "step": number + 1,
            **{name: repr(values[name]) for name in ("loss", "grad_norm", "clips")},
            "videos": [self.source.ids[record] for record in host_fields["record"]],
            "index": host_fields["index"].tolist(),
            "root_key": self.root,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        report.say(
            f"step {number + 1} skipped: loss {values['loss']}, gradient norm {values['grad_norm']}, "
            f"{values['clips']:.0f} clips; its videos and keys are in {self.path}"
        )
        if self._in_a_row >= self.limit:
            raise TrainingError(
                f"{self._in_a_row} steps in a row had no usable gradient (optim.max_skipped), the last was "
                f"step {number + 1}: lower optim.lr or set optim.clip_norm; {self.path} names their videos"
            )
        return values


class _Interrupt:
    """While active, the first SIGTERM only sets a flag; the loop then saves and ends."""

    is_set = False

    def __enter__(self) -> "_Interrupt":
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, *_signal: object) -> None:
        self.is_set = True
        signal.signal(signal.SIGTERM, self._before)  # a second one ends the process at once

    def __exit__(self, *_exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


class _Phases:
    """Seconds from the start of the process, divided by the phases that ended."""

    def __init__(self, started: float):
        self._last, self.seconds = started, {}

    def end(self, name: str) -> None:
        """The time since the last phase belongs to `name`."""
        now = time.time()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


def _check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size <= 0 or config.data.batch_size % parts:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide over data x fsdp = {parts} devices: "
            f"use a positive multiple of {parts}"
        )


def _claim(workdir: pathlib.Path, config: Config, source: Source) -> None:
    """Makes the work folder this run's, or checks that it already is.

    Raises:
        UserError: it belongs to a run with other settings or data, or holds something else.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    ours = {"config": config.to_dict(), "data": source.fingerprint(), "videos": len(source)}
    if not any(d.name.isdigit() for d in workdir.glob("checkpoints/*")):
        report.write_json(path, ours)  # nothing saved yet, nothing to protect
        return
    if not path.exists():
        raise UserError(f"{workdir} holds checkpoints but no config.json: use another --workdir")
    theirs = json.loads(path.read_text())
    changed = settings.differences(theirs["config"], ours["config"])
    if changed:
        raise UserError(
            f"{workdir} belongs to a run with other settings ({'; '.join(changed)}): use another --workdir, "
            f"or the old settings to resume it"
        )
    if theirs["data"] != ours["data"]:
        raise UserError(
            f"{workdir} belongs to a run on other data ({theirs['videos']} videos then, {len(source)} now, "
            f"or other names): use another --workdir, or put the old files back to resume it"
        )


def _loader_size(config: Config) -> tuple[int, int, str]:
    return pipeline.loader_size(config.data.workers, config.data.threads, processes.usable_cores())


def _announce(config, task, source, schedule, mesh) -> None:
    devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
    workers, threads, reason = _loader_size(config)
    loader = f"{workers} processes x {threads} threads" if workers else f"{threads} threads"
    report.say(
        f"{config.task}: {len(source)} videos, {schedule.total_steps} steps of {config.data.batch_size} "
        f"clips on {devices}, {task.describe()}, loader: {loader} ({reason})"
    )
