"""What the settings mean on this machine: the dtype, the attention kernel, the mesh."""

import functools

import jax
import jax.numpy as jnp

from videomae_jax import sharding
from videomae_jax.config import Config, UserError
from videomae_jax.models import attention
from videomae_jax.training import report


def on_this_machine(config: Config) -> Config:
    """The settings with what "auto" means here, so that a run's own say how it was computed.

    Tries kernels where the choice depends on them: compiles, for seconds, on a GPU.

    Raises:
        UserError: `model.attention` names a kernel that does not work here.
    """
    config = config.copy_and_resolve_references()
    model = config.model
    if model.dtype == "auto":
        model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    widths = {stack.width // stack.num_heads for stack in (model.encoder, model.decoder)}
    model.attention = choose_attention(model.attention, model.dtype, tuple(sorted(widths)))
    return config


@functools.cache
def choose_attention(wanted: str, dtype: str, head_widths: tuple[int, ...]) -> str:
    """What `model.attention` means on this machine: "auto" tries the fused kernel of a GPU, both ways.

    Raises:
        UserError: the kernel that is asked for does not work here.
    """
    if wanted not in ("auto", "cudnn"):
        return wanted
    if wanted == "auto" and jax.default_backend() == "cpu":
        return "blocks"
    if wanted == "auto" and (jax.default_backend() != "gpu" or dtype == "float32"):
        return "xla"

    def probe(x: jax.Array) -> jax.Array:
        return attention.attend(x, x, x, "cudnn").astype(jnp.float32).sum()

    try:
        for width in head_widths:
            heads = jnp.zeros((2, 2, 160, width), dtype)
            jax.block_until_ready(jax.jit(jax.grad(probe))(heads))
    except Exception as error:  # compilers and drivers raise what they like
        reason = str(error).strip().split("\n")[0][:200]
        if wanted == "cudnn":
            raise UserError(
                f"model.attention=cudnn does not work here with {dtype} ({reason}): set it to auto or xla"
            ) from None
        report.say(f"model.attention=auto: the fused kernel does not work here, using xla ({reason})")
        return "xla"
    return "cudnn"


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh that the settings ask for.

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
    if jax.local_device_count() % sizes.tensor:
        raise UserError(
            f"mesh.tensor={sizes.tensor} does not divide the {jax.local_device_count()} devices of a host: "
            f"a clip's devices must share a host"
        )
    try:
        return sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    except ValueError as error:
        raise UserError(str(error)) from None
