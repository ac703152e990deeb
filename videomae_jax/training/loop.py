"""One loop for every task: set up, restore, step; look at the numbers one step late."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from videomae_jax import config as settings
from videomae_jax import hosts, sharding, storage
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.interop import export, transfer
from videomae_jax.storage import Place
from videomae_jax.training import checkpoint, feed, finetune, optim, probe, report, splits, step, tasks
from videomae_jax.training.feed import TrainingError


def run(config: Config, workdir: Place, started: float) -> dict[str, Any]:
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
    config = tasks.with_dtype(settings.resolve(config))
    if config.task == "probe":
        with hosts.Lock(workdir / ".lock"):
            return probe.run(config, workdir, started)
    with hosts.Interrupt() as interrupt, contextlib.ExitStack() as stack:
        mesh = tasks.make_mesh(config)
        _check_batch(config, mesh)
        is_begun = export.newest_step(workdir / "checkpoints") is not None
        weights = str(workdir) if is_begun else config.init_from
        # Before any video is looked for or generated.
        planned = tasks.make_task(config, weights=weights)
        _check_parts(config, planned, mesh)
        report.check_profile(config.log.profile)
        stack.enter_context(hosts.Lock(workdir / ".lock"))
        phases.end("set-up")
        videos = hosts.agreed(lambda: splits.open_splits(config))
        schedule = settings.finalize(config, len(videos.train))
        hosts.check_agreement(config, videos.train, workdir, compute=vars(planned.model.compute))
        _claim(workdir, config, videos.train)
        phases.end("data")
        task = tasks.make_task(config, videos.train, weights)
        _announce(config, task, videos.train, schedule, mesh)
        state, last, is_over = _train(config, workdir, task, videos, schedule, mesh, interrupt, phases)
        # Nothing left to do but the end: speed and seconds stay those of the run itself.
        path = workdir / "summary.json"
        is_rerun = "first step" not in phases.seconds and path.exists()
        before = json.loads(path.read_text()) if is_rerun else {}
        summary = last | before | {"task": config.task, "interrupted": not is_over}
        if is_over:
            summary |= task.finish(state, videos, config, workdir, mesh)
            phases.end("pictures" if config.task == "pretrain" else "test")
        summary["seconds"] = before.get("seconds", phases.seconds)
        if hosts.is_writer():
            report.write_json(path, summary)
        hosts.wait("summary")
    return summary


def _train(
    config: Config,
    workdir: Place,
    task: tasks.Task,
    videos: splits.Splits,
    schedule: settings.Schedule,
    mesh: jax.sharding.Mesh,
    interrupt: hosts.Interrupt,
    phases: "_Phases",
) -> tuple[step.TrainState, dict[str, Any], bool]:
    """Restores or initialises, then steps; returns the state, figures, and whether training is over."""
    source = videos.train
    tx = make_optimizer(config)
    bad = feed.BadVideos(source, config.data.max_bad_fraction)
    watchdog = hosts.Watchdog(config.mesh.step_limit)
    keeping = checkpoint.Checkpoints(workdir, config.checkpoint.keep_last, schedule.keep_steps)
    growing = storage.Growing(workdir, ("log.jsonl", _Guard.NAME))
    with watchdog, keeping as checkpoints, growing as files:
        has_ema = config.optim.ema > 0
        best = checkpoint.Best(workdir, finetune.KEY_METRIC[config.head.kind])
        if checkpoints.latest_step is None:
            state, shardings = step.init_state(task.init, tx, mesh, config.seed, has_ema)
            if config.init_from:
                state = _start_from(config.init_from, task, state)
        else:
            abstract, shardings = step.abstract_state(task.init, tx, mesh, has_ema)
            state, meta = checkpoints.restore(abstract, shardings)
            bad.reasons.update(meta["bad_videos"])
            best.restore(meta.get("best"))
            report.say(f"resuming from step {int(state.step)} in {checkpoints.folder}")
        rate = optim.schedule(schedule.peak_lr, schedule.end_lr, schedule.warmup_steps, schedule.total_steps)
        options = (config.optim.accumulate, config.optim.ema, config.mesh.mapping)
        train_step = step.make_train_step(task.clip_losses, tx, rate, mesh, shardings, *options)
        start = int(state.step)
        root = sharding.replicate(jax.random.key(config.seed), mesh)
        validation = _Validation(task, videos, config, schedule, mesh, best)
        log = report.Report(
            files,
            start,
            schedule.total_steps,
            config.data.batch_size,
            config.log.steps,
            task.flops_per_clip(),
            task.model.compute.dtype,
        )
        profile = report.Profile(files.folder, config.log.profile)
        guard = _Guard(files, source, root, config.optim.max_skipped, start)
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
        host_videos = config.data.batch_size // task.clips_per_video // jax.process_count()
        workers, threads, _ = feed.loader_size(config)
        batches = feed.prefetch(dataset, source, host_videos, mesh, workers=workers, threads=threads)

        def finish_step(
            number: int, metrics: step.Metrics, host_fields: dict[str, np.ndarray], **validated: float
        ) -> None:
            values = guard.look(number, metrics, host_fields)
            watchdog.beat()
            if values["clips"] < config.data.batch_size:  # some host had a bad video: all look, at once
                for failed in hosts.together(feed.failed(host_fields)):
                    bad.count(failed)
            log.step(number + 1, values, validated)

        try:
            pending = None
            is_over = start == schedule.total_steps or validation.is_hopeless(start)
            for number in range(start, start if is_over else schedule.total_steps):
                waiting = time.perf_counter()
                batch, host_fields = next(batches)
                log.waited(time.perf_counter() - waiting)
                profile.before(number, pending and pending[1])
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = train_step(state, batch, root)
                # The step before has finished by now, or nearly so: the device is never kept waiting.
                if pending is not None:
                    finish_step(*pending)
                pending = (number, metrics, host_fields)
                if number == start:
                    jax.block_until_ready(metrics)
                    phases.end("first step")
                if validation.is_due(number + 1):
                    with watchdog.paused():
                        validated = validation.run(state, log)
                    finish_step(*pending, **validated)
                    pending = None
                is_over = number + 1 == schedule.total_steps or validation.is_hopeless(number + 1)
                is_interrupted = interrupt.is_due(number)
                if is_interrupted:
                    report.say("SIGTERM: saving a checkpoint, then ending")
                last = is_interrupted or is_over
                if last or (number + 1) % schedule.checkpoint_steps == 0:
                    # Logged before it is saved, so that no resumed log lacks a line.
                    if pending is not None:
                        finish_step(*pending)
                        pending = None
                    files.push(now=True)
                    meta = {"bad_videos": bad.reasons, "best": best.found}
                    checkpoints.save(state, task.metadata() | meta)
                if last:
                    break
            checkpoints.wait()
            phases.end("steps")
        finally:
            profile.close()
            batches.close()
            log.close()
    figures = {
        "step": int(state.step),
        "bad_videos": dict(sorted(bad.reasons.items())),
        "absent_videos": list(source.absent),
        "skipped_steps": guard.skipped,
    }
    if best.found:
        figures["best"] = best.found
    return state, log.last | log.totals() | figures, is_over


def make_optimizer(config: Config) -> optim.Optimizer:
    """AdamW as the settings have it."""
    of = config.optim
    layers = optim.Layers(of.layer_decay, of.freeze_blocks) if config.task == "finetune" else None
    return optim.adamw(of.betas, of.epsilon, of.weight_decay, of.clip_norm, layers)


def _start_from(path: str, task: tasks.Task, state: step.TrainState) -> step.TrainState:
    """The state with the parameters that a trained backbone gives, placed as they were."""
    if not isinstance(task, finetune.Finetune):
        raise UserError("init_from is for finetuning")
    ours: dict[tuple[str, ...], Any] = flatten_dict(state.params)  # pyright: ignore[reportAssignmentType]
    taken = transfer.read(path, task.model, ["/".join(key) for key in ours])
    report.say(f"starting from {path}: {taken}")
    theirs = flatten_dict(taken.params)
    params = {
        key: sharding.place(np.asarray(theirs[key]), leaf.sharding) if key in theirs else leaf
        for key, leaf in ours.items()
    }
    params = unflatten_dict(params)
    return state._replace(params=params, ema=state.ema and jax.tree.map(jax.numpy.copy, params))


class _Validation:
    """When to validate, what became of it, and whether it is worth going on."""

    def __init__(
        self,
        task: tasks.Task,
        videos: splits.Splits,
        config: Config,
        schedule: settings.Schedule,
        mesh: jax.sharding.Mesh,
        best: checkpoint.Best,
    ):
        self.every, self.total, self.warmup = (
            schedule.evaluate_steps,
            schedule.total_steps,
            schedule.warmup_steps,
        )
        self.patience, self.metadata, self.best = config.optim.patience, task.metadata, best
        self.keeps_best, self.has_warned = config.task == "finetune", False
        self.validate: Callable[[Any], dict[str, float]] | None = None
        if self.every or self.keeps_best:
            self.validate = task.validator(videos.train, videos.validation, config, mesh)

    def is_due(self, done: int) -> bool:
        """Whether validation follows step number `done` (from 1)."""
        is_time = self.every > 0 and done % self.every == 0
        return self.validate is not None and (is_time or (self.keeps_best and done == self.total))

    def run(self, state: step.TrainState, log: report.Report) -> dict[str, float]:
        """Validates the weights, averaged ones where there are any; keeps them if they are the best."""
        assert self.validate
        params = jax.block_until_ready(state.params if state.ema is None else state.ema)
        started = time.perf_counter()
        found = self.validate(params)
        if self.keeps_best:
            self.best.look(int(state.step), found, params, self.metadata())
        is_luck = found.pop("validation_at_chance", 0.0) > 0 and int(state.step) >= self.warmup
        if is_luck and not self.has_warned:
            self.has_warned = True
            report.say(
                f"warning: after {int(state.step)} steps validation top1 {found['validation_top1']:.3f} is "
                f"no better than always naming the most frequent class: check labels, optim.lr, init_from "
                f"and data.stride; --config.debug.overfit=8 shows whether anything can be learnt"
            )
        log.exclude(time.perf_counter() - started)
        return found

    def is_hopeless(self, done: int) -> bool:
        """Whether `patience` validations in a row up to step `done` were no better than the best."""
        best = self.best.found
        return bool(self.patience and best and done - best["step"] >= self.patience * self.every)


class _Guard:
    """Fetches metrics and records steps that changed nothing because loss or gradient were not finite."""

    NAME = "skipped_steps.jsonl"

    def __init__(self, files: storage.Growing, source: Source, root: jax.Array, limit: int, start_step: int):
        self.path, self.source, self.limit = files.folder / self.NAME, source, limit
        self.place = files.place / self.NAME
        self.root = np.asarray(jax.random.key_data(root)).tolist()
        self.skipped = report.keep_lines(self.path, start_step) if hosts.is_writer() else 0
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
        rows = hosts.together([host_fields["record"].tolist(), host_fields["index"].tolist()])
        entry = {
            "step": number + 1,
            **{name: repr(values[name]) for name in ("loss", "grad_norm", "clips")},
            "videos": [self.source.ids[record] for records, _ in rows for record in records],
            "index": [place for _, index in rows for place in index],
            "root_key": self.root,
        }
        if hosts.is_writer():
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        report.say(
            f"step {number + 1} skipped: loss {values['loss']}, gradient norm {values['grad_norm']}, "
            f"{values['clips']:.0f} clips; its videos and keys are in {self.place}"
        )
        if self._in_a_row >= self.limit:
            raise TrainingError(
                f"{self._in_a_row} steps in a row had no usable gradient (optim.max_skipped), the last was "
                f"step {number + 1}: lower optim.lr or set optim.clip_norm; {self.place} names their videos"
            )
        return values


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
    if config.optim.patience and not config.evaluate.every:
        raise UserError("optim.patience counts validations: set --config.evaluate.every too")
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate
    if config.data.batch_size <= 0 or config.data.batch_size % parts:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide over data x fsdp devices x accumulate "
            f"= {parts}: use a positive multiple of {parts}"
        )
    videos, processes = config.data.batch_size // config.data.clips_per_video, jax.process_count()
    if videos % processes:
        raise UserError(
            f"the {videos} videos of a step (data.batch_size / data.clips_per_video) do not divide over "
            f"{processes} hosts: use a multiple of {processes * config.data.clips_per_video} clips"
        )


def _check_parts(config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> None:
    """Refuses a mesh that does not divide the parameters, and microbatches that mixup cannot pair."""
    try:
        step.abstract_state(task.init, make_optimizer(config), mesh)
    except ValueError as error:
        raise UserError(str(error)) from None
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate
    is_mixed = isinstance(task, finetune.Finetune) and task.mix is not None
    if is_mixed and config.optim.accumulate > 1 and config.data.batch_size // parts % 2:
        raise UserError(
            f"data.batch_size={config.data.batch_size} gives each device microbatches of "
            f"{config.data.batch_size // parts} clips, and mixup pairs clips: use a multiple of {2 * parts}"
        )


def _claim(workdir: Place, config: Config, source: Source) -> None:
    """Makes the work folder this run's, or checks that it already is.

    Raises:
        UserError: it belongs to a run with other settings or data, or holds something else.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    ours = {"config": config.to_dict(), "data": source.fingerprint(), "videos": len(source)}
    if export.newest_step(workdir / "checkpoints") is None:
        if hosts.is_writer():
            report.write_json(path, ours)  # nothing saved yet, nothing to protect
        return
    if not path.exists():
        raise UserError(f"{workdir} holds checkpoints but no config.json: use another --workdir")
    theirs = json.loads(path.read_text())
    if theirs["config"]["model"]["dtype"] == "auto":  # of runs before it was stored as it was used
        theirs["config"]["model"]["dtype"] = export.read_config(workdir).compute.dtype
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


def _announce(config, task, source, schedule, mesh) -> None:
    devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
    cut = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    devices += f" ({cut})" if cut else ""
    devices += f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    workers, threads, reason = feed.loader_size(config)
    loader = f"{workers} processes x {threads} threads" if workers else f"{threads} threads"
    report.say(
        f"{config.task}: {len(source)} videos, {schedule.total_steps} steps of {config.data.batch_size} "
        f"clips on {devices}, {task.describe()}, loader: {loader} ({reason})"
    )
