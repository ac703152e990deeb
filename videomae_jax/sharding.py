"""The device mesh ('data', 'fsdp', 'tensor'), path rules for parameters, global arrays from host rows."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")

# First match wins; every leaf of the train state must match. Parameters are replicated for now.
STATE_RULES: Sequence[tuple[str, PartitionSpec]] = ((r".*", PartitionSpec()),)


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over all devices of all hosts; `data = -1` takes the devices that the others leave.

    Raises:
        ValueError: the axes do not use every device.
    """
    devices = jax.device_count()
    if data == -1:
        data = devices // (fsdp * tensor)
    if data * fsdp * tensor != devices:
        raise ValueError(
            f"mesh of data={data} x fsdp={fsdp} x tensor={tensor} does not use the {devices} devices here: "
            f"set --config.mesh.data=-1 or sizes whose product is {devices}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
    """A NamedSharding for each leaf of the train state, by STATE_RULES."""

    def place(path: tuple[Any, ...], _leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, first_match(STATE_RULES, path_name(path)))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def global_batch(mesh: Mesh, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arrays over all hosts from each host's rows, which become rows [h * b, (h + 1) * b)."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local.items()}
