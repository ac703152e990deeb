"""Softmax attention, computed in the ways that suit different machines and lengths."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

KINDS = ("xla", "blocks", "queries", "cudnn", "splash")
_BLOCK = 512  # queries at a time; fewer gain nothing
_SHORT = 512  # tokens whose scores a TPU holds beside everything else; see docs/performance.md
_LANES = 128
_TPU_BLOCK = 1024  # tokens; larger ones exceed the 16 MiB of VMEM, found by compiling


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
    if kind == "splash" and q.shape[2] > _SHORT and q.shape == k.shape:
        return attend_in_tiles(q, k, v)
    if kind == "blocks" and q.shape[2] > _BLOCK:
        return _attend_in_blocks(q, k, v)
    if kind == "queries" and q.shape[2] > _BLOCK:
        return _attend_by_queries(q, k, v)
    return _attend_at_once(q, k, v)


@jax.checkpoint
def _attend_at_once(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"]
) -> Float[Array, "B A Q E"]:
    """`attend` with all scores, made again in the backward pass: reading them back takes longer."""
    scores = jnp.einsum("bane,bame->banm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jnp.einsum("banm,bame->bane", jax.nn.softmax(scores).astype(v.dtype), v)


def _attend_in_blocks(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"]
) -> Float[Array, "B A Q E"]:
    """`attend` for a head and a block of queries after the other, each again in the backward pass."""
    b, a, queries, width = q.shape
    size = _block(queries)

    def of_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> Float[Array, "Q E"]:
        blocks, keys, values = head

        def of_block(block: Float[Array, "1 1 q E"]) -> Float[Array, "1 1 q E"]:
            return _attend_at_once(block, keys[None, None], values[None, None])

        return jax.lax.map(of_block, blocks.reshape(-1, 1, 1, size, width)).reshape(queries, width)

    heads = tuple(x.reshape(b * a, -1, width) for x in (q, k, v))
    return jax.lax.map(of_head, heads).reshape(q.shape)


def _block(queries: int) -> int:
    """The largest block that divides the queries; all of them where none does."""
    fitting = [size for size in range(_BLOCK // 8, _BLOCK + 1) if queries % size == 0]
    return max(fitting, default=queries)


def _attend_by_queries(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"]
) -> Float[Array, "B A Q E"]:
    """`attend` for a block of queries of every head after the other, each again in the backward pass."""
    size = _block(q.shape[2])
    blocks = jnp.moveaxis(q.reshape(*q.shape[:2], -1, size, q.shape[3]), 2, 0)
    out = jax.lax.map(lambda block: _attend_at_once(block, k, v), blocks)
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)


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
