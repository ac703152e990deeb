"""What the settings mean on some devices: the dtype, the attention kernel, the mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from videomae_jax import sharding
from videomae_jax.config import Config, UserError
from videomae_jax.data.sources import Source
from videomae_jax.keys import KEYS
from videomae_jax.models import attention
from videomae_jax.training import report

_NEAR = 1.5  # how much larger than a clip frames may be whose crops the device resizes

Check = Callable[[str, str, tuple[int, ...]], str]
"""(kernel, dtype, widths of heads) -> why it does not work, or ""."""


def on_this_machine(config: Config) -> Config:
    """The settings with what "auto" means here, so that a run's own say how it was computed.

    Tries kernels where the choice depends on them: compiles, for seconds, on an accelerator.

    Raises:
        UserError: `model.attention` names a kernel that does not work here.
    """
    return settled(config, jax.default_backend(), try_kernels)


def settled(config: Config, platform: str, check: Check | None) -> Config:
    """The settings with what "auto" means on "cpu", "gpu" or "tpu".

    Args:
        check: of the kernels of accelerators; None: they work.

    Raises:
        UserError: `model.attention` names a kernel that does not work there.
    """
    config = config.copy_and_resolve_references()
    model = config.model
    if model.dtype == "auto":
        model.dtype = "float32" if platform == "cpu" else "bfloat16"
    widths = {stack.width // stack.num_heads for stack in (model.encoder, model.decoder)}
    wanted = model.attention
    kind = attention.best(platform, model.dtype) if wanted == "auto" else wanted
    needed = attention.PLATFORM_OF.get(kind, platform)
    trouble = f"it is for a {needed.upper()}" if needed != platform else ""
    if kind in attention.PLATFORM_OF and not trouble and check:
        trouble = check(kind, model.dtype, tuple(sorted(widths)))
    if trouble and wanted != "auto":
        raise UserError(
            f"model.attention={wanted} does not work here with {model.dtype} ({trouble}): set it to auto"
        )
    if trouble:
        kind = attention.best(platform, model.dtype, kernels=False)
        report.say(f"model.attention=auto: the fused kernel does not work here, using {kind} ({trouble})")
    model.attention = kind
    return config


def settled_resize(config: Config, train: Source, platform: str) -> Config:
    """The settings with where the crops of these videos are resized.

    Raises:
        UserError: `data.resize` asks for what these videos do not allow, or is unknown.
    """
    wanted = config.data.resize
    if wanted not in ("auto", "host", "device"):
        raise UserError(f"data.resize={wanted!r} is unknown: use host, device or auto")
    if wanted == "device" and not train.short_side:
        raise UserError(
            "data.resize=device needs frames of a known size: prepare the videos (again, if an older version "
            "did), or leave data.resize at auto"
        )
    if wanted == "auto" and config.task in KEYS["data.resize"].read_by:
        config = config.copy_and_resolve_references()
        # Clips are shipped as squares of the largest short side: of much larger ones nothing is gained.
        is_near = 0 < train.short_side <= _NEAR * max(config.data.size)
        config.data.resize = "device" if platform != "cpu" and is_near else "host"
    return config


@functools.cache
def try_kernels(kind: str, dtype: str, head_widths: tuple[int, ...]) -> str:
    """Why a kernel does not work on this machine, both ways; "": it does."""

    def probe(x: jax.Array) -> jax.Array:
        return attention.attend(x, x, x, kind).astype(jnp.float32).sum()

    try:
        for width in head_widths:
            heads = jnp.zeros((2, 2, 640, width), dtype)
            jax.block_until_ready(jax.jit(jax.grad(probe))(heads))
    except Exception as error:  # compilers and drivers raise what they like
        return str(error).strip().split("\n")[0][:200] or type(error).__name__
    return ""


def make_mesh(
    config: Config, devices: Sequence[Any] | None = None, host_devices: int = 0
) -> jax.sharding.Mesh:
    """The mesh that the settings ask for.

    Args:
        devices: over which, `host_devices` of them in each machine; None: all of this run.

    Raises:
        UserError: it does not use every device, or asks for what `mesh.mapping` or a host cannot do.
    """
    sizes = config.mesh
    if sizes.mapping not in ("jit", "pmap"):
        raise UserError(f"mesh.mapping={sizes.mapping!r} is unknown: use jit or pmap")
    if sizes.mapping == "pmap" and sizes.fsdp * sizes.tensor > 1:
        raise UserError(
            "mesh.mapping=pmap gives each device a whole copy of the state: with mesh.fsdp or mesh.tensor "
            "use --config.mesh.mapping=jit"
        )
    host_devices = host_devices or jax.local_device_count()
    if host_devices % sizes.tensor:
        raise UserError(
            f"mesh.tensor={sizes.tensor} does not divide the {host_devices} devices of a host: "
            f"a clip's devices must share a host"
        )
    try:
        return sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    except ValueError as error:
        raise UserError(str(error)) from None
