"""Gradients in bfloat16, leaf by leaf, and what each rule of where float32 is kept is worth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from videomae_jax.models import heads, layers, mae, masking, tubelets, vit
from videomae_jax.tasks import losses

LIMIT = 0.02  # of a leaf's gradient, by its norm
SHARED = {
    **{"clip_size": (8, 64, 64), "tubelet": (2, 8, 8), "pixel_mean": (0.5,) * 3, "pixel_std": (0.25,) * 3},
    "encoder": vit.Stack(64, 2, 2, 128),
}
PRETRAIN = mae.VideoMAEConfig(**SHARED, decoder=vit.Stack(48, 2, 2, 96))
FINETUNE = heads.ClassifierConfig(**SHARED, classes=tuple("abcdefgh"), head_scale=1.0)
MODELS = {"pretrain": (mae.VideoMAE, PRETRAIN), "finetune": (heads.VideoClassifier, FINETUNE)}


@functools.cache
def clips() -> jax.Array:
    """Bright clips of little contrast, whose normalised targets need more digits than bfloat16 has."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(200, 12, (8, 4, 8, 8, 3)).repeat(2, 1).repeat(8, 2).repeat(8, 3)
    fine = rng.normal(0, 1.0, (8, 8, 64, 64, 3))
    return jnp.asarray(np.clip(coarse + fine, 0, 255).astype(np.uint8))


def moved(task: str, offset: float) -> dict:
    """Weights of no special place, with large scores and logits of which only differences count.

    Args:
        offset: what all features of a token have in common, which no LayerNorm lets through.
    """
    kind, config = MODELS[task]
    params = nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(0)), nnx.Param))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    others = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, others)
    for stack in ("encoder", "decoder") if task == "pretrain" else ("encoder",):
        blocks = params[stack]["blocks"]
        # One channel of each head is the same for all tokens: it adds 25 to every score, and changes nothing.
        width = blocks["norm1"]["scale"].shape[-1]
        qkv, heads_first = blocks["attention"]["qkv"], slice(None, None, width // 2)
        blocks["norm1"] = {
            "scale": blocks["norm1"]["scale"].at[:, 0].set(0.0),
            "bias": blocks["norm1"]["bias"].at[:, 0].set(1.0),
        }
        qkv = qkv.at[:, :, :2, heads_first].set(0.0).at[:, 0, 1, heads_first].set(8.0)
        q_bias = blocks["attention"]["q_bias"].at[:, heads_first].set(25 / 8 * (width // 2) ** 0.5)
        blocks["attention"] |= {"qkv": qkv, "q_bias": q_bias}
    if task == "finetune":
        params["head"]["bias"] += 40.0
    params["encoder"]["embed"]["bias"] += offset
    return params


def gradients(task: str, dtype: str, offset: float = 0.0) -> dict[tuple, jax.Array]:
    kind, config = MODELS[task]
    config = dataclasses.replace(config, compute=vit.Compute(dtype=dtype))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    mask, video = masking.tube_mask(jax.random.key(1), 8, PRETRAIN.grid, 0.75), clips()

    def loss(params):
        model = nnx.merge(graphdef, params)
        if task == "pretrain":
            return model.token_losses(video, *masking.from_mask(mask), True, "mse").mean()
        logits = model.head(model.pooled(tubelets.normalize_pixels(video, (0.5,) * 3, (0.25,) * 3)))
        return losses.output_losses(logits, losses.smoothed(jnp.arange(8), 8, 0.1), "softmax", None).mean()

    return flatten_dict(jax.jit(jax.grad(loss))(jax.jit(moved, static_argnums=(0, 1))(task, offset)))


@functools.cache
def reference(task: str) -> dict[tuple, jax.Array]:
    return gradients(task, "float32")


def errors(task: str, dtype: str, offset: float) -> dict[str, float]:
    """Of each leaf, against float32 without an offset."""
    ours = gradients(task, dtype, offset)
    return {
        "/".join(path): float(jnp.linalg.norm(ours[path] - theirs) / jnp.linalg.norm(theirs))
        for path, theirs in reference(task).items()
    }


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize(
    ("dtype", "offset"), [("bfloat16", 0.0), pytest.param("float32", 1e3, marks=pytest.mark.slow)]
)
def test_every_gradient_is_within_two_per_cent_of_float32(task, dtype, offset):
    found = errors(task, dtype, offset)
    assert max(found.values()) < LIMIT, max(found.items(), key=lambda item: item[1])
    assert min(found.values()) > 1e-6  # computed otherwise


def bfloat16_scores(q, k, v, kind="xla"):
    scores = jnp.einsum("bane,bame->banm", q * q.shape[-1] ** -0.5, k)
    return jnp.einsum("banm,bame->bane", jax.nn.softmax(scores).astype(v.dtype), v)


def fast_norm(x, scale, bias, epsilon, dtype):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True) - mean**2
    return ((wide - mean) * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(dtype)


def bfloat16_target(video, indices, tubelet, _normalize):
    raw = tubelets.take(tubelets.patchify(video, tubelet), indices)
    pixels = (raw.astype(jnp.bfloat16) / 255).reshape(*raw.shape[:-1], -1, video.shape[-1])
    return ((pixels - pixels.mean(-2, keepdims=True)) / pixels.std(-2, keepdims=True, ddof=1)).reshape(
        raw.shape
    )


def bfloat16_losses(outputs, targets, *_):
    return -(targets * jax.nn.log_softmax(outputs.astype(jnp.bfloat16))).sum(-1)


def bfloat16_bias(x, bias):
    return x + bias.astype(x.dtype)


MUTANTS = {
    "scores": (("pretrain", "bfloat16", 0.0), (vit, "attend", bfloat16_scores)),
    "fast variance": (("finetune", "float32", 1e3), (layers, "layer_norm", fast_norm)),
    "pretraining loss": (
        ("pretrain", "bfloat16", 0.0),
        (tubelets, "reconstruction_targets", bfloat16_target),
    ),
    "finetuning loss": (("finetune", "bfloat16", 0.0), (losses, "output_losses", bfloat16_losses)),
    "bias": (("finetune", "bfloat16", 0.0), (layers, "add_bias", bfloat16_bias)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_less_float32_fails(name, monkeypatch, untyped):
    """Attention scores, statistics, target, loss and sums of biases are in float32 for a reason."""
    case, change = MUTANTS[name]
    reference(case[0])  # as it should be
    monkeypatch.setattr(*change)
    assert max(errors(*case).values()) > 1.25 * LIMIT
