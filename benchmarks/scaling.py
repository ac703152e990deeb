"""What devices say to each other in a training step, and the step time that hardware then allows.

    .venv/bin/python benchmarks/scaling.py --size=base
    .venv/bin/python benchmarks/scaling.py --size=huge --batch-per-device=8 --meshes=1024x1x1,128x8x1,16x16x4

Needs no accelerator: steps are traced for meshes (data x fsdp x tensor) of up to 1,024 simulated devices;
nothing is compiled or run. Collectives are counted in the traced program, where they stand as they are
written; tests/test_sharding.py and test_benchmarks.py hold them against the compiled one. The time is an
estimate from data sheets: matmuls at half the peak, ring algorithms at the full bandwidth; `overlapped` hides
the shorter of the two behind the longer, `in turn` hides nothing. Prints one table per kind of cluster and
one JSON line.
"""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AxisType

from videomae_jax import sharding
from videomae_jax.models import vit
from videomae_jax.training import optim, step

MESHES = "1x1x1,8x1x1,1x8x1,64x1x1,8x8x1,256x1x1,32x8x1,1024x1x1,128x8x1,128x4x2"
_KINDS = {
    "psum": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "ppermute": "permute",
}


class Collective(NamedTuple):
    """`times` a step, `bytes` of the whole array (of a scattered one: before) over these axes of the mesh."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int


class Cluster(NamedTuple):
    """Data sheet of a device: bfloat16 operations, bytes per second; `near` devices have the fast links."""

    flops: float
    near: int
    near_bandwidth: float
    far_bandwidth: float


# Bytes per second and direction of all links of a device; H200: 8 by NVLink, one 400 Gbit/s port each beyond.
CLUSTERS = {
    "TPU v5e": Cluster(197e12, 256, 100e9, 3e9),
    "TPU v5p": Cluster(459e12, 8960, 300e9, 3e9),
    "H200": Cluster(989e12, 8, 450e9, 50e9),
}
_USE = 0.5  # of the peak, by matmuls


def collectives(jaxpr: Any, times: int = 1) -> Iterator[Collective]:
    """Every collective of a traced program, those in loops as often as the loop runs."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _KINDS:
            axes = params.get("axes", params.get("axis_name"))
            side = equation.invars if name == "reduce_scatter" else equation.outvars
            size = sum(v.aval.size * v.aval.dtype.itemsize for v in side)
            yield Collective(_KINDS[name], tuple(axes) if isinstance(axes, tuple) else (axes,), size, times)
        inner = times * (params["length"] if name == "scan" else 1)
        for value in jax.tree.leaves(params, is_leaf=_is_program):
            if _is_program(value):
                yield from collectives(getattr(value, "jaxpr", value), inner)


def _is_program(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def traced(task: Any, sizes: tuple[int, int, int], batch: int) -> list[Collective]:
    """The collectives of a training step of `batch` clips on a mesh of these sizes."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    tx = optim.adamw((0.9, 0.95), 1e-8, 0.05, 0.0)
    state, shardings = step.abstract_state(step.Recipe(task.init, tx), mesh)
    train_step = step.make_train_step(task.terms, tx, lambda _: jnp.float32(1e-4), mesh, shardings)
    rows = {
        "video": jax.ShapeDtypeStruct((batch, *task.model.clip_size, task.model.channels), jnp.uint8),
        "index": jax.ShapeDtypeStruct((batch,), jnp.uint32),
        "weight": jax.ShapeDtypeStruct((batch,), jnp.float32),
    }
    return list(collectives(train_step.trace(state, rows, jax.random.key(0)).jaxpr.jaxpr))


def seconds_of(found: list[Collective], sizes: tuple[int, int, int], cluster: Cluster) -> float:
    """Time of the collectives, one after the other, by ring algorithms."""
    axis_sizes, total = dict(zip(sharding.AXES, sizes, strict=True)), 0.0
    for collective in found:
        devices = math.prod(axis_sizes[axis] for axis in collective.axes)
        if devices == 1:
            continue
        # An axis spans those to its right in the mesh, which are nearer neighbours.
        outermost = min(sharding.AXES.index(axis) for axis in collective.axes if axis_sizes[axis] > 1)
        is_near = math.prod(sizes[outermost:]) <= cluster.near
        rounds = {"all-reduce": 2 * (devices - 1) / devices, "permute": 1.0}
        share = rounds.get(collective.kind, (devices - 1) / devices)
        bandwidth = cluster.near_bandwidth if is_near else cluster.far_bandwidth
        total += collective.times * share * collective.bytes / bandwidth
    return total


def main() -> None:
    """Reads the command line, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="base", choices=["small", "base", "large", "huge"])
    parser.add_argument("--batch-per-device", type=int, default=32)
    parser.add_argument("--meshes", default=MESHES)
    arguments = parser.parse_args()
    meshes = [tuple(int(n) for n in mesh.split("x")) for mesh in arguments.meshes.split(",")]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(math.prod(sizes) for sizes in meshes))

    from step_time import make_task

    task = make_task(vit.SIZES[arguments.size], "bfloat16", 1, "pretrain")
    rows = []
    for sizes in meshes:
        batch = arguments.batch_per_device * math.prod(sizes)
        found = traced(task, sizes, batch)
        kinds = sorted({c.kind for c in found})
        row = {
            "mesh": "x".join(map(str, sizes)),
            "batch": batch,
            "collectives": {
                kind: {
                    "count": sum(c.times for c in found if c.kind == kind),
                    "mib": sum(c.times * c.bytes for c in found if c.kind == kind) / 2**20,
                }
                for kind in kinds
            },
        }
        compute = task.flops_per_clip() * arguments.batch_per_device
        for name, cluster in CLUSTERS.items():
            seconds = (compute / cluster.flops / _USE, seconds_of(found, sizes, cluster))
            row[name] = {
                "compute_seconds": seconds[0],
                "communication_seconds": seconds[1],
                "clips_per_second_overlapped": batch / max(seconds),
                "clips_per_second_in_turn": batch / sum(seconds),
            }
        rows.append(row)
    print(f"ViT-{arguments.size} pretraining, {arguments.batch_per_device} clips per device; MiB per step\n")
    columns = sorted({kind for row in rows for kind in row["collectives"]})
    print(f"{'data x fsdp x tensor':22}" + "".join(f"{kind:>22}" for kind in columns))
    for row in rows:
        cells = (row["collectives"].get(kind, {"count": 0, "mib": 0.0}) for kind in columns)
        print(f"{row['mesh']:22}" + "".join(f"{c['count']:>10} {c['mib']:>8.1f} MiB" for c in cells))
    for name in CLUSTERS:
        print(f"\n{name:22}{'compute':>12}{'exchange':>12}{'overlapped':>16}{'in turn':>16}")
        for row in rows:
            at = row[name]
            compute, exchange = (1e3 * at[f"{part}_seconds"] for part in ("compute", "communication"))
            print(
                f"{row['mesh']:22}{compute:>9.1f} ms{exchange:>9.1f} ms"
                f"{at['clips_per_second_overlapped']:>10.0f} cl/s{at['clips_per_second_in_turn']:>11.0f} cl/s"
            )
    print(json.dumps({"size": arguments.size, "use_of_peak": _USE, "rows": rows}))


if __name__ == "__main__":
    main()
