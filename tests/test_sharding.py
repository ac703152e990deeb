"""Every mesh: the same loss and gradient (of the other methods: test_tasks.py), the parts where they belong,
and what devices say to each other."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec

from videomae_jax import sharding
from videomae_jax.models import vit
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.mae import VideoMAEConfig
from videomae_jax.tasks import mixup
from videomae_jax.tasks.finetune import Finetune
from videomae_jax.tasks.pretrain import Pretrain
from videomae_jax.training import optim, step

BACKBONE = {
    "clip_size": (4, 16, 16),
    "tubelet": (2, 4, 4),
    "pixel_mean": (0.5,) * 3,
    "pixel_std": (0.25,) * 3,
    "encoder": vit.Stack(64, 3, 4, 256),
    "drop_path": 0.3,
}
PRETRAIN = Pretrain(
    model=VideoMAEConfig(**BACKBONE, decoder=vit.Stack(32, 2, 4, 128)),
    mask="tube",
    mask_ratio=0.75,
    normalize_target=True,
    loss_kind="mse",
    stride=1,
)
FINETUNE = Finetune(
    ClassifierConfig(**BACKBONE, classes=tuple("abcdefgh"), head_dropout=0.2, head_scale=1.0),
    stride=1,
    policy=None,
    flip=False,
    erasing=0.5,
    area=(1.0, 1.0),
    clips_per_video=1,
    mix=mixup.Mix(0.8, 1.0, 1.0, 0.5),
    smoothing=0.1,
    class_weights=None,
)
ROWS = 16
ROOT = jax.random.key(7)
# Not AdamW, whose update of a gradient near 0 is as large as of any other: what is compared is the gradient.
TX = optim.optax.identity()
ADAMW = optim.adamw((0.9, 0.95), 1e-8, 0.05, 0.0)


def batch_of(rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weight = np.ones(rows, np.float32)
    weight[[2, 11]] = 0
    return {
        "video": rng.integers(0, 256, (rows, 4, 16, 16, 3), dtype=np.uint8),
        "index": np.arange(100, 100 + rows, dtype=np.uint32),
        "label": np.arange(rows, dtype=np.int32) % 8,
        "weight": weight,
        "erase": np.tile(np.array([2, 9, 4, 12], np.int32), (rows, 1)),
    }


def run(task, mesh, **options):
    """(state after one step of gradient descent, its metrics)"""
    state, shardings = step.init_state(step.Recipe(task.init, TX), mesh, seed=0)
    train_step = step.make_train_step(task.terms, TX, lambda _: jnp.float32(1.0), mesh, shardings, **options)
    return train_step(state, sharding.global_batch(mesh, batch_of()), ROOT)


@pytest.fixture(scope="module")
def alone():
    """Each task's step on one device."""
    return {task: jax.device_get(run(task, mesh_of(1))) for task in (PRETRAIN,)}


def assert_same_step(found, expected):
    (state, metrics), (one, other) = jax.device_get(found), expected
    for name in ("loss", "grad_norm", "clips"):
        np.testing.assert_allclose(metrics[name], other[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, one.params)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), (2, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 4), (4, 2, 1), (1, 2, 2)], ids=str
)
def test_pretraining_is_the_same_on_every_mesh(sizes, alone):
    mesh = mesh_of(*sizes)
    found = run(PRETRAIN, mesh)
    assert_same_step(found, alone[PRETRAIN])
    # The two sides did differ in layout: every device holds its part of the rows and of a matrix.
    data, fsdp, tensor = sizes
    rows = sharding.global_batch(mesh, batch_of())["video"].addressable_shards
    assert {part.data.shape[0] for part in rows} == {ROWS // (data * fsdp)}
    kernel = found[0].params["encoder"]["blocks"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 64 // fsdp, 256 // tensor)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["jit", "pmap"])
def test_a_step_is_compiled_once(mapping):
    compiled = []

    def heard(event, _seconds, **_facts):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    mesh = mesh_of(2)
    state, shardings = step.init_state(step.Recipe(PRETRAIN.init, ADAMW), mesh, seed=0)
    train_step = step.make_train_step(
        PRETRAIN.terms, ADAMW, lambda _: jnp.float32(1.0), mesh, shardings, mapping=mapping
    )
    counts, root = [], sharding.replicate(ROOT, mesh)
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        for _ in range(3):
            state, metrics = train_step(state, sharding.global_batch(mesh, batch_of()), root)
            jax.block_until_ready(metrics)
            counts.append(len(compiled))
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    # Under pmap one more program gives each device its rows.
    assert counts == [1 + (mapping == "pmap")] * 3


def test_what_is_whole_is_not_copied():
    mesh = mesh_of(2, 2)
    state, _ = step.init_state(step.Recipe(PRETRAIN.init, TX), mesh_of(4), seed=0)
    assert sharding.replicate(state.params, mesh_of(4)) is state.params
    parts, _ = step.init_state(step.Recipe(PRETRAIN.init, TX), mesh, seed=0)
    whole = sharding.replicate(parts.params, mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_is_the_same(remat, sizes, alone):
    model = dataclasses.replace(PRETRAIN.model, compute=vit.Compute(remat=remat, unroll=2))
    assert_same_step(run(dataclasses.replace(PRETRAIN, model=model), mesh_of(*sizes)), alone[PRETRAIN])


def compiled(task, mesh, tx=TX, **options):
    """(abstract state, the text of the compiled step); nothing is computed."""
    state, shardings = step.abstract_state(step.Recipe(task.init, tx), mesh)
    train_step = step.make_train_step(task.terms, tx, lambda _: jnp.float32(1.0), mesh, shardings, **options)
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of().items()}
    return state, train_step.lower(state, rows, ROOT).compile().as_text()


def collectives(text: str) -> dict[str, Counter]:
    """kind -> shapes of what it makes, scalars left out, with how often each stands in the program."""
    found: dict[str, Counter] = {}
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        sizes = re.findall(r"\w+\[([\d,]+)\]", shapes)
        found.setdefault(kind, Counter()).update(tuple(map(int, size.split(","))) for size in sizes)
    return {kind: shapes for kind, shapes in found.items() if shapes}


@pytest.mark.parametrize("accumulate", [slow(1), 2])
def test_data_parallel_devices_sum_gradients_once(accumulate):
    state, text = compiled(PRETRAIN, mesh_of(8), accumulate=accumulate)
    found = collectives(text)
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"] == Counter(leaf.shape for leaf in jax.tree.leaves(state.params))
    assert not collectives(compiled(PRETRAIN, mesh_of(1))[1])


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_fsdp_devices_gather_each_matrix_and_scatter_its_gradient(dtype):
    model = dataclasses.replace(PRETRAIN.model, compute=vit.Compute(dtype))
    state, text = compiled(dataclasses.replace(PRETRAIN, model=model), mesh_of(1, 8))
    found = collectives(text)
    assert set(found) == {"all-reduce", "all-gather", "reduce-scatter"}
    leaves = {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
    cut = {
        name: leaf.shape[1:] if "/blocks/" in name else leaf.shape
        for name, leaf in leaves.items()
        if "fsdp" in sharding.first_match(sharding.STATE_RULES, "params/" + name)
    }
    # In the loop over blocks, once forward and once backward; elsewhere once.
    expected = Counter(shape for name, shape in cut.items() for _ in range(1 + ("/blocks/" in name)))
    assert found["all-gather"] == expected
    sizes = lambda shapes: sorted(int(np.prod(shape)) for shape in shapes.elements())  # noqa: E731
    assert sizes(found["reduce-scatter"]) == sorted(int(np.prod(shape)) // 8 for shape in cut.values())
    assert found["all-reduce"] == Counter(leaf.shape for name, leaf in leaves.items() if name not in cut)


def test_tensor_devices_sum_activations_of_each_branch():
    _, text = compiled(PRETRAIN, mesh_of(1, 1, 2))
    found = collectives(text)
    assert set(found) == {"all-reduce"}
    # Two branches, forward and backward, of the encoder's 8 and the decoder's 32 tokens of 16 clips.
    attention, mlp = {(16 * 8, 64): 2, (16 * 32, 32): 2}, {(16, 8, 64): 2, (16, 32, 32): 2}
    assert found["all-reduce"] == Counter(attention | mlp)


@pytest.mark.slow
def test_mixup_meets_its_partner_on_another_device():
    found = collectives(compiled(FINETUNE, mesh_of(8))[1])
    assert set(found) == {"all-reduce", "collective-permute"}
    assert set(found["collective-permute"]) == {(2, 4, 16, 16, 3), (2, 8), (2,)}


@pytest.mark.parametrize("name", ["small", "base", "huge"])
def test_fsdp_over_eight_holds_an_eighth(name):
    size = vit.SIZES[name]
    config = VideoMAEConfig(
        **BACKBONE
        | {"clip_size": (16, 224, 224), "tubelet": (2, size.patch, size.patch), "encoder": size.encoder},
        decoder=size.decoder,
    )
    task = dataclasses.replace(PRETRAIN, model=config)
    state, shardings = step.abstract_state(step.Recipe(task.init, ADAMW), mesh_of(1, 8))
    whole = sum(leaf.size for leaf in jax.tree.leaves(state))
    parts = jax.tree.map(lambda leaf, s: int(np.prod(s.shard_shape(leaf.shape))), state, shardings)
    assert sum(jax.tree.leaves(parts)) <= whole / 8 * 1.05


def test_the_state_is_born_in_parts_and_donated():
    mesh = mesh_of(2, 4)
    state, shardings = step.init_state(step.Recipe(PRETRAIN.init, ADAMW, has_ema=True), mesh, seed=0)
    jax.tree.map(lambda leaf, s: np.testing.assert_equal(leaf.sharding, s), state, shardings)
    moments = state.opt_state[1].mu["encoder"]["blocks"]["attention"]["qkv"]
    assert moments.sharding.spec == PartitionSpec(None, "fsdp", None, "tensor")
    train_step = step.make_train_step(PRETRAIN.terms, ADAMW, lambda _: jnp.float32(1), mesh, shardings)
    after, _ = train_step(state, sharding.global_batch(mesh, batch_of()), ROOT)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    jax.tree.map(lambda leaf, s: np.testing.assert_equal(leaf.sharding, s), after, shardings)


def test_a_leaf_without_a_rule_or_indivisible_is_named():
    mesh = mesh_of(1, 8)
    with pytest.raises(ValueError, match="no rule matches 'params/encoder/blocks/gate/table'"):
        sharding.state_sharding(mesh, {"params": {"encoder": {"blocks": {"gate": {"table": jnp.zeros(1)}}}}})
    leaf = jax.ShapeDtypeStruct((2, 12, 3, 12), jnp.float32)
    with pytest.raises(ValueError, match=r"mesh.fsdp=8 does not divide axis 1 of params/x/blocks/attention/"):
        sharding.state_sharding(mesh, {"params": {"x": {"blocks": {"attention": {"qkv": leaf}}}}})


def test_a_mesh_that_leaves_devices_out_is_refused():
    with pytest.raises(ValueError, match="data=3 x fsdp=1 x tensor=1 does not use the 8 devices"):
        sharding.make_mesh(3, 1, 1)
    assert dict(sharding.make_mesh(-1, 2, 1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
