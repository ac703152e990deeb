"""Every way to compute attention against the plain one, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videomae_jax.models import attention

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TILED = functools.partial(attention.attend_in_tiles, interpret=True)


def both_ways(attend, tokens: int, width: int, dtype: str = "float32", heads: int = 1):
    keys = jax.random.split(jax.random.key(tokens), 4)
    q, k, v, weight = (jax.random.normal(key, (1, heads, tokens, width), dtype) for key in keys)

    def total(q, k, v):
        out = attend(q, k, v)
        return (out.astype(jnp.float32) * weight).sum(), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(3 * q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


@pytest.mark.parametrize(
    ("tokens", "width"),
    [(160, 64), (1568, 64), slow(1568, 80), slow(3136, 64), slow(3136, 80), slow(4608, 64)],
)
def test_the_tpu_kernel_is_attention(tokens, width):
    """In Pallas' interpret mode; lengths that do not fill the tiles, and one that does."""
    plain, tiled = (both_ways(attend, tokens, width) for attend in (attention.attend, TILED))
    for expected, found in zip(plain, tiled, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert any((a != b).any() for a, b in zip(plain, tiled, strict=True))


def test_the_tpu_kernel_in_bfloat16_has_a_float32_softmax():
    exact = both_ways(attention.attend, 640, 64)
    plain, tiled = (both_ways(attend, 640, 64, "bfloat16") for attend in (attention.attend, TILED))
    for expected, ours, theirs in zip(exact, plain, tiled, strict=True):
        errors = [np.linalg.norm(x - expected) / np.linalg.norm(expected) for x in (ours, theirs)]
        assert errors[1] < max(1.5 * errors[0], 0.01)


@pytest.mark.parametrize("kind", ["blocks", "queries"])
@pytest.mark.parametrize("tokens", [160, 1568])
def test_attention_in_parts(kind, tokens):
    plain, parts = (
        both_ways(functools.partial(attention.attend, kind=name), tokens, 32, heads=2)
        for name in ("xla", kind)
    )
    for expected, found in zip(plain, parts, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_no_part_holds_all_scores():
    """The temporaries of a long sequence stay below its scores."""
    shape = jax.ShapeDtypeStruct((1, 4, 3136, 32), jnp.float32)
    scores = 4 * 4 * 3136**2

    def needs(kind):
        total = lambda q, k, v: attention.attend(q, k, v, kind).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needs("xla") > scores
    assert needs("queries") < scores
    assert needs("blocks") < scores / 2


@pytest.mark.parametrize(("tokens", "is_tiled"), [(288, False), (383, False), (384, True), (392, True)])
def test_from_how_many_tokens_the_tpus_kernel_is_taken(tokens, is_tiled):
    heads = jax.ShapeDtypeStruct((1, 2, tokens, 64), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda x: attention.attend(x, x, x, "splash"))(heads))
    assert ("pallas_call" in program) == is_tiled


def test_a_tile_fills_up_little():
    for tokens in range(384, 6000, 37):
        size = attention.tile(tokens)
        filled = -(-tokens // size) * size
        assert size % 128 == 0
        assert filled - tokens < max(0.25 * tokens, 512)
