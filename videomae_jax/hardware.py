"""Data sheets of accelerators: what a device computes, holds, moves and sends."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, by its makers' data sheets.

    Attributes:
        kinds: how `device_kind` begins, as JAX calls it.
        flops: bfloat16 operations per second, without sparsity.
        memory: bytes that a program may use; of GPUs three quarters, as JAX takes them unless told otherwise.
        bandwidth: bytes per second to and from that memory.
        near: devices that the fast links join, at most.
        near_bandwidth: bytes per second and direction of all fast links of a device.
        far_bandwidth: the same between slices or machines, of a device's share of the network.
        host: devices of one machine.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float = 0.0
    bandwidth: float = 0.0
    near: int = 1
    near_bandwidth: float = 0.0
    far_bandwidth: float = 0.0
    host: int = 1


_GIB = 2**30
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * _GIB, 1228e9, 4096, 150e9, 3e9, 4),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * _GIB, 819e9, 256, 100e9, 3e9, 4),
    "v5p": Chip(("TPU v5",), 459e12, 95.74 * _GIB, 2765e9, 8960, 300e9, 3e9, 4),
    "v6e": Chip(("TPU v6",), 918e12, 31.25 * _GIB, 1640e9, 256, 224e9, 3e9, 4),
    "a100": Chip(("NVIDIA A100",), 312e12, 0.75 * 85.1e9, 2039e9, 8, 300e9, 25e9, 8),
    "h100": Chip(("NVIDIA H100",), 989e12, 0.75 * 84.9e9, 3352e9, 8, 450e9, 50e9, 8),
    "h200": Chip(("NVIDIA H200",), 989e12, 0.75 * 151.4e9, 4800e9, 8, 450e9, 50e9, 8),
    "b200": Chip(("NVIDIA B200",), 2250e12, 0.75 * 191.5e9, 7672e9, 8, 900e9, 50e9, 8),
}
"""Those that `plan` compiles for."""

_OTHERS = (
    Chip(("NVIDIA H100 PCIe",), 756e12),
    Chip(("NVIDIA H100 NVL",), 835e12),
    Chip(("NVIDIA L4",), 121e12),
    Chip(("NVIDIA L40",), 181e12),
    Chip(("NVIDIA L40S",), 362e12),
)


def chip_of(device_kind: str) -> Chip | None:
    """The data sheet of a device by what JAX calls it; None: unknown."""
    fitting = [
        (len(kind), chip)
        for chip in (*CHIPS.values(), *_OTHERS)
        for kind in chip.kinds
        if device_kind.startswith(kind)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def peak_flops(device_kind: str) -> float | None:
    """Bfloat16 operations per second that a device's data sheet promises, without sparsity; None: unknown."""
    chip = chip_of(device_kind)
    return chip.flops if chip else None
