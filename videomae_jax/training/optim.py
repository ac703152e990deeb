"""AdamW and the per-step schedule as the published code has them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from videomae_jax import sharding

Optimizer = optax.GradientTransformation

# Published: no decay for one-dimensional tensors, biases and the mask token. By name, because stacked
# blocks give their vectors a depth axis.
DECAY_RULES = (
    (r".*(kernel|qkv|project)", True),
    (r".*(bias|scale|mask_token|query|gamma[12])", False),
)


def learning_rate(
    step: Int[Array, ""], peak: float, end: float, warmup_steps: int, total_steps: int
) -> Float[Array, ""]:
    """Linear warm-up from 0, then a cosine towards `end`; one value per optimizer step.

    As published: the warm-up's `warmup_steps` points include both 0 (the first step does not move) and
    `peak`; the cosine starts at `peak` again and stops one step short of `end`.
    """
    warm = peak * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    cosine = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, warm, cosine)


def decay_mask(params: Any) -> Any:
    """True for each leaf that weight decay applies to."""

    def decays(path: tuple[Any, ...], _leaf: Any) -> bool:
        return sharding.first_match(DECAY_RULES, sharding.path_name(path))

    return jax.tree_util.tree_map_with_path(decays, params)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Learning rates by depth, for a model whose tree has encoder/embed and encoder/blocks.

    Attributes:
        decay: as published, layer i of 0 (embedding), 1..L (blocks), L + 1 (all above) has the learning rate
            times decay^(L + 1 - i).
        frozen: the embedding and this many blocks do not move at all; 0 freezes nothing.
    """

    decay: float = 1.0
    frozen: int = 0


def layer_scales(params: Any, layers: Layers) -> Any:
    """Factor of each leaf's learning rate, a number, or for stacked blocks an array [L, 1, ...]."""
    shapes = {
        sharding.path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    depth = next(shape[0] for name, shape in shapes.items() if name.startswith("encoder/blocks/"))

    def scale(path: tuple[Any, ...], leaf: Any) -> Any:
        name = sharding.path_name(path)
        if name.startswith("encoder/embed/"):
            return 0.0 if layers.frozen else layers.decay ** (depth + 1)
        if not name.startswith("encoder/blocks/"):
            return 1.0
        block = np.arange(depth)
        factors = np.where(block < layers.frozen, 0.0, layers.decay ** (depth - block))
        return factors.astype(np.float32).reshape(depth, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def adamw(
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    clip_norm: float,
    rate_factors: Callable[[Any], Any] | None = None,
    decays: Callable[[Any], Any] = decay_mask,
) -> Optimizer:
    """Decoupled AdamW without the learning rate, which the train step applies.

    Args:
        clip_norm: limit on the global gradient norm before Adam; 0 does not clip.
        rate_factors: (parameters) -> factor of each leaf's learning rate; None: 1 for all.
        decays: (parameters) -> whether each leaf decays.
    """
    parts = [optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()]
    parts += [optax.scale_by_adam(*betas, eps=epsilon), optax.add_decayed_weights(weight_decay, decays)]
    if rate_factors:
        parts.append(
            optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rate_factors(updates)))
        )
    return optax.chain(*parts)


def schedule(peak: float, end: float, warmup_steps: int, total_steps: int):
    """`learning_rate` as a function of the step alone."""
    return functools.partial(
        learning_rate, peak=peak, end=end, warmup_steps=warmup_steps, total_steps=total_steps
    )
