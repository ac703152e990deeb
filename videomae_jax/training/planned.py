"""A run on devices that are not there: its settings as they are there, its compiled step, and what bounds it.

A bound is not a time: no step is faster than its matmuls at the data sheet's peak, its traffic with memory at
full bandwidth, or its exchange over full links; a real one is slower than the slowest of the three.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from videomae_jax import config as settings
from videomae_jax import storage
from videomae_jax.config import Config, Schedule, UserError
from videomae_jax.data import pipeline, transcode
from videomae_jax.data.sources import Record, Source
from videomae_jax.hardware import Chip
from videomae_jax.training import compute, loop, report, step, trainer
from videomae_jax.training.ahead import Topology
from videomae_jax.training.program import Bytes, Collective, Program
from videomae_jax.training.task import Make, Task

PLATFORMS = {"tpu": "tpu", "cuda": "gpu", "cpu": "cpu"}
_SAY_EVERY = 30  # seconds of compiling
_MOVERS = 12  # kinds of traffic that are kept
_FORMAT = "3"  # of what is kept of a program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step, per device.

    Attributes:
        trouble: why it does not compile; "": it does.
        arguments, temporaries: bytes.
        traffic: bytes that a step reads and writes.
        collectives: what a step exchanges.
        movers: what moves most of the traffic, and its bytes.
        talks_to_host: whether a step waits for the host.
    """

    trouble: str = ""
    arguments: int = 0
    temporaries: int = 0
    traffic: Bytes = dataclasses.field(default_factory=Bytes)
    collectives: tuple[Collective, ...] = ()
    movers: tuple[tuple[str, float], ...] = ()
    talks_to_host: bool = False

    @property
    def is_too_large(self) -> bool:
        """Whether it does not compile because it would not fit: a TPU's compiler refuses such programs."""
        return "RESOURCE_EXHAUSTED" in self.trouble

    def fits(self, chip: Chip | None) -> bool | None:
        """Whether it fits the memory of a chip; None: there is no data sheet."""
        if chip is None:
            return None
        return not self.trouble and self.arguments + self.temporaries <= chip.memory


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run on devices that are not there: its settings as they are there, and what follows from them.

    Attributes:
        has_length: whether the schedule's steps are those of the run, or its epochs cannot be counted.
    """

    config: Config
    task: Task
    schedule: Schedule
    has_length: bool
    topology: Topology
    mesh: Mesh

    @property
    def rows(self) -> int:
        """Clips of a step on each device, or group of them that `tensor` puts together."""
        return self.config.data.batch_size // (self.mesh.shape["data"] * self.mesh.shape["fsdp"])

    @property
    def share(self) -> float:
        """Clips of a step for each device."""
        return self.config.data.batch_size / self.mesh.size


class _Imagined(Source):
    """Videos that are not there, for the methods that ask for classes; none of them can be read."""

    def __getitem__(self, index: int) -> Record:
        return Record(video="", name="", label=0, record=index, error="only planned")


def prepare(
    config: Config,
    make: Make,
    topology: Topology,
    videos: int,
    classes: int,
    check: compute.Check | None = None,
) -> Planned:
    """The run that the settings name, on these devices.

    Args:
        videos: of the training part; 0: unknown.
        classes: of a classifier.
        check: of kernels, see `compute.settled`.

    Raises:
        UserError: settings that do not fit together or these devices.
    """
    config = compute.settled(settings.checked(config), PLATFORMS[topology.platform], check)
    if config.mesh.mapping != "jit":
        raise UserError("plan compiles the step of mesh.mapping=jit: leave it at that")
    mesh = compute.make_mesh(config, topology.devices, topology.host)
    loop.check_batch(config, mesh)
    names = tuple(f"class {i}" for i in range(classes))
    rows = tuple(tuple(float(i == j) for j in range(classes)) for i in range(classes))
    has_targets = config.head.kind != "softmax"
    if config.data.resize == "auto":  # depends on videos that are not there
        config.data.resize = "host"
    source = _Imagined("", names, tuple(range(classes)), names, rows if has_targets else (), config.head.kind)
    source = dataclasses.replace(source, short_side=transcode.Form.short_side)
    task = make(config, source, config.init_from)
    loop.check_parts(config, task, mesh)
    # Of unknown videos there is one step an epoch, which changes no program but by a constant.
    schedule = settings.make_schedule(config, videos or config.data.batch_size)
    has_length = videos > 0 or config.optim.unit == "steps"
    return Planned(config, task, schedule, has_length, topology, mesh)


def batch_shapes(task: Task, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch that the loader makes, from what it makes of a video that cannot be read."""
    transform: Any = task.clip_transform
    element = (0, Record(video="", name="", label=0, record=0, error="only planned"))
    is_random = hasattr(transform, "random_map")
    made = transform.random_map(element, np.random.default_rng(0)) if is_random else transform.map(element)
    fields = {name: np.asarray(value) for name, value in made.items() if name not in pipeline.HOST_ONLY}
    shapes = {name: value.shape[1:] for name, value in fields.items()}  # the first axis: clips of a video
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shapes[name]), fields[name].dtype) for name in sorted(fields)
    }
    head, classes = getattr(task.model, "head", "softmax"), getattr(task.model, "classes", ())
    if head != "softmax":
        batch["target"] = jax.ShapeDtypeStruct((batch_size, len(classes)), np.dtype("float32"))
    return batch


def compile_step(planned: Planned) -> Compiled:
    """Compiles the step, or reads what came of it the last time, by the program's text."""
    config, task, mesh = planned.config, planned.task, planned.mesh
    state, shardings = step.abstract_state(trainer.recipe(config, task), mesh)
    train_step = trainer.make_step(config, task, planned.schedule, mesh, shardings)
    batch = batch_shapes(task, config.data.batch_size)
    lowered = train_step.trace(state, batch, jax.eval_shape(lambda: jax.random.key(0))).lower()
    described = [
        _FORMAT,
        planned.topology.name,
        jax.__version__,
        *_versions(),
        *(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
        lowered.as_text(),
    ]
    key = hashlib.sha256("\n".join(described).encode()).hexdigest()
    path = storage.cache() / "plans" / f"{key}.json"
    if path.exists():
        return _from_json(json.loads(path.read_text()))
    with _Progress(f"compiling for {planned.topology.name}"):
        try:
            compiled = _compiled(lowered)
            found = read(compiled, mesh)
        except Exception as error:  # compilers raise what they like
            found = Compiled(trouble=" ".join(str(error).split())[:300] or type(error).__name__)
            if not found.is_too_large:  # all else may be another the next time
                return found
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(path, dataclasses.asdict(found))
    return found


def _versions() -> Iterator[str]:
    """Of what compiles, as far as it is installed."""
    for name in ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt"):
        yield from (found.version for found in importlib.metadata.distributions(name=name))


def _compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except Exception as error:
        # On a device XLA tries its own matmuls against cuBLAS; without one it takes its own, even where it
        # then finds no tiles.
        if "output tile sizes" not in str(error):
            raise
        report.say(
            "XLA finds no tiles for a matmul of its own, which it takes where no device tries: now by cuBLAS"
        )
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def read(compiled: Any, mesh: Mesh) -> Compiled:
    """What a compiled step needs, moves and exchanges."""
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    collectives = tuple(program.collectives(dict(mesh.shape)))
    movers = tuple(program.movers(_MOVERS))
    return Compiled("", *sizes, program.bytes, collectives, movers, program.talks_to_host)


def _from_json(data: dict[str, Any]) -> Compiled:
    read_back: dict[str, Any] = {
        "traffic": Bytes(*data["traffic"]),
        "collectives": tuple(
            Collective(kind, tuple(axes), *rest) for kind, axes, *rest in data["collectives"]
        ),
        "movers": tuple((what, size) for what, size in data["movers"]),
    }
    return Compiled(**data | read_back)


class _Progress:
    """Says every now and then that something slow goes on."""

    def __init__(self, what: str):
        self.what, self._is_over = what, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.time()
        while not self._is_over.wait(_SAY_EVERY):
            report.say(f"{self.what}: {time.time() - started:.0f} s")


def link_seconds(found: tuple[Collective, ...], mesh_shape: dict[str, int], chip: Chip, host: int) -> float:
    """Seconds of a step's exchange, one after the other, by ring algorithms at full bandwidth.

    A group in several machines exchanges within each at the same time as between them, where each of its
    devices in a machine carries its share.

    Args:
        host: devices that share fast links; all of a TPU slice do.
    """
    sizes, total = tuple(mesh_shape.values()), 0.0
    # An axis spans those to its right in the mesh, which are nearer neighbours.
    apart = {axis: math.prod(sizes[place + 1 :]) for place, axis in enumerate(mesh_shape)}
    for collective in found:
        devices = math.prod(mesh_shape[axis] for axis in collective.axes)
        inner = math.prod(max(1, min(mesh_shape[axis], host // apart[axis])) for axis in collective.axes)
        doors = 1 if collective.kind == "collective-permute" else inner
        within = _ring_share(collective.kind, inner) / chip.near_bandwidth
        between = _ring_share(collective.kind, devices // inner) / (doors * chip.far_bandwidth)
        total += collective.times * collective.bytes * max(within, between)
    return total


def _ring_share(kind: str, devices: int) -> float:
    """How often a ring of so many devices sends the bytes of a collective."""
    shares = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": float(devices > 1)}
    return shares.get(kind, (devices - 1) / devices)


def bounds(planned: Planned, compiled: Compiled) -> dict[str, float]:
    """Clips per second and device that matmuls, memory and links each allow, by the data sheet."""
    chip, config = planned.topology.chip, planned.config
    if chip is None or compiled.trouble:
        return {}
    # What is computed again: all of the forward pass, a third of the whole.
    flops = planned.task.flops_per_clip() * (4 / 3 if config.model.remat == "full" else 1)
    found = {"matmuls": chip.flops / flops}
    if not chip.bandwidth:  # nothing else is known of it
        return found
    found["memory"] = chip.bandwidth * planned.share / compiled.traffic.memory
    near = chip.near if planned.topology.platform == "tpu" else planned.topology.host
    exchange = link_seconds(compiled.collectives, dict(planned.mesh.shape), chip, near)
    return found | ({"links": planned.share / exchange} if exchange else {})
