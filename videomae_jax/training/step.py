"""The train step: accumulated terms and gradients, update, averaged weights, and the guard against non-finite
numbers; one `jax.jit` or `jax.pmap`.

Every device computes the gradient of its rows, by the same function whatever the mesh, so what devices say
to each other is written here and in `sharding`, and not found by the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt

from videomae_jax import sharding
from videomae_jax.models.layout import Layout

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


class Terms(NamedTuple):
    """What rows add to a loss that is a mean over clips, tokens or boxes.

    The step sums all of it over rows, microbatches and devices, and divides once.

    Attributes:
        total: the sum of what the loss is the mean of.
        weight: how many there are; carries no gradient.
        metrics: sums whose means over the same weight are logged.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


TermsFn = Callable[[Any, Any, Batch, jax.Array, Int[Array, ""], Layout], Terms]
"""(params, others, this device's rows, root key, step, layout) -> the terms of these rows."""


_STREAMS = ("mask", "drop_path", "mix", "erase", "dropout", "init", "decoder_mask", "view")


def stream(root: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The key that everything random of one kind is drawn from."""
    return jax.random.fold_in(root, _STREAMS.index(name))


def clip_keys(root: Key[Array, ""], name: str, index: UInt[Array, " B"]) -> Key[Array, " B"]:
    """A key of one kind for each example, a function of (root key, global example index) only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(stream(root, name), index)


class TrainState(NamedTuple):
    """All that training carries from step to step; plain nested dicts of arrays.

    `ema` is the moving average of the parameters, None where none is kept; `others` are the trees that a
    method has beside them (a teacher, a momentum encoder), which no gradient reaches.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: Any = None
    others: Any = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes a state of random numbers.

    Attributes:
        init: key -> parameters.
        others: parameters -> the trees beside them, at the start; None: there are none.
    """

    init: Callable[[Key[Array, ""]], Any]
    tx: optax.GradientTransformation
    others: Callable[[Any], Any] = lambda _params: None
    has_ema: bool = False

    def create(self, key: Key[Array, ""]) -> TrainState:
        """The state before the first step."""
        return self.around(self.init(key))

    def around(self, params: Any) -> TrainState:
        """The state before the first step, from these parameters."""
        ema = jax.tree.map(jnp.copy, params) if self.has_ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params), ema, self.others(params))


@functools.lru_cache(maxsize=8)
def abstract_state(recipe: Recipe, mesh: Mesh) -> tuple[TrainState, Any]:
    """(shapes and dtypes of the state, its shardings), without computing anything."""
    shapes = jax.eval_shape(recipe.create, jax.random.key(0))
    return shapes, sharding.state_sharding(mesh, shapes)


def init_state(recipe: Recipe, mesh: Mesh, seed: int) -> tuple[TrainState, Any]:
    """(state, its shardings): every leaf is born where it belongs, none on one device first."""
    _, shardings = abstract_state(recipe, mesh)
    create = jax.jit(recipe.create, out_shardings=shardings)
    return create(stream(jax.random.key(seed), "init")), shardings


def start_from(
    state: TrainState, shardings: Any, values: dict[str, np.ndarray], recipe: Recipe
) -> TrainState:
    """A fresh state with some of its parameters and others replaced, by name ("params/...", "others/...").

    What follows from the parameters (average, others) is made anew from them.
    """

    def replaced(tree: Any, prefix: str) -> Any:
        def choose(path: tuple[Any, ...], leaf: jax.Array, where: Any) -> jax.Array:
            value = values.get(f"{prefix}/{sharding.path_name(path)}")
            return leaf if value is None else sharding.distribute(np.asarray(value), where)

        return jax.tree_util.tree_map_with_path(choose, tree, getattr(shardings, prefix))

    if not values:
        return state
    around = jax.jit(recipe.around, out_shardings=shardings, donate_argnums=0)
    state = around(replaced(state.params, "params"))
    return state._replace(others=replaced(state.others, "others"))


def microbatches(batch: Batch, count: int) -> Batch:
    """A device's rows in `count` parts along a new first axis.

    Rows are taken from both ends at once, so that rows i and B - 1 - i of the global batch, which mixup
    pairs, share a microbatch wherever a device's microbatch is even, again at mirrored places.
    """

    def divide(rows: jax.Array) -> jax.Array:
        size = len(rows) // count
        order = np.arange(len(rows))
        if size % 2 == 0:
            front = order[: len(rows) // 2].reshape(count, -1)
            order = np.concatenate([front, order[::-1][front[:, ::-1]]], axis=1)
        return rows[order.reshape(-1)].reshape(count, size, *rows.shape[1:])

    return jax.tree.map(divide, batch)


def _layout(mesh: Mesh) -> Layout:
    """How a device of this mesh computes its rows."""
    layout = Layout(tuple(axis for axis in sharding.ROW_AXES if mesh.shape[axis] > 1))
    if mesh.shape["fsdp"] > 1:
        gather = functools.partial(sharding.gather, prefix="params/blocks/", stacked=True)
        layout = dataclasses.replace(layout, gather_block=gather)
    if mesh.shape["tensor"] > 1:
        layout = dataclasses.replace(layout, enter=sharding.enter_tensor, leave=sharding.leave_tensor)
    return layout


def _gather_outside_blocks(tree: Any, layout: Layout) -> Any:
    """The parameters with those whole that no block gathers for itself."""
    if not layout.gather_block or not tree:
        return tree
    flat = flatten_dict(tree)
    outside = unflatten_dict({name: leaf for name, leaf in flat.items() if "blocks" not in name})
    return unflatten_dict(flat | flatten_dict(sharding.gather(outside, "params/")))


def _make_gradients(
    terms_fn: TermsFn, accumulate: int, layout: Layout, specs: Any
) -> Callable[[Any, Any, Batch, jax.Array, Int[Array, ""]], tuple[Terms, Float[Array, ""], Any]]:
    """(params, others, batch, root, step) -> (summed terms, clips, gradient of their mean), on one device.

    Everything is summed over devices once, after the last microbatch; where `specs` cut a parameter over an
    axis of rows, `sharding.gather` has summed its gradient already.
    """
    axes = layout.row_axes

    def gradients(params: Any, others: Any, batch: Batch, root: jax.Array, number: Int[Array, ""]):
        others = _gather_outside_blocks(others, layout)

        def total(params: Any, rows: Batch) -> tuple[Float[Array, ""], Terms]:
            whole = _gather_outside_blocks(params, layout)
            terms = terms_fn(whole, others, rows, root, number, layout)
            return terms.total, terms

        def part(rows: Batch) -> tuple[Terms, Any]:
            (_, terms), grads = jax.value_and_grad(total, has_aux=True)(params, rows)
            return terms, grads

        if accumulate == 1:
            terms, grads = part(batch)
        else:
            parts = microbatches(batch, accumulate)
            shapes = jax.eval_shape(part, jax.tree.map(lambda rows: rows[0], parts))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            terms, grads = jax.lax.scan(
                lambda sums, rows: (jax.tree.map(jnp.add, sums, part(rows)), None), zeros, parts
            )[0]
        terms, clips = jax.lax.psum((terms, batch["weight"].sum()), axes)
        grads = jax.tree.map(
            lambda grad, spec: jax.lax.psum(grad, tuple(axis for axis in axes if axis not in spec)),
            grads,
            specs,
        )
        weight = jnp.where(terms.weight > 0, terms.weight, 1.0)
        means = Terms(terms.total / weight, terms.weight, {n: x / weight for n, x in terms.metrics.items()})
        return means, clips, jax.tree.map(lambda grad: grad / weight, grads)

    return gradients


def make_train_step(
    terms_fn: TermsFn,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
    state_shardings: Any,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    mapping: str = "jit",
    follow: Callable[[Any, Any, Int[Array, ""]], Any] = lambda others, _params, _steps: others,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Compiles (state, batch, root key) -> (state, metrics); the state's buffers are reused.

    The loss of a batch is the total of its terms over their weight. A step whose loss or gradient norm is not
    finite, or whose clips all have weight 0, changes neither parameters nor optimizer state, average or
    others, and says so in `skipped`.

    Args:
        terms_fn: runs on each device's rows.
        accumulate: microbatches that the batch is cut into, one after the other; the update is that of the
            whole batch.
        ema_decay: of the average of the parameters, `ema = decay * ema + (1 - decay) * params` after each
            update; used where the state has one.
        mapping: "jit", or "pmap" for the same step under `jax.pmap`, each device with a whole copy of the
            state.
        follow: (others, updated params, steps done) -> others, after each update.

    Metrics, float32 scalars: loss, grad_norm, learning_rate, clips (sum of weights), skipped (0 or 1), and
    those of the terms.
    """

    def update(state: TrainState, terms: Terms, clips, grads) -> tuple[TrainState, Metrics]:
        """One update, or none where the gradient is not usable; the step counts either way."""
        grad_norm = optax.tree.norm(grads)
        lr = schedule(state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        ema = state.ema and jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema, params)
        others = follow(state.others, params, state.step + 1)
        usable = jnp.isfinite(terms.total) & jnp.isfinite(grad_norm) & (clips > 0) & (terms.weight > 0)
        new = TrainState(state.step, params, opt_state, ema, others)
        kept = jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, state)
        metrics = {
            "loss": terms.total,
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "clips": clips,
            "skipped": 1.0 - usable,
        }
        return kept._replace(step=state.step + 1), metrics | terms.metrics

    specs = jax.tree.map(lambda s: s.spec, state_shardings.params)
    make_gradients = functools.partial(_make_gradients, terms_fn, accumulate)
    if mapping == "pmap":
        return _pmapped(make_gradients(Layout(("data",)), specs), update, mesh)
    whole, rows = PartitionSpec(), PartitionSpec(sharding.ROW_AXES)
    gradients = jax.shard_map(
        make_gradients(_layout(mesh), specs),
        mesh=mesh,
        in_specs=(specs, jax.tree.map(lambda s: s.spec, state_shardings.others), rows, whole, whole),
        out_specs=(whole, whole, specs),
        check_vma=False,  # sums over axes are written out
    )

    def train_step(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        return update(state, *gradients(state.params, state.others, batch, root, state.step))

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )


def _pmapped(gradients, update, mesh: Mesh) -> Callable[[TrainState, Batch, jax.Array], Any]:
    """The step under `jax.pmap`, from and to the arrays that the jitted one has.

    Every host maps over its own devices, so what it passes and gets are arrays over these. The state comes
    and goes the same way, or its first step would be compiled for another layout than all others.
    """
    whole, rows = PartitionSpec(), PartitionSpec("data")
    local = Mesh(np.array([d for d in mesh.devices.flat if d.process_index == jax.process_index()]), "data")

    def train_step(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        return update(state, *gradients(state.params, state.others, batch, root, state.step))

    devices = list(mesh.devices.flat) if jax.process_count() == 1 else None  # None: those of all hosts
    mapped = jax.pmap(
        train_step, "data", in_axes=(None, 0, None), out_axes=None, devices=devices, donate_argnums=0
    )
    split = jax.jit(
        lambda batch: jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch),
        out_shardings=sharding.batch_sharding(mesh),
    )

    def call(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        given = (state, sharding.replicate(root, mesh))
        state, root = sharding.reassemble(given, NamedSharding(local, whole))
        batch = sharding.reassemble(split(batch), NamedSharding(local, rows))
        state, metrics = mapped(state, batch, root)
        return sharding.reassemble(state, sharding.replicated(mesh)), metrics

    return call
