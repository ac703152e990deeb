"""The train step: loss, accumulated gradients, update, averaged weights, and the guard against non-finite
numbers; one `jax.jit` or `jax.pmap`.

Every device computes the gradient of its rows, by the same function whatever the mesh, so what devices say
to each other is written here and in `sharding`, and not found by the compiler.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt

from videomae_jax import sharding
from videomae_jax.models import vit

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array, Int[Array, ""]], Float[Array, " B"]]
"""(params, batch, root key, step) -> the loss of each clip."""
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


_STREAMS = ("mask", "drop_path", "mix", "erase", "dropout", "init")


def stream(root: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The key that everything random of one kind is drawn from."""
    return jax.random.fold_in(root, _STREAMS.index(name))


def clip_keys(root: Key[Array, ""], name: str, index: UInt[Array, " B"]) -> Key[Array, " B"]:
    """A key of one kind for each example, a function of (root key, global example index) only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(stream(root, name), index)


class TrainState(NamedTuple):
    """All that training carries from step to step; plain nested dicts of arrays.

    `ema` is the moving average of the parameters, None where none is kept.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: Any = None


def _creator(
    init: Callable[[Key[Array, ""]], Any], tx: optax.GradientTransformation, has_ema: bool
) -> Callable[[Key[Array, ""]], TrainState]:
    def create(key: Key[Array, ""]) -> TrainState:
        params = init(key)
        ema = jax.tree.map(jnp.copy, params) if has_ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

    return create


def abstract_state(
    init: Callable[[Key[Array, ""]], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    has_ema: bool = False,
) -> tuple[TrainState, Any]:
    """(shapes and dtypes of the state, its shardings), without computing anything."""
    shapes = jax.eval_shape(_creator(init, tx, has_ema), jax.random.key(0))
    return shapes, sharding.state_sharding(mesh, shapes)


def init_state(
    init: Callable[[Key[Array, ""]], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    has_ema: bool = False,
) -> tuple[TrainState, Any]:
    """(state, its shardings): every leaf is born where it belongs, none on one device first."""
    _, shardings = abstract_state(init, tx, mesh, has_ema)
    create = jax.jit(_creator(init, tx, has_ema), out_shardings=shardings)
    return create(stream(jax.random.key(seed), "init")), shardings


def microbatches(batch: Batch, count: int) -> Batch:
    """Cuts a device's rows into `count` parts along a new first axis.

    Rows are taken from both ends at once, so that rows i and B - 1 - i of the global batch, which mixup
    pairs, share a microbatch wherever a device's microbatch is even, again at mirrored places.
    """

    def cut(rows: jax.Array) -> jax.Array:
        size = len(rows) // count
        order = np.arange(len(rows))
        if size % 2 == 0:
            front = order[: len(rows) // 2].reshape(count, -1)
            order = np.concatenate([front, order[::-1][front[:, ::-1]]], axis=1)
        return rows[order.reshape(-1)].reshape(count, size, *rows.shape[1:])

    return jax.tree.map(cut, batch)


def _cut(mesh: Mesh) -> vit.Cut:
    """How blocks run on this mesh."""
    cut = vit.Cut()
    if mesh.shape["fsdp"] > 1:
        gather = functools.partial(sharding.gather, prefix="params/blocks/", stacked=True)
        cut = cut._replace(gather=gather)
    if mesh.shape["tensor"] > 1:
        cut = cut._replace(enter=sharding.enter_tensor, leave=sharding.leave_tensor)
    return cut


def _gather_outside_blocks(params: Any) -> Any:
    """The parameters with those whole that no block gathers for itself."""
    flat = flatten_dict(params)
    others = unflatten_dict({name: leaf for name, leaf in flat.items() if "blocks" not in name})
    return unflatten_dict(flat | flatten_dict(sharding.gather(others, "params/")))


def _make_gradients(
    loss_fn: LossFn, accumulate: int, cut: vit.Cut, axes: tuple[str, ...], specs: Any
) -> Callable[[Any, Batch, jax.Array, Int[Array, ""]], tuple[Float[Array, ""], Float[Array, ""], Any]]:
    """(params, batch, root, step) -> (loss, clips, gradient), for one device's part of the first two.

    `axes` cut the batch. Losses and gradients are summed over them once, after the last microbatch; where
    `specs` cut a parameter over one of them, `sharding.gather` has summed its gradient already.
    """

    def gradients(params: Any, batch: Batch, root: jax.Array, number: Int[Array, ""]):
        clips = jax.lax.psum(batch["weight"].sum(), axes)

        def part(params: Any, rows: Batch) -> Float[Array, ""]:
            losses = loss_fn(_gather_outside_blocks(params) if cut.gather else params, rows, root, number)
            return jnp.sum(rows["weight"] * losses) / jnp.maximum(clips, 1)

        def add(total: Any, rows: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(part)(params, rows)), None

        with sharding.rows_over(axes), vit.cut_blocks(cut):
            if accumulate == 1:
                loss, grads = jax.value_and_grad(part)(params, batch)
            else:
                zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
                loss, grads = jax.lax.scan(add, zero, microbatches(batch, accumulate))[0]
        grads = jax.tree.map(
            lambda grad, spec: jax.lax.psum(grad, tuple(axis for axis in axes if axis not in spec)),
            grads,
            specs,
        )
        return jax.lax.psum(loss, axes), clips, grads

    return gradients


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
    state_shardings: Any,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    mapping: str = "jit",
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Compiles (state, batch, root key) -> (state, metrics); the state's buffers are reused.

    The loss of a batch is the mean of `loss_fn` over its clips of weight 1. A step whose loss or gradient
    norm is not finite, or whose clips all have weight 0, changes neither parameters nor optimizer state nor
    average and says so in `skipped`.

    Args:
        loss_fn: runs on each device's rows, see `sharding.rows_over` and `vit.cut_blocks`.
        accumulate: microbatches that the batch is cut into, one after the other; the update is that of the
            whole batch.
        ema_decay: of the average of the parameters, `ema = decay * ema + (1 - decay) * params` after each
            update; used where the state has one.
        mapping: "jit", or "pmap" for the same step under `jax.pmap` on the devices of one host, each with a
            whole copy of the state.

    Metrics, float32 scalars: loss, grad_norm, learning_rate, clips (sum of weights), skipped (0 or 1).
    """

    def update(state: TrainState, loss, clips, grads) -> tuple[TrainState, Metrics]:
        """One update, or none where the gradient is not usable; the step counts either way."""
        grad_norm = optax.tree.norm(grads)
        lr = schedule(state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        ema = state.ema and jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema, params)
        usable = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (clips > 0)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "clips": clips,
            "skipped": 1.0 - usable,
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    specs = jax.tree.map(lambda s: s.spec, state_shardings.params)
    make_gradients = functools.partial(_make_gradients, loss_fn, accumulate)
    if mapping == "pmap":
        return _pmapped(make_gradients(vit.Cut(), ("data",), specs), update, mesh)
    whole, rows = PartitionSpec(), PartitionSpec(sharding.ROW_AXES)
    gradients = jax.shard_map(
        make_gradients(_cut(mesh), tuple(a for a in sharding.ROW_AXES if mesh.shape[a] > 1), specs),
        mesh=mesh,
        in_specs=(specs, rows, whole, whole),
        out_specs=(whole, whole, specs),
        check_vma=False,  # sums over axes are written out
    )

    def train_step(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        return update(state, *gradients(state.params, batch, root, state.step))

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )


def _pmapped(gradients, update, mesh: Mesh) -> Callable[[TrainState, Batch, jax.Array], Any]:
    """The step under `jax.pmap`, from and to the arrays that the jitted one has."""
    devices = list(mesh.devices.flat)

    def train_step(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        return update(state, *gradients(state.params, batch, root, state.step))

    mapped = jax.pmap(
        train_step, "data", in_axes=(None, 0, None), out_axes=None, devices=devices, donate_argnums=0
    )
    split = jax.jit(
        lambda batch: jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch),
        out_shardings=sharding.batch_sharding(mesh),
    )
    return lambda state, batch, root: mapped(state, split(batch), root)
