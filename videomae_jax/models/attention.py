"""Softmax attention, computed in the ways that suit different machines and lengths."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

KINDS = ("xla", "blocks", "queries", "cudnn", "splash")
PLATFORM_OF = {"cudnn": "gpu", "splash": "tpu"}
"""Of the kinds that only one platform has."""
_BLOCK = 512  # queries at a time; fewer gain nothing, and so few tokens need no parts
_LANES = 128
_TPU_BLOCK = 1024  # tokens; larger ones exceed the 16 MiB of VMEM, found by compiling
_TPU_LONG = 384  # tokens from which the kernel moves fewer bytes than all scores do, found by compiling


def attend(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"], kind: str = "xla"
) -> Float[Array, "B A Q E"]:
    """Softmax attention of each head over all tokens; the softmax in float32.

    Args:
        kind: "xla": all scores at once, written out because `jax.nn.dot_product_attention` needs 1.3 to 2
            times as long on a CPU. The others compute long sequences in parts, and are "xla" for short ones.
            "blocks": some queries of a head at a time, again in the backward pass; on a CPU they stay in its
            cache: a quarter to a half of the time for 1,568 tokens. "queries": some queries of all heads at a
            time, for GPUs without "cudnn", the fused kernel of NVIDIA GPUs, which is for bfloat16 and any
            length. "splash": JAX's own kernel for TPUs.
    """
    if kind == "cudnn":
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").transpose(0, 2, 1, 3)
    if kind == "splash" and q.shape[2] >= _TPU_LONG and q.shape == k.shape:
        return attend_in_tiles(q, k, v)
    if kind == "blocks" and q.shape[2] > _BLOCK:
        return _attend_head_by_head(q, k, v)
    if kind == "queries" and q.shape[2] > _BLOCK:
        return _attend_by_queries(q, k, v)
    return _attend_at_once(q, k, v)


def best(platform: str, dtype: str, kernels: bool = True) -> str:
    """The kind that suits a platform ("cpu", "gpu", "tpu" or another).

    Args:
        kernels: whether it may be one of those that only one platform has.

    >>> [best(platform, "bfloat16") for platform in ("cpu", "gpu", "tpu")]
    ['blocks', 'cudnn', 'splash']
    >>> best("gpu", "float32"), best("tpu", "bfloat16", kernels=False)
    ('queries', 'queries')
    """
    if kernels and platform == "tpu":
        return "splash"
    if kernels and platform == "gpu" and dtype == "bfloat16":  # the fused kernel has no float32
        return "cudnn"
    return {"cpu": "blocks", "gpu": "queries", "tpu": "queries"}.get(platform, "xla")


@jax.checkpoint
def _attend_at_once(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"]
) -> Float[Array, "B A Q E"]:
    """`attend` with all scores, made again in the backward pass: reading them back takes longer."""
    scores = jnp.einsum("bane,bame->banm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jnp.einsum("banm,bame->bane", jax.nn.softmax(scores).astype(v.dtype), v)


def _attend_head_by_head(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"]
) -> Float[Array, "B A Q E"]:
    """`_attend_by_queries` for a head after the other: what it works on stays in a CPU's cache."""
    heads = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return jax.lax.map(lambda head: _attend_by_queries(*head), heads).reshape(q.shape)


@jax.custom_vjp
def _attend_by_queries(
    q: Float[Array, "*H Q E"], k: Float[Array, "*H N E"], v: Float[Array, "*H N E"]
) -> Float[Array, "*H Q E"]:
    """`attend` for a block of queries after the other; the backward pass makes each block's scores again.

    It keeps the sum of each query's exponentials and needs no maximum (arXiv 2205.14135).
    """
    return _by_queries_forward(q, k, v)[0]


def _scores(q: Float[Array, "*H q E"], k: Float[Array, "*H N E"]) -> Float[Array, "*H q N"]:
    return _product("...qe,...ne->...qn", q * q.shape[-1] ** -0.5, k)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Of what is cast to the dtype of `b`; summed in float32."""
    return jnp.einsum(axes, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _in_blocks(x: Float[Array, "*H Q E"]) -> Float[Array, "blocks *H q E"]:
    """The largest blocks of at most 512 queries that divide them; all at once where none does."""
    queries = x.shape[-2]
    size = max((n for n in range(_BLOCK // 8, _BLOCK + 1) if queries % n == 0), default=queries)
    return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, size, x.shape[-1]), -3, 0)


def _joined(blocks: Float[Array, "blocks *H q E"]) -> Float[Array, "*H Q E"]:
    blocks = jnp.moveaxis(blocks, 0, -3)
    return blocks.reshape(*blocks.shape[:-3], -1, blocks.shape[-1])


def _by_queries_forward(q: jax.Array, k: jax.Array, v: jax.Array):
    def of_block(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = _scores(block, k)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        out = _product("...qn,...ne->...qe", weights, v) / total
        return out.astype(q.dtype), largest + jnp.log(total)

    out, log_total = (_joined(x) for x in jax.lax.map(of_block, _in_blocks(q)))
    return out, (q, k, v, out, log_total)


def _by_queries_backward(kept: tuple[jax.Array, ...], grad: jax.Array):
    q, k, v, out, log_total = kept
    level = jnp.sum(out.astype(jnp.float32) * grad, axis=-1, keepdims=True)

    def of_block(sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]):
        queries, logs, change, mean = block
        weights = jnp.exp(_scores(queries, k) - logs)
        of_scores = weights * (_product("...qe,...ne->...qn", change, v) - mean) * q.shape[-1] ** -0.5
        of_v = _product("...qn,...qe->...ne", weights, change)
        of_k = _product("...qn,...qe->...ne", of_scores, queries)
        of_q = _product("...qn,...ne->...qe", of_scores, k)
        return (sums[0] + of_k, sums[1] + of_v), of_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    blocks = tuple(map(_in_blocks, (q, log_total, grad, level)))
    (of_k, of_v), of_q = jax.lax.scan(of_block, zeros, blocks)
    return _joined(of_q), of_k.astype(k.dtype), of_v.astype(v.dtype)


_attend_by_queries.defvjp(_by_queries_forward, _by_queries_backward)


def tile(tokens: int) -> int:
    """Tokens of a tile of the TPU's kernel: the multiple of its lanes that fills up `tokens` with the least.

    >>> [tile(tokens) for tokens in (1568, 3136, 4608)]
    [896, 640, 768]
    """
    sizes = range(_TPU_BLOCK // 2, _TPU_BLOCK + 1, _LANES)
    return min(sizes, key=lambda size: (-(-tokens // size) * size, -size))


def attend_in_tiles(
    q: Float[Array, "B A N E"],
    k: Float[Array, "B A N E"],
    v: Float[Array, "B A N E"],
    interpret: bool = False,
) -> Float[Array, "B A N E"]:
    """`attend` by JAX's splash kernel for TPUs: no scores in memory, neither forward nor backward.

    Args:
        interpret: run the kernel's program on any machine, slowly.
    """
    _, heads, tokens, width = q.shape
    size = tile(tokens)
    filled = -(-tokens // size) * size
    segments = (jnp.arange(filled) >= tokens).astype(jnp.int32)  # what fills up looks at itself alone

    def fill_up(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, filled - tokens), (0, 0)))

    kernel = _splash_kernel(heads, filled, size, interpret)
    of_clip = functools.partial(kernel, segment_ids=splash.SegmentIds(segments, segments))
    out: Any = jax.vmap(of_clip)(*map(fill_up, (q * width**-0.5, k, v)))
    return out[:, :, :tokens].astype(v.dtype)


def _splash_kernel(heads: int, tokens: int, size: int, interpret: bool) -> splash.SplashAttentionKernel:
    sizes = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
        # Tokens along the lanes: heads of 64 would fill up half of them with nothing.
        q_layout=splash.QKVLayout.SEQ_MINOR,
        k_layout=splash.QKVLayout.SEQ_MINOR,
        v_layout=splash.QKVLayout.SEQ_MINOR,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((tokens, tokens))] * heads)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
