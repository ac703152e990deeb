"""One loop for every method: set up, train, finish."""

import contextlib
import json
from typing import Any

import jax

from videomae_jax import config as settings
from videomae_jax import hosts, storage
from videomae_jax.config import Config, UserError
from videomae_jax.data.sources import Source
from videomae_jax.interop import export
from videomae_jax.storage import Place
from videomae_jax.training import compute, feed, reference, report, step, trainer
from videomae_jax.training.feed import TrainingError as TrainingError
from videomae_jax.training.task import Make, Run, Task


def run(config: Config, workdir: Place, started: float, make: Make) -> dict[str, Any]:
    """Trains to the end, resuming from the work folder's newest checkpoint; returns the summary.

    Writes WORKDIR/config.json, log.jsonl, tensorboard/, checkpoints/, summary.json, and what the task adds.
    After a SIGTERM it saves a checkpoint and returns a summary with `interrupted`.

    Args:
        config: as `compute.on_this_machine` gives it.
        started: `time.time()` at the start of the process, for the seconds by phase.
        make: the method.

    Raises:
        UserError: settings, data or a work folder that do not fit.
        TrainingError: too many steps in a row without a usable gradient.
    """
    phases = report.Phases(started)
    with hosts.Interrupt() as interrupt, contextlib.ExitStack() as stack:
        mesh = compute.make_mesh(config)
        check_batch(config, mesh)
        newest = export.newest_step(workdir / "checkpoints")
        weights = config.init_from if newest is None else str(workdir)
        # Before any video is looked for or generated.
        planned = make(config, None, weights)
        check_parts(config, planned, mesh)
        report.check_profile(config.log.profile)
        curves = hosts.agreed(lambda: reference.read(config.log.reference))
        stack.enter_context(hosts.Lock(workdir / ".lock"))
        phases.end("set-up")
        videos = hosts.agreed(lambda: planned.open_videos(config))
        config = compute.settled_resize(config, videos.train, jax.default_backend())
        schedule = settings.make_schedule(config, len(videos.train))
        parts = (videos.train, videos.validation, videos.test)
        facts = {"compute": vars(planned.model.compute), "newest checkpoint": newest}
        hosts.check_agreement(config, parts, workdir, **facts)
        _claim(workdir, config, videos.train)
        phases.end("data")
        task = make(config, videos.train, weights)
        this = Run(config, workdir, videos, schedule, mesh)
        _announce(this, task)
        state, last, is_over = trainer.Trainer(this, task, phases).train(interrupt)
        interrupt.end()  # what follows can be done again
        # Nothing left to do but the end: speed and seconds stay those of the run itself.
        path = workdir / "summary.json"
        is_rerun = "first step" not in phases.seconds and path.exists()
        before = json.loads(path.read_text()) if is_rerun else {}
        if before.get("interrupted") or before.get("step") != last.get("step"):
            before = {}  # of a session that ended earlier
        summary = last | before | {"task": config.task, "interrupted": not is_over}
        if is_over:
            summary |= task.finish(this, state)
            phases.end(task.last_phase)
        summary["seconds"] = before.get("seconds", phases.seconds)
        if hosts.is_writer():
            report.write_json(path, summary)
            if curves:
                _draw(curves, workdir)
        hosts.wait("summary")
    return summary


def _draw(curves: reference.Reference, workdir: Place) -> None:
    with storage.output(workdir / "curves.png") as picture:
        reference.draw((workdir / "log.jsonl").read_text(), curves, picture)
    report.say(f"curves over those of the reference: {workdir / 'curves.png'}")


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not divide over the mesh and the hosts.

    Raises:
        UserError: naming a size that would do.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate
    if config.data.batch_size <= 0 or config.data.batch_size % parts:
        key = "debug.overfit" if config.debug.overfit else "data.batch_size"
        raise UserError(
            f"{key}={config.data.batch_size} does not divide over data x fsdp devices x accumulate "
            f"= {parts}: use a positive multiple of {parts}"
        )
    videos, processes = config.data.batch_size // config.data.clips_per_video, jax.process_count()
    if videos % processes:
        raise UserError(
            f"the {videos} videos of a step (data.batch_size / data.clips_per_video) do not divide over "
            f"{processes} hosts: use a multiple of {processes * config.data.clips_per_video} clips"
        )


def check_parts(config: Config, task: Task, mesh: jax.sharding.Mesh) -> None:
    """Refuses a mesh that does not divide the parameters, and a batch that the task cannot work with."""
    try:
        step.abstract_state(trainer.recipe(config, task), mesh)
    except ValueError as error:
        raise UserError(str(error)) from None
    task.check_batch(config, mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate)


def identity(config: Config, source: Source) -> dict[str, Any]:
    """What config.json says: the settings of a run, and which videos it was trained on."""
    return {"config": config.to_dict(), "data": source.fingerprint(), "videos": len(source)}


def _claim(workdir: Place, config: Config, source: Source) -> None:
    """Makes the work folder this run's, or checks that it already is.

    Raises:
        UserError: it belongs to a run with other settings or data, or holds something else.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    ours = identity(config, source)
    if export.newest_step(workdir / "checkpoints") is None:
        # A session that ended has left both a summary and a checkpoint.
        if (workdir / "summary.json").exists():
            raise UserError(
                f"{workdir} holds the results of a run whose checkpoints are gone: use another --workdir, or "
                f"remove it"
            )
        if hosts.is_writer():  # nothing saved yet, nothing to protect
            storage.remove_tree(workdir / "best")
            report.write_json(path, ours)
        return
    if not path.exists():
        raise UserError(f"{workdir} holds checkpoints but no config.json: use another --workdir")
    theirs = json.loads(path.read_text())
    if theirs["config"]["model"]["dtype"] == "auto":  # of runs before it was stored as it was used
        theirs["config"]["model"]["dtype"] = export.read_config(workdir).compute.dtype
    resize = ours["config"]["data"]["resize"]
    # Before there was a choice it was the host, as where a method reads no such setting.
    theirs["config"]["data"].setdefault("resize", "host" if resize == "device" else resize)
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


def _announce(run: Run, task: Task) -> None:
    config, mesh = run.config, run.mesh
    devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    devices += f" ({axes})" if axes else ""
    devices += f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    loader = feed.loader_size(config, trainer.host_batch_bytes(run, task))
    report.say(
        f"{config.task}: {len(run.videos.train)} {run.videos.train.noun}, "
        f"{run.schedule.total_steps} steps of {config.data.batch_size} clips on {devices}, "
        f"{task.describe()}, loader: {loader}"
    )
