"""The steps of a run: restore or start, step, look at the numbers one step late, save."""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from videomae_jax import hosts, sharding, storage
from videomae_jax.config import Config, Schedule
from videomae_jax.data import pipeline
from videomae_jax.training import checkpoint, feed, optim, reference, report, step
from videomae_jax.training.guard import Guard
from videomae_jax.training.task import Run, Task
from videomae_jax.training.validation import Validation

Pending = tuple[int, step.Metrics, dict[str, np.ndarray]]
"""A step that was started: its number (from 0), its metrics, what of its batch stays on the host."""


def recipe(config: Config, task: Task) -> step.Recipe:
    """What a fresh state is made from."""
    c = config.optim
    return _recipe(task, tuple(c.betas), c.epsilon, c.weight_decay, c.clip_norm, c.ema > 0)


@functools.lru_cache(maxsize=8)
def _recipe(
    task: Task, betas: tuple[float, float], epsilon: float, decay: float, clip_norm: float, has_ema: bool
) -> step.Recipe:
    """One object for equal settings, so that the state of a run is traced once."""
    tx = optim.adamw(betas, epsilon, decay, clip_norm, task.rate_factors, task.decays)
    return step.Recipe(task.init, tx, task.others, has_ema)


def make_step(config: Config, task: Task, schedule: Schedule, mesh: Mesh, shardings: Any) -> Any:
    """The step of a run; see `step.make_train_step`."""

    def follow(others: Any, params: Any, done: jax.Array) -> Any:
        return task.follow(others, params, done / schedule.total_steps)

    return step.make_train_step(
        task.terms,
        recipe(config, task).tx,
        optim.schedule(schedule.peak_lr, schedule.end_lr, schedule.warmup_steps, schedule.total_steps),
        mesh,
        shardings,
        config.optim.accumulate,
        config.optim.ema,
        config.mesh.mapping,
        follow,
    )


def names_of(state: step.TrainState) -> list[str]:
    """Names of all parameters and others: "params/encoder/embed/kernel", ..."""
    trees = {"params": state.params, "others": state.others}
    return [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees)]


def host_batch_bytes(run: Run, task: Task) -> int:
    """Bytes of the clips of one batch that one host makes."""
    clip, rows = task.clip_transform, run.config.data.batch_size // jax.process_count()
    size = clip.shipped if isinstance(clip, pipeline.PretrainClip) else clip.size
    return rows * clip.frames * math.prod(size) * task.model.channels


class Trainer:
    """Trains one task to the end of one run, or until it is interrupted.

    Args:
        phases: the seconds of the run.
    """

    def __init__(self, run: Run, task: Task, phases: report.Phases):
        self.run, self.task, self.phases = run, task, phases
        self.config, self.schedule = run.config, run.schedule
        self.bad = feed.BadVideos(run.videos.train, self.config.data.max_bad_fraction)
        self.validation = Validation(run, task)
        self.has_warned = False
        self.watchdog = hosts.Watchdog(self.config.mesh.step_limit)

    def train(self, interrupt: hosts.Interrupt) -> tuple[step.TrainState, dict[str, Any], bool]:
        """Restores or initialises, then steps; returns the state, figures, and whether training is over."""
        workdir, keep_last = self.run.workdir, self.config.checkpoint.keep_last
        keeping = checkpoint.Checkpoints(workdir, keep_last, self.schedule.keep_steps, self.task.exported)
        growing = storage.Growing(workdir, ("log.jsonl", Guard.NAME), is_writer=hosts.is_writer())
        with self.watchdog, keeping as self.checkpoints, growing as self.files:
            state, shardings = self._first_state()
            start, root = int(state.step), sharding.replicate(jax.random.key(self.config.seed), self.run.mesh)
            limit = self.config.optim.max_skipped
            self.guard = Guard(self.files, self.run.videos.train, root, limit, start)
            self.log = self._report(start)
            self.phases.end("restore")
            profile = report.Profile(self.files.folder, self.config.log.profile)
            batches = self._batches(start)
            try:
                train_step = make_step(self.config, self.task, self.schedule, self.run.mesh, shardings)
                state, is_over = self._steps(state, train_step, root, batches, profile, interrupt)
                self.checkpoints.wait()
                self.phases.end("steps")
            finally:
                profile.close()
                batches.close()
                self.log.close()
        return state, self._figures(state), is_over

    def _first_state(self) -> tuple[step.TrainState, Any]:
        """The newest checkpoint's state, or a fresh one; and its shardings."""
        fresh = recipe(self.config, self.task)
        if self.checkpoints.latest_step is None:
            state, shardings = step.init_state(fresh, self.run.mesh, self.config.seed)
            values = hosts.agreed(lambda: self.task.start(self.config, names_of(state)))
            hosts.check_weights(values)
            return step.start_from(state, shardings, values, fresh), shardings
        abstract, shardings = step.abstract_state(fresh, self.run.mesh)
        state, meta = self.checkpoints.restore(abstract, shardings)
        self.bad.reasons.update(meta["bad_videos"])
        self.validation.best.restore(meta.get("best"))
        report.say(f"resuming from step {int(state.step)} in {self.checkpoints.folder}")
        return state, shardings

    def _report(self, start: int) -> report.Report:
        return report.Report(
            self.files,
            start,
            self.schedule.total_steps,
            self.config.data.batch_size,
            self.config.log.steps,
            self.task.flops_per_clip(),
            self.task.model.compute.dtype,
            reference.read(self.config.log.reference),
        )

    def _batches(self, start: int) -> Any:
        """(global batch, host fields) of each step from `start` on."""
        source, data = self.run.videos.train, self.config.data
        dataset = pipeline.clips(
            source,
            self.task.clip_transform,
            seed=self.config.seed,
            batch_size=data.batch_size,
            start_step=start,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        host_videos = data.batch_size // self.task.clips_per_video // jax.process_count()
        loader = feed.loader_size(self.config, host_batch_bytes(self.run, self.task))
        return feed.prefetch(
            dataset, source, host_videos, self.run.mesh, workers=loader.workers, threads=loader.threads
        )

    def _steps(
        self,
        state: step.TrainState,
        train_step: Any,
        root: jax.Array,
        batches: Iterator[Any],
        profile: report.Profile,
        interrupt: hosts.Interrupt,
    ) -> tuple[step.TrainState, bool]:
        start, total, validation = int(state.step), self.schedule.total_steps, self.validation
        pending: Pending | None = None
        is_over = start == total or validation.is_hopeless(start)
        for number in range(start, start if is_over else total):
            waiting = time.perf_counter()
            batch, host_fields = next(batches)
            self.log.waited(time.perf_counter() - waiting)
            profile.before(number, pending and pending[1])
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = train_step(state, batch, root)
            # The step before has finished by now, or nearly so: the device is never kept waiting.
            self._look(pending, state)
            pending = (number, metrics, host_fields)
            if number == start:
                jax.block_until_ready(metrics)
                self.phases.end("first step")
            if validation.is_due(number + 1):
                with self.watchdog.paused():
                    validated = validation.look(state, self.log)
                self._look(pending, state, **validated)
                pending = None
            is_over = number + 1 == total or validation.is_hopeless(number + 1)
            is_interrupted = interrupt.is_due()
            if is_interrupted:
                report.say("SIGTERM: saving a checkpoint, then ending")
            is_last = is_interrupted or is_over
            if is_last or (number + 1) % self.schedule.checkpoint_steps == 0:
                # Logged before it is saved, so that no resumed log lacks a line.
                self._look(pending, state)
                pending = None
                self._save(state)
            if is_last:
                break
        return state, is_over

    def _look(self, pending: Pending | None, state: step.TrainState, **validated: float) -> None:
        """Logs a step, once its numbers are there.

        Args:
            state: the newest one.
        """
        if pending is None:
            return
        number, metrics, host_fields = pending
        values = self.guard.look(number, metrics, host_fields)
        self.watchdog.beat()
        if values["clips"] < self.config.data.batch_size:  # some host had a bad video: all look, at once
            try:
                step_videos = self.config.data.batch_size // self.task.clips_per_video
                epoch = number * step_videos // len(self.run.videos.train)
                for failed in hosts.gather(feed.failed(host_fields)):
                    self.bad.count(failed, epoch)
            except feed.TooManyBadVideos:
                self._keep(state)
                raise
        # Of a step that is skipped the guard has said what there is.
        if not values["skipped"] and not self.has_warned and (text := self.task.warning(values)):
            self.has_warned = True
            report.say(f"{text}; step {number + 1}")
        self.log.step(number + 1, values, validated)

    def _keep(self, state: step.TrainState) -> None:
        """Saves what was trained before videos went bad, which weigh nothing in it.

        Not of a first epoch, which may begin anew without them: a work folder with a checkpoint may not.
        """
        if self.checkpoints.latest_step is not None or int(state.step) > self.schedule.steps_per_epoch:
            report.say(f"saving a checkpoint of step {int(state.step)}, then ending")
            self._save(state)
            self.checkpoints.wait()

    def _save(self, state: step.TrainState) -> None:
        try:
            self.files.push(now=True)
        except Exception as error:  # each store's client has its own; the state is worth more than its log
            report.say(f"warning: the log cannot be written now ({type(error).__name__}: {error})")
        meta = {"bad_videos": self.bad.reasons, "best": self.validation.best.found}
        self.checkpoints.save(state, self.task.metadata() | meta)

    def _figures(self, state: step.TrainState) -> dict[str, Any]:
        figures = {
            "step": int(state.step),
            "bad_videos": dict(sorted((self.bad.reasons | self.bad.unread).items())),
            "absent_videos": list(self.run.videos.train.absent),
            "skipped_steps": self.guard.skipped,
        }
        best = self.validation.best.found
        return self.log.last | self.log.totals() | figures | ({"best": best} if best else {})
