"""The train step: loss, gradients, update, and the guard against non-finite numbers; one `jax.jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from videomae_jax import sharding

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array], Float[Array, ""]]
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


class TrainState(NamedTuple):
    """All that training carries from step to step; plain nested dicts of arrays."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def _creator(
    init: Callable[[Key[Array, ""]], Any], tx: optax.GradientTransformation
) -> Callable[[Key[Array, ""]], TrainState]:
    def create(key: Key[Array, ""]) -> TrainState:
        params = init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return create


def abstract_state(
    init: Callable[[Key[Array, ""]], Any], tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """(shapes and dtypes of the state, its shardings), without computing anything."""
    shapes = jax.eval_shape(_creator(init, tx), jax.random.key(0))
    return shapes, sharding.state_sharding(mesh, shapes)


def init_state(
    init: Callable[[Key[Array, ""]], Any], tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> tuple[TrainState, Any]:
    """(state, its shardings): every leaf is born where it belongs, none on one device first."""
    _, shardings = abstract_state(init, tx, mesh)
    create = jax.jit(_creator(init, tx), out_shardings=shardings)
    return create(jax.random.key(seed)), shardings


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
    state_shardings: Any,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Compiles (state, batch, root key) -> (state, metrics); the state's buffers are reused.

    `loss_fn(params, batch, root key)` returns the mean loss over clips of weight 1. A step whose loss or
    gradient norm is not finite, or whose clips all have weight 0, changes neither parameters nor optimizer
    state and says so in `skipped`.

    Metrics, float32 scalars: loss, grad_norm, learning_rate, clips (sum of weights), skipped (0 or 1).
    """

    def train_step(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        """One update, or none where the gradient is not usable; the step counts either way."""
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, root)
        grad_norm = optax.tree.norm(grads)
        clips = batch["weight"].sum()
        lr = schedule(state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        usable = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (clips > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "clips": clips,
            "skipped": 1.0 - usable,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
