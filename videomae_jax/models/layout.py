"""Where rows and parameters lie while a function runs on one device's part of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _same(x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which mesh axes cut the batch, and how blocks run whose parameters are cut.

    Attributes:
        row_axes: mapped axes that cut the batch's rows; none: this device has all of them.
        gather_block: the parameters of a block, as far as it needs them, from this device's part; None: it
            has them all.
        enter: what a block's heads and hidden units read, from what every device has.
        leave: what every device has, from what its heads and hidden units add to it.
    """

    row_axes: tuple[str, ...] = ()
    gather_block: Callable[[Any], Any] | None = None
    enter: Callable[[jax.Array], jax.Array] = _same
    leave: Callable[[jax.Array], jax.Array] = _same

    def sum_over_rows(self, x: Any) -> Any:
        """The sum over all devices that have rows of their own; gradients flow back to each."""
        return jax.lax.psum(x, self.row_axes) if self.row_axes else x

    def all_rows(self, rows: Float[Array, "b *S"]) -> Float[Array, "B *S"]:
        """The rows of the global batch, in its order."""
        return jax.lax.all_gather(rows, self.row_axes, tiled=True) if self.row_axes else rows

    def first_row(self, rows: int) -> jax.Array:
        """The place in the global batch of this device's first row, where each device has `rows`."""
        return jax.lax.axis_index(self.row_axes) * rows if self.row_axes else jnp.int32(0)

    def mirrored(self, rows: jax.Array) -> jax.Array:
        """Row B - 1 - i of the global batch in the place of row i, wherever it is."""
        if not self.row_axes:
            return rows[::-1]
        devices = jax.lax.axis_size(self.row_axes)
        order = [(i, devices - 1 - i) for i in range(devices)]
        return jax.lax.ppermute(rows[::-1], self.row_axes, order)


WHOLE = Layout()
"""One device that has everything."""
