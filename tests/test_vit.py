"""Position tables and parameter counts of the fact sheet; depth as an axis; drop path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import videomae_jax as vm
from videomae_jax.models import attention, layers, positions, vit
from videomae_jax.models.layout import WHOLE

# (N, D): row 1 columns 0-3 and last two, row N-1 columns 0-3 and last two, sum (fact sheet 1.2)
TABLES = {
    (1568, 192): "1 .788593 .614915 .000110 1 -.484305 -.874899 .171625 .985162 60779.0220",
    (1568, 384): "1 .815251 .579108 .000105 1 -.975319 -.220801 .163661 .986517 122425.8579",
    (1568, 512): "1 .821856 .569695 .000104 1 -.495745 -.868468 .161727 .986836 163460.9327",
    (1568, 640): "1 .825805 .563956 .000103 1 .905024 -.425360 .160578 .987023 204714.5113",
    (1568, 768): "1 .828431 .560091 .000102 1 .093232 -.995644 .159816 .987147 245744.9896",
    (1568, 1024): "1 .831705 .555217 .000102 1 -.311765 .950159 .158868 .987300 327909.2066",
    (1568, 1280): "1 .833665 .552270 .000101 1 -.868930 .494935 .158303 .987391 410130.2600",
    (2048, 1408): "2 .834377 .551194 .000101 1 -.342627 -.939472 .205912 .978570 543941.7399",
    (2048, 512): "2 .821856 .569695 .000104 1 .985355 -.170516 .210610 .977570 197141.0758",
}
LAST_ROW = {1: (0.608948, -0.793210), 2: (-0.968319, 0.249715)}

# Decoder depth -> parameters of the pretraining model (fact sheet 1.8).
PARAMETERS = {
    "small": {1: 22_695_360, 2: 23_140_032, 4: 24_029_376, 8: 25_808_064, 12: 27_586_752},
    "base": {1: 88_888_704, 2: 90_662_784, 4: 94_210_944, 8: 101_307_264, 12: 108_403_584},
    "large": {1: 308_326_400, 2: 311_478_272, 4: 317_782_016, 8: 330_389_504, 12: 342_996_992},
    "huge": {1: 638_335_616, 2: 643_258_496, 4: 653_104_256, 8: 672_795_776, 12: 692_487_296},
    "giant": {4: 1_026_306_560},
}
ENCODER = {
    "small": 21_879_936,
    "base": 86_227_200,
    "large": 303_860_736,
    "huge": 631_607_040,
    "giant": 1_011_610_752,
}


@pytest.mark.parametrize(("shape", "values"), TABLES.items())
def test_position_table(shape, values):
    table = positions.published(*shape)
    kind, *rest = values.split()
    *expected, total = map(float, rest)
    np.testing.assert_allclose(table[0, :4], [0, 1, 0, 1], atol=1e-7)
    np.testing.assert_allclose(table[1, :2], [0.841471, 0.540302], atol=1e-6)
    np.testing.assert_allclose(table[-1, :2], LAST_ROW[int(kind)], atol=1e-6)
    found = [*table[1, 2:4], *table[1, -2:], *table[-1, 2:4], *table[-1, -2:]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(table.astype(np.float64).sum(), total, atol=1e-3)
    np.testing.assert_allclose((table.astype(np.float64) ** 2).sum(), np.prod(shape) / 2, rtol=1e-6)


def test_position_table_row_196_of_base():
    row = positions.published(1568, 768)[196]
    np.testing.assert_allclose(row[:4], [0.93953, 0.342466, 0.278597, -0.960408], atol=1e-6)
    np.testing.assert_allclose(row[-2:], [0.020074, 0.999798], atol=1e-6)


def published(size: vit.Size, decoder_depth: int) -> vm.VideoMAEConfig:
    decoder = dataclasses.replace(size.decoder, depth=decoder_depth)
    tubelet = (2, size.patch, size.patch)
    return vm.VideoMAEConfig(
        clip_size=(16, 224, 224),
        tubelet=tubelet,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.5,) * 3,
        encoder=size.encoder,
        decoder=decoder,
    )


def count(module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param))))


@pytest.mark.parametrize(("name", "depth"), [(n, d) for n, row in PARAMETERS.items() for d in row])
def test_parameter_counts(name, depth):
    config = published(vm.SIZES[name], depth)
    model = nnx.eval_shape(lambda: vm.VideoMAE(config, rngs=nnx.Rngs(0)))
    assert count(model) == PARAMETERS[name][depth]
    assert count(model.encoder) == ENCODER[name]


def test_published_decoder_depths():
    depths = {name: vm.SIZES[name].decoder.depth for name in PARAMETERS}
    assert depths == {"small": 4, "base": 4, "large": 12, "huge": 12, "giant": 4}


def test_positions_of_the_size_the_weights_were_made_with_are_the_table():
    table = positions.published(1568, 384)
    for resize in ("recompute", "interpolate"):
        np.testing.assert_array_equal(positions.table((8, 14, 14), (8, 14, 14), 384, resize), table)


def test_positions_of_another_size():
    recomputed = positions.table((8, 20, 20), (8, 14, 14), 384, "recompute")
    np.testing.assert_array_equal(recomputed, positions.published(3200, 384))
    np.testing.assert_allclose(positions._resampling_matrix(14, 20, cubic=True).sum(axis=1), 1, atol=1e-12)
    grown = positions.table((16, 20, 20), (8, 14, 14), 384, "interpolate")
    assert grown.shape == (6400, 384)


def test_bicubic_resampling_equals_pytorchs():
    # torch.nn.functional.interpolate([0, 1, 4, 9], size=6, mode="bicubic", align_corners=False)
    ours = positions._resampling_matrix(4, 6, cubic=True) @ np.array([0.0, 1.0, 4.0, 9.0])
    weights = lambda t: [  # noqa: E731 (Keys' kernel with a = -0.75, by its definition)
        -0.75 * (t**3 - 2 * t**2 + t),
        1.25 * t**3 - 2.25 * t**2 + 1,
        -1.25 * t**3 + 1.5 * t**2 + 0.75 * t,
        0.75 * (t**3 - t**2),
    ]
    places = [(i + 0.5) * 4 / 6 - 0.5 for i in range(6)]
    padded = [0, 0, 0, 1, 4, 9, 9, 9]
    for place, value in zip(places, ours, strict=True):
        base = int(np.floor(place))
        taps = padded[base + 1 : base + 5]
        np.testing.assert_allclose(value, np.dot(weights(place - base), taps), atol=1e-12)


def blocks_of(depth: int, width: int = 16) -> vit.Block:
    return vit.make_blocks(
        vit.Stack(width, depth, 2, 32), 1e-6, 0.0, vit.Compute(), nnx.Rngs(0), layers.XAVIER
    )


def jaxpr_size(depth: int, compute: vit.Compute) -> int:
    graphdef, params = nnx.split(blocks_of(depth))

    def loss(params, x):
        return vit.run_blocks(nnx.merge(graphdef, params), x, compute, 0.0, None).sum()

    return str(jax.make_jaxpr(jax.grad(loss))(params, jnp.ones((1, 4, 16)))).count("\n")


def test_the_program_does_not_grow_with_depth():
    assert jaxpr_size(24, vit.Compute()) == jaxpr_size(4, vit.Compute())


@pytest.mark.parametrize(
    "compute", [vit.Compute(unroll=4), vit.Compute(remat="dots"), vit.Compute(remat="full")]
)
def test_unrolling_and_recomputing_change_no_result(compute, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    graphdef, params = nnx.split(blocks_of(4))

    def run(params, compute):
        return vit.run_blocks(nnx.merge(graphdef, params), x, compute, 0.0, None).sum()

    grad = jax.grad(run)
    programs = [str(jax.make_jaxpr(lambda p, c=c: grad(p, c))(params)) for c in (vit.Compute(), compute)]
    assert programs[0] != programs[1]
    plain, other = (jax.jit(grad, static_argnums=1)(params, c) for c in (vit.Compute(), compute))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, other)


def test_stacked_blocks_equal_a_loop_over_layers(rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    blocks = blocks_of(3)
    graphdef, params = nnx.split(blocks)
    y = x
    for i in range(3):
        y = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))(y, None, WHOLE)
    scanned = vit.run_blocks(blocks, x, vit.Compute(), 0.0, None)
    np.testing.assert_allclose(scanned, y, atol=1e-5)
    kernels = np.asarray(blocks.fc1.kernel[...])
    assert not np.allclose(kernels[0], kernels[1])  # each layer has its own draw


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 2000)
    scales = np.asarray(vit.drop_path_scales(keys, 0.5, 3))
    assert scales.shape == (3, 2, 2000)
    for layer, rate in zip(scales, (0, 0.25, 0.5), strict=True):
        assert set(np.unique(layer)) <= {0.0, np.float32(1 / (1 - rate))}
        np.testing.assert_allclose(layer.mean(), 1, atol=0.05)
    assert (scales[2, 0] != scales[2, 1]).any()
    # An example's draws are its own: they do not depend on its place in the batch.
    np.testing.assert_array_equal(vit.drop_path_scales(keys[::-1], 0.5, 3), scales[..., ::-1])
    assert vit.drop_path_scales(None, 0.5, 3) is None
    assert vit.drop_path_scales(keys, 0.0, 3) is None


def test_drop_path_rises_from_zero_in_the_first_block(rng):
    x = jnp.asarray(rng.normal(size=(4, 5, 16)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    one, two = blocks_of(1), blocks_of(2)
    same = vit.run_blocks(one, x, vit.Compute(), 0.9, keys)
    np.testing.assert_allclose(same, vit.run_blocks(one, x, vit.Compute(), 0.0, None), atol=1e-6)
    dropped = vit.run_blocks(two, x, vit.Compute(), 0.9, keys)
    assert not np.allclose(dropped, vit.run_blocks(two, x, vit.Compute(), 0.0, None), atol=1e-3)


def test_layer_scale_is_absent_by_default_and_scales_branches(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 16)), jnp.float32)
    plain = nnx.to_pure_dict(nnx.state(blocks_of(2), nnx.Param))
    assert "gamma1" not in plain
    scaled = vit.make_blocks(vit.Stack(16, 2, 2, 32), 1e-6, 1e-5, vit.Compute(), nnx.Rngs(0), layers.XAVIER)
    np.testing.assert_allclose(scaled.gamma1[...], 1e-5)
    y = vit.run_blocks(scaled, x, vit.Compute(), 0.0, None)
    np.testing.assert_allclose(y, x, atol=1e-3)


def test_gelu_is_the_exact_one():
    x = jnp.linspace(-4, 4, 101)
    np.testing.assert_allclose(layers.gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    assert np.abs(layers.gelu(x) - jax.nn.gelu(x, approximate=True)).max() > 1e-4


def test_attention_in_blocks_is_attention(rng):
    """Also where the queries have no divisor but themselves and 1; and it is computed another way."""
    for queries in (1026, 521):
        heads = [jnp.asarray(rng.normal(size=(2, 3, queries, 8)), jnp.float32) for _ in range(3)]
        both = []
        for kind in ("xla", "blocks"):
            of = jax.jit(
                jax.value_and_grad(lambda q, k, v, kind=kind: (attention.attend(q, k, v, kind) * v).sum())
            )
            both.append(of(*heads))
            is_whole = f"f32[2,3,{queries},{queries}]" in of.lower(*heads).compile().as_text()
            assert is_whole == (kind == "xla")
        np.testing.assert_allclose(both[1][0], both[0][0], rtol=1e-5)
        np.testing.assert_allclose(both[1][1], both[0][1], rtol=1e-5, atol=1e-6)
