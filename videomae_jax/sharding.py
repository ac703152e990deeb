"""Hosts, the device mesh ('data', 'fsdp', 'tensor'), path rules for parameters, and what devices exchange."""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
"""Axes that a batch is cut over."""

# First match wins; every leaf of the train state must match: parameters, their moments and their average, and
# the trees that a method has beside them.
# Matrices are cut over `fsdp` along the width, and over `tensor` along heads and hidden units, so that a
# block needs one sum over `tensor` after each of its branches. Vectors are small: whole everywhere, but for
# those that are added where `tensor` has cut.
STATE_RULES: Sequence[tuple[str, PartitionSpec]] = (
    (r"step|opt_state/.*count", PartitionSpec()),
    (r".*/blocks/attention/qkv", PartitionSpec(None, "fsdp", None, "tensor")),
    (r".*/blocks/fc1/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r".*/blocks/(attention/out|fc2)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r".*/blocks/(attention/[qv]_bias|fc1/bias)", PartitionSpec(None, "tensor")),
    (r".*/(kernel|decoder/project)", PartitionSpec("fsdp")),
    (r".*/(bias|scale|gamma[12]|mask_token)", PartitionSpec()),
)


def start_hosts(hosts: str) -> None:
    """Joins this process to the others of a run, before anything else of JAX is used.

    Args:
        hosts: "tpu", the metadata of a TPU slice; "slurm", what `srun` says; "I/N@HOST:PORT", process I of N,
            whose process 0 listens at HOST:PORT. "auto": slurm inside `srun` with several tasks, tpu where
            TPU_WORKER_HOSTNAMES lists several, else this process is alone.

    Raises:
        ValueError: another form.
        RuntimeError: the others cannot be reached.
    """
    if hosts == "auto":
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            hosts = "slurm"
        elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
            hosts = "tpu"
        else:
            return
    # For CPU processes; without effect elsewhere.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if hosts in ("slurm", "tpu"):
        jax.distributed.initialize()
        return
    named = re.fullmatch(r"(\d+)/(\d+)@(.+:\d+)", hosts)
    if not named or not int(named[1]) < int(named[2]):
        raise ValueError(
            f"--hosts={hosts} is none of auto, tpu, slurm, or I/N@HOST:PORT with I below N, such as "
            f"0/2@10.0.0.1:1234"
        )
    jax.distributed.initialize(named[3], int(named[2]), int(named[1]))


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all hosts, or these; `data = -1` takes those that the others leave.

    Raises:
        ValueError: the axes do not use every device.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        if len(devices) % (fsdp * tensor):
            raise ValueError(
                f"mesh.fsdp={fsdp} x mesh.tensor={tensor} does not divide the {len(devices)} devices here"
            )
        data = len(devices) // (fsdp * tensor)
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh of data={data} x fsdp={fsdp} x tensor={tensor} does not use the {len(devices)} devices "
            f"here: set --config.mesh.data=-1 or sizes whose product is {len(devices)}"
        )
    # Host by host, and not by the wiring as `jax.make_mesh` has it: a batch's rows are those of each host in
    # turn, and the devices along `tensor` share a host.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, such as `params/encoder/blocks/fc1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def first_match(rules: Sequence[tuple[str, T]], name: str) -> T:
    """The value of the first rule whose pattern matches the whole `name`.

    Raises:
        ValueError: no rule matches; the name must get a rule of its own.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise ValueError(f"no rule matches {name!r}: add one")


def state_sharding(mesh: Mesh, abstract_state: Any) -> Any:
    """A NamedSharding for each leaf of the train state, by STATE_RULES.

    Raises:
        ValueError: a leaf that no rule matches, or one that the mesh does not divide.
    """

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = first_match(STATE_RULES, name)
        for axis, mesh_axis in enumerate(spec):
            if mesh_axis and leaf.shape[axis] % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide axis {axis} of {name}, whose "
                    f"shape is {list(leaf.shape)}: choose a divisor of {leaf.shape[axis]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding_of, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def distribute(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a value that is the same on all hosts; each takes its part of it."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def reassemble(tree: Any, target: NamedSharding) -> Any:
    """The same buffers as arrays over other devices: those of this host instead of all, or the other way."""
    order = sorted(target.addressable_devices, key=lambda device: device.id)

    def assemble(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = assemble(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        pieces = [parts[device] for device in order]
        shape = pieces[0].shape
        if target.spec:
            shape = (shape[0] * target.mesh.size, *shape[1:])
        return jax.make_array_from_single_device_arrays(shape, target, pieces)

    return jax.tree.map(assemble, tree)


@functools.cache
def _replicator(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Whole on every device: arrays that the mesh cuts, or NumPy arrays that are the same on all hosts.

    What is whole everywhere already is not copied.
    """
    whole = replicated(mesh)

    def is_whole(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(whole, leaf.ndim)

    return tree if all(map(is_whole, jax.tree.leaves(tree))) else _replicator(mesh)(tree)


def by_rows(function: Callable[[Any, Any], jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """`function` of whole parameters and rows, run by each device on its rows; for use inside `jax.jit`."""
    rows = PartitionSpec(ROW_AXES)
    specs = (PartitionSpec(), rows)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)


def global_batch(mesh: Mesh, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arrays over all hosts from each host's rows, which become rows [h * b, (h + 1) * b)."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}


# What a function may do that `jax.shard_map` or `jax.pmap` runs on each device's part of the arrays.


def gather(params: Any, prefix: str = "", stacked: bool = False) -> Any:
    """Parameters whose `fsdp` parts are put together; the gradient is summed and cut again.

    Args:
        prefix: of the leaves' names in STATE_RULES.
        stacked: the leaves are one layer of those that the rules name.
    """

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = first_match(STATE_RULES, prefix + path_name(path))
        axes = [axis for axis, mesh_axis in enumerate(spec) if mesh_axis == "fsdp"]
        return jax.lax.all_gather(leaf, "fsdp", axis=axes[0] - stacked, tiled=True) if axes else leaf

    return jax.tree_util.tree_map_with_path(whole, params)


@jax.custom_vjp
def enter_tensor(x: jax.Array) -> jax.Array:
    """The identity, before matrices that `tensor` cuts by columns; gradients are summed over it."""
    return x


@jax.custom_vjp
def leave_tensor(x: jax.Array) -> jax.Array:
    """The sum over `tensor`, after matrices that it cuts by rows; the gradient is that of each part."""
    return jax.lax.psum(x, "tensor")


enter_tensor.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.psum(grad, "tensor"),))
leave_tensor.defvjp(lambda x: (jax.lax.psum(x, "tensor"), None), lambda _, grad: (grad,))
