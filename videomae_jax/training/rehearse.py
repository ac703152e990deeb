"""Ten steps of a run on clips that mean nothing: how fast this machine is, and how far from its bound."""

import datetime
import time
from typing import Any

import jax
import numpy as np

from videomae_jax import hardware, sharding
from videomae_jax.config import Config, UserError
from videomae_jax.training import ahead, compute, planned, step, trainer
from videomae_jax.training.task import Make

_STEPS = 10


def here() -> ahead.Topology:
    """The devices of this machine."""
    devices = jax.devices()
    kind = devices[0].device_kind
    platform = {backend: name for name, backend in planned.PLATFORMS.items()}[jax.default_backend()]
    return ahead.Topology(
        f"{len(devices)} x {kind}", platform, hardware.chip_of(kind), devices, jax.local_device_count()
    )


def run(config: Config, make: Make, classes: int) -> dict[str, Any]:
    """Compiles the step of a run and takes ten; the loader is left out.

    Returns:
        `text`, a line for people; `row`, one for the table of docs/performance.md; and the figures in them.

    Raises:
        UserError: settings that do not fit together or this machine; several processes.
    """
    if jax.process_count() > 1:
        raise UserError("doctor --config rehearses on one host: leave --hosts out")
    this = planned.prepare(config, make, here(), 0, classes, compute.try_kernels)
    mesh, task = this.mesh, this.task
    state, shardings = step.init_state(trainer.recipe(this.config, task), mesh, config.seed)
    train_step = trainer.make_step(this.config, task, this.schedule, mesh, shardings)
    rng = np.random.default_rng(0)
    local = {
        name: rng.integers(0, 256, shape.shape, np.uint8) if name == "video" else _plain(name, shape)
        for name, shape in planned.batch_shapes(task, this.config.data.batch_size).items()
    }
    batch = sharding.global_batch(mesh, local)
    root = sharding.replicate(jax.random.key(config.seed), mesh)
    compiled = train_step.lower(state, batch, root).compile()
    times = []
    for _ in range(_STEPS + 2):
        started = time.perf_counter()
        state, metrics = compiled(state, batch, root)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - started)
    return _figures(this, planned.read(compiled, mesh), float(np.median(times[2:])))


def _plain(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Weights of one, numbered examples, and zeros: a class, no target, nothing erased."""
    if name == "index":
        return np.arange(shape.shape[0], dtype=shape.dtype)
    return np.full(shape.shape, name == "weight", shape.dtype)


def _figures(this: planned.Planned, compiled: planned.Compiled, seconds: float) -> dict[str, Any]:
    rate = this.share / seconds
    flops = rate * this.task.flops_per_clip()
    limits = planned.bounds(this, compiled)
    chip, name = this.topology.chip, this.topology.name
    text = (
        f"{this.config.task}, {this.share:g} clips per device on {name}: {rate:.1f} clips/s per device "
        f"({1e3 * seconds:.0f} ms a step), {flops / 1e12:.2f} TFLOP/s"
    )
    use = bound = ""
    if chip and limits:
        by = min(limits, key=lambda limit: limits[limit])
        use, bound = f"{flops / chip.flops:.1%}", f"{limits[by]:.0f} ({by})"
        text += f", {use} of the peak, {rate / limits[by]:.0%} of the bound by {by}"
    today = datetime.date.today().isoformat()
    row = f"| {today} | {name} | {this.task.describe()} | {this.share:g} | {rate:.1f} | {use} | {bound} |"
    return {"text": text, "row": row, "clips_per_second_per_device": rate, "bounds": limits}
