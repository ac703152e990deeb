"""Layers of float32 parameters that compute in `dtype`, and keep little for the backward pass.

What is elementwise is written with its own gradient: left to itself, differentiation keeps every intermediate
result, several of them in float32, and moving those takes longer than all matmuls do.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# How kernels begin, as published: pretraining with Xavier, finetuning with normal(0.02) cut far out.
Initializer = Callable[..., jax.Array]
XAVIER: Initializer = nnx.initializers.xavier_uniform()
NORMAL: Initializer = nnx.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


@jax.custom_vjp
def add_bias(x: Float[Array, "*S D"], bias: Float[Array, " D"]) -> Float[Array, "*S D"]:
    """`x + bias` in the dtype of `x`, where compilers add it to what a matmul has just computed.

    Its gradient is a sum over all tokens, made in float32: in bfloat16 it is off by up to an eighth.
    """
    return x + bias.astype(x.dtype)


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), None),
    lambda _, grad: (grad, grad.astype(jnp.float32).sum(tuple(range(grad.ndim - 1)))),
)


def matmul(x: Float[Array, "*S E"], kernel: Float[Array, "E D"], dtype: jnp.dtype) -> Float[Array, "*S D"]:
    """`x @ kernel` in `dtype`, on flat tokens.

    With a batch axis XLA's CPU backward pass takes twice as long, and in bfloat16 rounds partial sums of the
    kernel's gradient (JAX 0.11: 17 % off where clips have little contrast).
    """
    flat = x.astype(dtype).reshape(-1, x.shape[-1])
    return (flat @ kernel.astype(dtype)).reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """A layer with its matmul in `dtype`; its bias begins at 0."""

    def __init__(self, inputs: int, outputs: int, dtype: str, rngs: nnx.Rngs, kernel_init: Initializer):
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(
        self, x: Float[Array, "*S E"], leave: Callable[[jax.Array], jax.Array] = lambda x: x
    ) -> Float[Array, "*S D"]:
        """With `leave`, what becomes of the product before the bias is added; see `Layout`."""
        return add_bias(leave(matmul(x, self.kernel[...], self.dtype)), self.bias[...])


class LayerNorm(nnx.Module):
    """Normalises each token over its features, then scales and shifts; begins as 1 and 0."""

    def __init__(self, width: int, epsilon: float, dtype: str):
        self.epsilon = epsilon
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
        """Statistics in float32, the result in the layer's dtype."""
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, "*S D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
    dtype: jnp.dtype,
) -> Float[Array, "*S D"]:
    """LayerNorm in float32, the result in `dtype`; the backward pass keeps `x` and two numbers a token."""
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: jnp.dtype):
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    # The fast variance E[x^2] - E[x]^2 cancels: 7e-5 relative error where this form has 2e-6.
    factor = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
    return ((wide - mean) * (factor * scale) + bias).astype(dtype), (x, mean, factor, scale)


def _layer_norm_backward(_epsilon: float, _dtype: jnp.dtype, kept: tuple[jax.Array, ...], grad: jax.Array):
    x, mean, factor, scale = kept
    # Without the barriers a GPU's compiler writes intermediate results to memory, in float32.
    mean, factor = jax.lax.optimization_barrier((mean, factor))
    grad, normalized = grad.astype(jnp.float32), (x.astype(jnp.float32) - mean) * factor
    inner = grad * scale
    means = inner.mean(axis=-1, keepdims=True), (inner * normalized).mean(axis=-1, keepdims=True)
    level, along = jax.lax.optimization_barrier(means)
    tokens = tuple(range(grad.ndim - 1))
    change = factor * (inner - level - normalized * along)
    return change.astype(x.dtype), (grad * normalized).sum(tokens), grad.sum(tokens)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _erf_part(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The share of a normal distribution below x."""
    return 0.5 * (1 + jax.lax.erf(x * (0.5**0.5)))


@jax.custom_vjp
def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The exact form, as published, in float32; the tanh approximation differs at 1e-4.

    The backward pass keeps `x` alone.
    """
    wide = x.astype(jnp.float32)
    return (wide * _erf_part(wide)).astype(x.dtype)


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide**2) * (2 * jnp.pi) ** -0.5
    return ((grad.astype(jnp.float32) * (_erf_part(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
