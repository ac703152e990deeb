"""Devices that are not there: XLA compiles for TPUs and NVIDIA GPUs on any machine.

A TPU's compiler comes with libtpu, a GPU's with JAX's CUDA plugin; neither needs its device. What comes out
can be read (memory, traffic, exchange: `program.Program`), not run.
"""

import dataclasses
import importlib.util
import logging
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from videomae_jax.config import UserError
from videomae_jax.hardware import CHIPS, Chip

# Limits of CUDA's architectures that XLA asks for; those of the chips stand in `_GPUS`.
_ARCHITECTURE = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
"""


class _Gpu(NamedTuple):
    major: int
    cores: int
    units: int
    clock_ghz: float
    memory: int
    cache: int
    shared: int


_GPUS = {
    "a100": _Gpu(8, 108, 64, 1.41, 85_100_068_864, 41_943_040, 167_936),
    "h100": _Gpu(9, 132, 128, 1.98, 84_942_979_072, 52_428_800, 233_472),
    "h200": _Gpu(9, 132, 128, 1.98, 151_397_597_184, 52_428_800, 233_472),
    "b200": _Gpu(10, 148, 128, 1.965, 191_514_411_008, 132_644_864, 233_472),
}
# As libtpu calls them, and how many axes their wiring has.
_TPUS = {"v4": ("v4", 3), "v5e": ("v5e", 2), "v5p": ("v5", 3), "v6e": ("v6e", 2)}
_COMPILERS = {"tpu": ("libtpu", "plan"), "cuda": ("jax_cuda12_plugin", "plan,cuda")}
USAGE = "v5e:4x4, v6e:2x4, v5p:2x2x1, v4:2x2x2, h100:8, h200:4x8 (machines x GPUs), a100:1, b200:8 or cpu:2"


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
        platform: "tpu", "cuda" or "cpu".
        chip: their data sheet; None for a CPU, of which there is none.
        host: how many of them a machine has.
    """

    name: str
    platform: str
    chip: Chip | None
    devices: list[Any]
    host: int


def without_devices() -> None:
    """Keeps JAX, and libtpu, from looking for devices of this machine; before anything of JAX is used."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # without a TPU there is nothing to lock
    # A CUDA plugin complains at length that its GPU is not there.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """("v5e", (4, 4)) of "v5e:4x4".

    Raises:
        UserError: another form, an unknown chip, or a wiring that it does not have.
    """
    name, _, sizes = text.partition(":")
    shape = tuple(int(size) for size in sizes.split("x") if size.isdigit())
    if not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*)*", text) or name not in (*CHIPS, "cpu"):
        raise UserError(f"--topology={text} is not understood: use {USAGE}")
    if name in _TPUS and len(shape) != _TPUS[name][1]:
        axes = "x".join("2" * _TPUS[name][1])
        raise UserError(
            f"--topology={text}: {name} chips are wired in {_TPUS[name][1]} axes, as {name}:{axes}"
        )
    if len(shape) > {"cpu": 1, **dict.fromkeys(_GPUS, 2)}.get(name, 3):
        raise UserError(f"--topology={text} is not understood: use {USAGE}")
    return name, shape


def topology(text: str) -> Topology:
    """The devices of a name such as "v5e:4x4" or "h100:8".

    Raises:
        UserError: as `parse`; a compiler that is not installed or knows no such topology.
    """
    name, shape = parse(text)
    if name == "cpu":
        jax.config.update("jax_num_cpu_devices", shape[0])
        return Topology(text, "cpu", None, jax.devices("cpu"), shape[0])
    platform = "tpu" if name in _TPUS else "cuda"
    try:
        described = _tpus(name, shape) if platform == "tpu" else _gpus(name, shape)
    except Exception as error:  # plugins raise what they like
        reason = " ".join(str(error).split())[:200]
        package, extra = _COMPILERS[platform]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--topology={text}: its compiler is not installed: EXTRAS={extra} launch/local.sh plan ..."
            ) from None
        raise UserError(f"--topology={text} is refused by its compiler ({reason}): use {USAGE}") from None
    chip, devices = CHIPS[name], list(described.devices)
    cores = len(devices) // math.prod(shape)
    if cores > 1:  # of a v4 its two cores are described, each of which has half of the chip
        chip = dataclasses.replace(
            chip,
            flops=chip.flops / cores,
            memory=chip.memory / cores,
            bandwidth=chip.bandwidth / cores,
            near_bandwidth=chip.near_bandwidth / cores,
        )
    host = chip.host * cores if platform == "tpu" else shape[-1]
    return Topology(text, platform, chip, devices, min(host, len(devices)))


def _tpus(name: str, shape: tuple[int, ...]):
    spec = f"{_TPUS[name][0]}:{'x'.join(map(str, shape))}"
    # A host has 2 x 2 chips; of less than that it has what there is.
    bounds = tuple(min(size, most) for size, most in zip((*shape, 1)[:3], (2, 2, 1), strict=True))
    return topologies.get_topology_desc(spec, platform="tpu", chips_per_host_bounds=bounds)


def _gpus(name: str, shape: tuple[int, ...]):
    gpu, chip = _GPUS[name], CHIPS[name]
    config = f"""
gpu_device_info {{{_ARCHITECTURE}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {chip.bandwidth:.0f}
  device_memory_size: {gpu.memory}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  cuda_compute_capability {{ major: {gpu.major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kinds[0]}"
"""
    hosts, each = (1, *shape) if len(shape) == 1 else shape
    return topologies.get_topology_desc(
        name, platform="cuda", target_config=config, topology=f"1x{hosts}x{each}"
    )
