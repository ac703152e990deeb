"""Modules as functions of their parameters: shapes without computing, methods compiled once for all."""

import functools
from typing import Any

import jax
from flax import nnx


@functools.lru_cache
def abstract(kind: type, config: Any) -> tuple[Any, dict]:
    """(graphdef, shapes and dtypes of the parameters as a nested dict) of a model; nothing is computed.

    Args:
        kind: the module, made from `config` and `rngs`.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def init(kind: type, config: Any, key: jax.Array) -> dict:
    """Parameters of a model from nothing, a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@functools.lru_cache
def jitted(method: str, static: tuple[str, ...] = ()):
    """The method of a model as a compiled function of (graphdef, params, arrays...), shared by all models."""

    def call(graphdef, params, *arrays, **settings):
        return getattr(nnx.merge(graphdef, params), method)(*arrays, **settings)

    return jax.jit(call, static_argnums=0, static_argnames=static)
