"""The command `plan`: what comes of a run on devices that are not there, said and returned."""

import math
from collections.abc import Callable
from typing import Any

import jax

from videomae_jax.config import Config
from videomae_jax.training import compute, report
from videomae_jax.training.ahead import Topology
from videomae_jax.training.planned import PLATFORMS, Compiled, Planned, bounds, compile_step, prepare
from videomae_jax.training.program import Collective
from videomae_jax.training.task import Make

_SHARES = (1.0, 0.5, 0.35)  # of the bound
_CPU_SECONDS = 0.0081  # of one prepared clip of 16 x 224 x 224, docs/performance.md
_SHOWN = 3  # of what moves most
_REMAT = ("none", "dots", "full")


def largest_batch(planned: Planned, again: Callable[[int], tuple[Planned, Compiled]]) -> int:
    """Clips per device that fit; memory grows evenly with them, so a second size tells, and a third is tried.

    Args:
        again: clips per device -> the run with them, compiled.
    """
    chip, unit = planned.topology.chip, planned.config.optim.accumulate * planned.task.clips_per_video
    assert chip is not None

    def needs(rows: int) -> float:
        compiled = again(rows)[1]
        total = float(compiled.arguments + compiled.temporaries)
        report.say(f"{rows} clips per device: {compiled.trouble or f'{total / 2**30:.2f} GiB'}")
        return math.inf if compiled.trouble else total

    low = max(planned.rows // 2 // unit * unit, unit)
    high = max(planned.rows, 2 * unit)
    few = needs(low)
    while few > chip.memory and low > unit:
        high, low = low, max(low // 2 // unit * unit, unit)
        few = needs(low)
    if few > chip.memory:
        return 0
    many = needs(high)
    while not math.isfinite(many) and high - low >= 2 * unit:  # a compiler that says no says not how much
        middle = (low + high) // 2 // unit * unit
        size = needs(middle)
        if size <= chip.memory:
            low, few = middle, size
        else:
            high, many = middle, size
    if not math.isfinite(many):
        return low
    each = (many - few) / (high - low)
    guess = int((chip.memory - few) / each + low) // unit * unit
    step = max(guess // 16 // unit, 1) * unit
    while guess > 0 and needs(guess) > chip.memory:
        guess -= step
    return max(guess, 0)


def run(
    config: Config,
    make: Make,
    topology: Topology,
    *,
    videos: int = 0,
    classes: int = 400,
    fit: bool = False,
) -> dict[str, Any]:
    """Plans a run, prints what comes of it and returns it; see `prepare` for the arguments.

    Raises:
        UserError: as `prepare`.
    """
    planned = prepare(config, make, topology, videos, classes)
    report.say(f"{config.task} on {topology.name}, mesh {_mesh_name(planned)}: {planned.task.describe()}")
    compiled = compile_step(planned)
    found = _figures(planned, compiled)
    if fit and topology.chip and (not compiled.trouble or compiled.is_too_large):

        def again(rows: int, remat: str = config.model.remat) -> tuple[Planned, Compiled]:
            other = config.copy_and_resolve_references()
            other.data.batch_size = rows * planned.config.data.batch_size // planned.rows
            other.model.remat = remat
            changed = prepare(other, make, topology, videos, classes)
            return changed, compile_step(changed)

        found["smallest_remat"] = _smallest_remat(planned, again)
        found["largest_clips_per_device"] = largest_batch(planned, again)
    found["advice"] = _advice(planned, compiled, found)
    _print(found)
    return found


def _smallest_remat(planned: Planned, again: Callable[[int, str], tuple[Planned, Compiled]]) -> str | None:
    """The least that is computed twice so that the batch fits; None: it fits with none of them."""
    for remat in _REMAT:
        compiled = again(planned.rows, remat)[1]
        total = (compiled.arguments + compiled.temporaries) / 2**30
        report.say(f"model.remat={remat}: {compiled.trouble or f'{total:.2f} GiB'}")
        if compiled.fits(planned.topology.chip):
            return remat
    return None


def _mesh_name(planned: Planned) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in planned.mesh.shape.items())


def _figures(planned: Planned, compiled: Compiled) -> dict[str, Any]:
    chip, config, schedule = planned.topology.chip, planned.config, planned.schedule
    limits = bounds(planned, compiled)
    by = min(limits, key=lambda name: limits[name]) if limits else None
    rate = limits[by] if by else None
    found: dict[str, Any] = {
        "topology": planned.topology.name,
        "devices": planned.mesh.size,
        "mesh": dict(planned.mesh.shape),
        "batch_size": config.data.batch_size,
        "clips_per_device": planned.share,
        "attention": config.model.attention,
        "remat": config.model.remat,
        "unroll": config.model.unroll,
        "compiles": not compiled.trouble,
        "trouble": compiled.trouble,
        "is_too_large": compiled.is_too_large,
        "fits": compiled.fits(chip),
        "argument_gib": compiled.arguments / 2**30,
        "temporary_gib": compiled.temporaries / 2**30,
        "memory_gib": chip.memory / 2**30 if chip else None,
        "flops_per_clip": planned.task.flops_per_clip(),
        "bytes_per_clip": compiled.traffic.memory / planned.share,
        "on_chip_bytes_per_clip": compiled.traffic.on_chip / planned.share,
        "movers": [{"what": what, "bytes_per_clip": size / planned.share} for what, size in compiled.movers],
        "talks_to_host": compiled.talks_to_host,
        "collectives": _collected(compiled.collectives),
        "bounds": limits,
        "bound_by": by,
        "bound_clips_per_second_per_device": rate,
        "steps": schedule.total_steps if planned.has_length else None,
        "epochs": schedule.total_steps / schedule.steps_per_epoch if schedule.steps_per_epoch else None,
        "jax": jax.__version__,
    }
    return found | (_durations(planned, rate) if rate else {})


def _durations(planned: Planned, rate: float) -> dict[str, Any]:
    """Hours and loader cores at shares of the bound; `rate` is in clips per second and device."""
    data, devices = planned.config.data, planned.mesh.size
    clips = planned.schedule.total_steps * data.batch_size if planned.has_length else 10**6
    hours = clips / (rate * devices) / 3600
    cpu = _CPU_SECONDS * data.frames * math.prod(data.size) / (16 * 224 * 224)
    return {
        "clips": clips,
        "at": {
            f"{share:.0%} of the bound": {
                "hours": hours / share,
                "chip_hours": hours * devices / share,
                "loader_cores_per_host": rate * share * planned.topology.host * cpu,
            }
            for share in _SHARES
        },
    }


def _collected(collectives: tuple[Collective, ...]) -> list[dict[str, Any]]:
    """Counts and bytes by kind and axes."""
    rows: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for kind, axes, size, times in collectives:
        row = rows.setdefault((kind, axes), [0, 0])
        row[0] += times
        row[1] += times * size
    return [
        {"kind": kind, "axes": list(axes), "times": times, "mib": size / 2**20}
        for (kind, axes), (times, size) in sorted(rows.items())
    ]


def _advice(planned: Planned, compiled: Compiled, found: dict[str, Any]) -> list[str]:
    """What to change first."""
    model, chip = planned.config.model, planned.topology.chip
    if compiled.trouble and not compiled.is_too_large:
        kernel = "--config.model.attention=xla, if it is the kernel that does not compile"
        return [kernel] if model.attention != "xla" else []
    if chip is None:
        return []
    advice = []
    if not found["fits"]:
        if planned.rows > planned.config.optim.accumulate:
            advice.append(
                f"--config.optim.accumulate={2 * planned.config.optim.accumulate}: half the activations"
            )
        if smallest := found.get("smallest_remat"):
            advice.append(f"--config.model.remat={smallest}: the least that fits this batch")
        elif "smallest_remat" not in found and model.remat != "full":
            stronger = _REMAT[_REMAT.index(model.remat) + 1]
            advice.append(f"--config.model.remat={stronger}: computes again what it does not keep")
        if (compiled.is_too_large or compiled.arguments > chip.memory / 3) and planned.mesh.shape["data"] > 1:
            advice.append("--config.mesh.fsdp=N: parameters and optimizer in parts")
        if planned.topology.platform == "cuda":
            advice.append("XLA_PYTHON_CLIENT_MEM_FRACTION=0.92: JAX takes three quarters of a GPU by default")
    best = compute.settled(_with_auto(planned.config), PLATFORMS[planned.topology.platform], None)
    if model.attention != best.model.attention:
        advice.append(f"--config.model.attention=auto: {best.model.attention} here")
    if found["fits"] and model.remat != found.get("smallest_remat", "none"):
        less = found.get("smallest_remat", "none, if it fits")
        advice.append(f"--config.model.remat={less}: less is computed twice")
    if found["bound_by"] == "links":
        advice.append("more clips per device, or fewer of the axes that the exchange is over")
    if found["bound_by"] == "memory" and model.unroll < model.encoder.depth:
        advice.append(
            f"--config.model.unroll={model.encoder.depth}: no copies in and out of loops, a longer compile"
        )
    return advice


def _with_auto(config: Config) -> Config:
    other = config.copy_and_resolve_references()
    other.model.attention = "auto"
    return other


def _print(found: dict[str, Any]) -> None:
    say = report.say
    if found["trouble"]:
        say(f"{'does NOT fit' if found['is_too_large'] else 'does not compile'}: {found['trouble']}")
    else:
        limit = f" of {found['memory_gib']:.2f}" if found["memory_gib"] else ""
        total = found["argument_gib"] + found["temporary_gib"]
        fits = {True: "fits", False: "does NOT fit", None: "compiles"}[found["fits"]]
        say(
            f"{fits}: {total:.2f} GiB{limit} per device (state and batch {found['argument_gib']:.2f}, "
            f"temporaries {found['temporary_gib']:.2f})"
        )
        on_chip = found["on_chip_bytes_per_clip"] / 1e9
        say(
            f"a clip: {found['flops_per_clip'] / 1e9:.0f} GFLOP of matmuls, "
            f"{found['bytes_per_clip'] / 1e9:.2f} GB to and from memory"
            + (f", {on_chip:.2f} on the chip" if on_chip else "")
        )
        for row in found["movers"][:_SHOWN]:
            say(f"  {row['bytes_per_clip'] / 1e9:.3f} GB of it, in all memories: {row['what']}")
        for row in found["collectives"]:
            axes = ", ".join(row["axes"])
            say(f"a step: {row['times']} x {row['kind']} over {axes}, {row['mib']:.1f} MiB in all")
    for name, rate in sorted(found["bounds"].items(), key=lambda item: item[1]):
        say(f"bound by {name}: {rate:,.0f} clips/s per device")
    for share, at in found.get("at", {}).items():
        steps = f"{found['steps']:,} steps" if found["steps"] else "a million clips (--videos=N: of the run)"
        say(
            f"at {share}: {at['hours']:,.1f} h, {at['chip_hours']:,.0f} chip-hours for {steps}; the loader "
            f"wants about {at['loader_cores_per_host']:,.0f} cores a host (prepared data)"
        )
    if "largest_clips_per_device" in found:
        say(f"largest batch that fits: {found['largest_clips_per_device']} clips per device")
    for line in found["advice"]:
        say(f"try {line}")
