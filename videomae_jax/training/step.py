"""The train step: loss, accumulated gradients, update, averaged weights, and the guard against non-finite
numbers; one `jax.jit`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt

from videomae_jax import sharding

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array, Int[Array, ""]], Float[Array, " B"]]
"""(params, batch, root key, step) -> the loss of each clip."""
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


_STREAMS = ("mask", "drop_path", "mix", "erase", "dropout")


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
    return create(jax.random.key(seed)), shardings


def microbatches(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """Cuts a batch into `count` along a new first axis, without moving a row to another device.

    Rows are taken from both ends of each device's part at once, so that rows i and B - 1 - i, which mixup
    pairs, share a microbatch wherever a device's microbatch is even, again at mirrored places.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def cut(rows: jax.Array) -> jax.Array:
        local = len(rows) // parts
        size = local // count
        order = np.arange(local)
        if size % 2 == 0:
            front = order[: local // 2].reshape(count, -1)
            order = np.concatenate([front, local - 1 - front[:, ::-1]], axis=1)
        picked = rows.reshape(parts, local, *rows.shape[1:])[:, order.reshape(-1)]
        picked = picked.reshape(parts, count, size, *rows.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, *sharding.batch_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(
            picked.reshape(count, parts * size, *rows.shape[1:]), NamedSharding(mesh, spec)
        )

    return jax.tree.map(cut, batch)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
    state_shardings: Any,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Compiles (state, batch, root key) -> (state, metrics); the state's buffers are reused.

    The loss of a batch is the mean of `loss_fn` over its clips of weight 1. A step whose loss or gradient
    norm is not finite, or whose clips all have weight 0, changes neither parameters nor optimizer state nor
    average and says so in `skipped`.

    Args:
        accumulate: microbatches that the batch is cut into, one after the other; the update is that of the
            whole batch.
        ema_decay: of the average of the parameters, `ema = decay * ema + (1 - decay) * params` after each
            update; used where the state has one.

    Metrics, float32 scalars: loss, grad_norm, learning_rate, clips (sum of weights), skipped (0 or 1).
    """

    def loss_and_grads(state: TrainState, batch: Batch, root: jax.Array, clips: jax.Array):
        def part(params: Any, rows: Batch) -> Float[Array, ""]:
            losses = loss_fn(params, rows, root, state.step)
            return jnp.sum(rows["weight"] * losses) / jnp.maximum(clips, 1)

        if accumulate == 1:
            return jax.value_and_grad(part)(state.params, batch)

        def add(total: Any, rows: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(part)(state.params, rows)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        return jax.lax.scan(add, zero, microbatches(batch, accumulate, mesh))[0]

    def train_step(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        """One update, or none where the gradient is not usable; the step counts either way."""
        clips = batch["weight"].sum()
        loss, grads = loss_and_grads(state, batch, root, clips)
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

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
