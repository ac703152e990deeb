"""The plain video ViT: size table, tubelet embedding, fixed position table, pre-norm blocks, scanned stack.

Blocks are stacked on a leading depth axis and run by `lax.scan`, so compile time does not grow with depth.
Modules own parameters only; randomness arrives as a key (None: evaluation).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, Num

from videomae_jax.models import tubelets
from videomae_jax.models.tubelets import Grid


@dataclasses.dataclass(frozen=True)
class Stack:
    """Sizes of a stack of transformer blocks; `num_heads` divides `width`."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int


@dataclasses.dataclass(frozen=True)
class Size:
    """A published model: patch side, encoder, and the decoder of its pretraining."""

    patch: int
    encoder: Stack
    decoder: Stack


SIZES = {
    "tiny": Size(8, Stack(128, 4, 4, 512), Stack(64, 2, 2, 256)),  # ours, for laptops and tests
    "small": Size(16, Stack(384, 12, 6, 1536), Stack(192, 4, 3, 768)),
    "base": Size(16, Stack(768, 12, 12, 3072), Stack(384, 4, 6, 1536)),
    "large": Size(16, Stack(1024, 24, 16, 4096), Stack(512, 12, 8, 2048)),
    "huge": Size(16, Stack(1280, 32, 16, 5120), Stack(640, 12, 8, 2560)),
    "giant": Size(14, Stack(1408, 40, 16, 6144), Stack(512, 4, 8, 2234)),  # VideoMAE V2
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How blocks are computed; none of it changes what they compute.

    Attributes:
        dtype: of the matmuls, "float32" or "bfloat16"; parameters, softmax and statistics stay float32.
        unroll: scan steps per loop iteration; the depth unrolls everything (faster step, slower compile).
        remat: recompute block activations in the backward pass.
    """

    dtype: str = "float32"
    unroll: int = 1
    remat: bool = False

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"unknown dtype {self.dtype!r}: use 'float32' or 'bfloat16'")


POSITION_RESIZE = ("recompute", "interpolate")


@functools.lru_cache
def position_table(tokens: int, width: int) -> np.ndarray:
    """The published fixed table, float32 [tokens, width]: 1-D over the flat token index.

    Sine in even columns, cosine in odd ones, of n / 10000^(2 floor(j/2) / width), computed in float64.
    """
    columns = np.arange(width) // 2 * 2 / width
    angle = np.arange(tokens)[:, None] / np.power(10000.0, columns)
    return np.where(np.arange(width) % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


def _resampling_matrix(size: int, new_size: int, cubic: bool) -> np.ndarray:
    """[new_size, size] weights of linear or bicubic (a = -0.75) resampling at half-pixel centres.

    Border samples repeat the edge, as in PyTorch's `interpolate` with `align_corners=False`.
    """
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((new_size, size))
    for tap in range(-1, 3) if cubic else range(2):
        x = np.abs(centre - (base + tap))
        if cubic:
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            weight = np.where(x <= 1, near, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4))
        else:
            weight = 1 - x
        np.add.at(matrix, (np.arange(new_size), np.clip(base + tap, 0, size - 1)), weight)
    return matrix


@functools.lru_cache
def positions(grid: Grid, made_grid: Grid, width: int, resize: str) -> np.ndarray:
    """Position table for `grid`, float32 [N, width].

    For `made_grid`, the grid that the weights were made with, it is the published table, exactly. For
    another grid `resize` decides: "recompute" builds the table anew for the new N, as the published code
    does (positions are re-numbered); "interpolate" views the table as [T', H', W', D] and resamples it,
    bicubic in space and linear in time.
    """
    if grid == made_grid or resize == "recompute":
        return position_table(math.prod(grid), width)
    table = position_table(math.prod(made_grid), width).reshape(*made_grid, width)
    for axis, (size, new_size) in enumerate(zip(made_grid, grid, strict=True)):
        matrix = _resampling_matrix(size, new_size, cubic=axis > 0)
        table = np.moveaxis(np.tensordot(matrix, table, (1, axis)), 0, axis)
    return table.reshape(-1, width).astype(np.float32)


def linear(inputs: int, outputs: int, dtype: str, rngs: nnx.Rngs) -> nnx.Linear:
    """A Xavier-initialised layer: float32 parameters, matmul in `dtype`."""
    return nnx.Linear(
        inputs,
        outputs,
        dtype=jnp.dtype(dtype),
        kernel_init=nnx.initializers.xavier_uniform(),
        rngs=rngs,
    )


def layer_norm(width: int, epsilon: float, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics."""
    # The fast variance E[x^2] - E[x]^2 cancels: 7e-5 relative error where this form has 2e-6.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=jnp.dtype(dtype), rngs=rngs)


class Attention(nnx.Module):
    """Joint space-time self-attention with learned query and value biases and no key bias."""

    def __init__(self, sizes: Stack, dtype: str, rngs: nnx.Rngs):
        d = sizes.width
        self.num_heads = sizes.num_heads
        self.dtype = jnp.dtype(dtype)
        bound = math.sqrt(6 / (4 * d))  # Xavier of the fused D -> 3D matrix, as published
        kernel = jax.random.uniform(rngs.params(), (d, 3, d), jnp.float32, -bound, bound)
        self.qkv = nnx.Param(kernel)
        self.q_bias = nnx.Param(jnp.zeros(d))
        self.v_bias = nnx.Param(jnp.zeros(d))
        self.out = linear(d, d, dtype, rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        b, n, d = x.shape
        # Matmuls on flat tokens: with a batch axis XLA's CPU backward pass takes twice as long.
        qkv = jnp.einsum("td,dce->tce", x.reshape(b * n, d), self.qkv[...].astype(self.dtype))
        q, k, v = jnp.moveaxis(qkv, 1, 0)
        q, v = (x + bias[...].astype(self.dtype) for x, bias in ((q, self.q_bias), (v, self.v_bias)))
        heads = (x.reshape(b, n, self.num_heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
        out = attend(*heads).transpose(0, 2, 1, 3).reshape(b * n, d)
        return self.out(out).reshape(b, n, d)


def attend(
    q: Float[Array, "B A N E"], k: Float[Array, "B A N E"], v: Float[Array, "B A N E"]
) -> Float[Array, "B A N E"]:
    """Softmax attention of each head over all tokens; the softmax in float32.

    Written out because `jax.nn.dot_product_attention` needs 1.3 to 2 times as long on a CPU.
    """
    scores = jnp.einsum("bane,bame->banm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jnp.einsum("banm,bame->bane", jax.nn.softmax(scores).astype(v.dtype), v)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then a GELU MLP, each with optional layer scale and drop path."""

    def __init__(self, sizes: Stack, epsilon: float, layer_scale: float, dtype: str, rngs: nnx.Rngs):
        d = sizes.width
        self.norm1 = layer_norm(d, epsilon, dtype, rngs)
        self.attention = Attention(sizes, dtype, rngs)
        self.norm2 = layer_norm(d, epsilon, dtype, rngs)
        self.fc1 = linear(d, sizes.mlp_dim, dtype, rngs)
        self.fc2 = linear(sizes.mlp_dim, d, dtype, rngs)
        self.has_layer_scale = layer_scale > 0
        if self.has_layer_scale:
            self.gamma1 = nnx.Param(jnp.full(d, layer_scale))
            self.gamma2 = nnx.Param(jnp.full(d, layer_scale))

    def __call__(
        self, x: Float[Array, "B N D"], drop_rate: Float[Array, ""], key: Key[Array, ""] | None
    ) -> Float[Array, "B N D"]:
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y = self.attention(self.norm1(x))
        if self.has_layer_scale:
            y = y * self.gamma1[...].astype(y.dtype)
        x = x + drop_path(y, drop_rate, attention_key)
        y = self.norm2(x).reshape(-1, x.shape[-1])
        y = self.fc2(gelu(self.fc1(y))).reshape(x.shape)
        if self.has_layer_scale:
            y = y * self.gamma2[...].astype(y.dtype)
        return x + drop_path(y, drop_rate, mlp_key)


def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The exact form, as published; the tanh approximation differs at 1e-4.

    Through erf, whose derivative is cheap; `jax.nn.gelu` goes through erfc.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * (0.5**0.5)))


def drop_path(
    x: Float[Array, "B N D"], rate: Float[Array, ""], key: Key[Array, ""] | None
) -> Float[Array, "B N D"]:
    """Stochastic depth: zeroes the branch of an example with probability `rate`, else scales by 1/(1-rate).

    Without a key (evaluation) it is the identity.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return x * (keep / (1 - rate)).astype(x.dtype)


def make_blocks(sizes: Stack, epsilon: float, layer_scale: float, dtype: str, rngs: nnx.Rngs) -> Block:
    """A `Block` whose every parameter has a leading depth axis; each layer has its own random draw."""

    @nnx.vmap
    def make(key: Key[Array, ""]) -> Block:
        return Block(sizes, epsilon, layer_scale, dtype, nnx.Rngs(params=key))

    return make(jax.random.split(rngs.params(), sizes.depth))


def run_blocks(
    blocks: Block,
    x: Float[Array, "B N D"],
    compute: Compute,
    drop_path_rate: float,
    key: Key[Array, ""] | None,
) -> Float[Array, "B N D"]:
    """Applies stacked blocks in order; block i of L drops its branches with rate * i / (L - 1)."""
    graphdef, params = nnx.split(blocks)
    depth = blocks.fc1.kernel.shape[0]
    rates = jnp.linspace(0.0, drop_path_rate, depth)
    keys = None if key is None or drop_path_rate == 0 else jax.random.split(key, depth)

    def layer(x, xs):
        block_params, rate, block_key = xs
        return nnx.merge(graphdef, block_params)(x, rate, block_key), None

    if compute.remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(layer, x, (params, rates, keys), unroll=min(compute.unroll, depth))[0]


class TubeletEmbed(nnx.Module):
    """Normalises raw tubelets and projects them to tokens; a 3-D convolution written as one matmul."""

    def __init__(
        self,
        tubelet: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        width: int,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.mean, self.std, self.dtype = mean, std, jnp.dtype(dtype)
        voxels = math.prod(tubelet) * len(mean)
        # The published convolution keeps its framework's default: U(+-1/sqrt(fan_in)), bias too.
        bound = 1 / math.sqrt(voxels)
        draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        self.kernel = nnx.Param(draw(rngs.params(), (voxels, width)))
        self.bias = nnx.Param(draw(rngs.params(), (width,)))

    def __call__(self, raw: Num[Array, "B K P"]) -> Float[Array, "B K D"]:
        x = tubelets.normalize_pixels(raw, self.mean, self.std).astype(self.dtype)
        return x @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)
