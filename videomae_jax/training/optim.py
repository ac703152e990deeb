"""AdamW and the per-step schedule as the published code has them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from videomae_jax import sharding

# Published: no decay for one-dimensional tensors, biases and the mask token. By name, because stacked
# blocks give their vectors a depth axis.
DECAY_RULES = (
    (r".*(kernel|qkv|project)", True),
    (r".*(bias|scale|mask_token|gamma[12])", False),
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


def adamw(
    betas: tuple[float, float], epsilon: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Decoupled AdamW without the learning rate, which the train step applies.

    Args:
        clip_norm: limit on the global gradient norm before Adam; 0 does not clip.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    adam = optax.scale_by_adam(*betas, eps=epsilon)
    return optax.chain(clip, adam, optax.add_decayed_weights(weight_decay, decay_mask))


def schedule(peak: float, end: float, warmup_steps: int, total_steps: int):
    """`learning_rate` as a function of the step alone."""
    return functools.partial(
        learning_rate, peak=peak, end=end, warmup_steps=warmup_steps, total_steps=total_steps
    )
