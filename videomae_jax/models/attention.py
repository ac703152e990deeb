"""Softmax attention, computed in the ways that suit different machines."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = ("xla", "blocks", "cudnn")
_BLOCK = 512  # queries at a time; fewer gain nothing


def attend(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"], kind: str = "xla"
) -> Float[Array, "B A Q E"]:
    """Softmax attention of each head over all tokens; the softmax in float32.

    Args:
        kind: "xla": all scores at once, written out because `jax.nn.dot_product_attention` needs 1.3 to 2
            times as long on a CPU. "blocks": where there are many, those of some queries of a head at a time,
            which stay in a CPU's cache: a quarter to a half of the time for 1,568 tokens. "cudnn": the fused
            kernel of NVIDIA GPUs, for bfloat16.
    """
    if kind == "cudnn":
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").transpose(0, 2, 1, 3)
    if kind == "blocks" and q.shape[2] > _BLOCK:
        return _attend_in_blocks(q, k, v)
    scores = jnp.einsum("bane,bame->banm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jnp.einsum("banm,bame->bane", jax.nn.softmax(scores).astype(v.dtype), v)


def _attend_in_blocks(
    q: Float[Array, "B A Q E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"]
) -> Float[Array, "B A Q E"]:
    """`attend` for a head and a block of queries after the other, each again in the backward pass."""
    b, a, queries, width = q.shape
    fitting = [size for size in range(_BLOCK // 8, _BLOCK + 1) if queries % size == 0]
    size = max(fitting, default=queries)

    def of_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> Float[Array, "Q E"]:
        blocks, keys, values = head
        of_block = jax.checkpoint(lambda block: attend(block, keys[None, None], values[None, None]))
        return jax.lax.map(of_block, blocks.reshape(-1, 1, 1, size, width)).reshape(queries, width)

    heads = tuple(x.reshape(b * a, -1, width) for x in (q, k, v))
    return jax.lax.map(of_head, heads).reshape(q.shape)
