"""Probes on frozen features: k-NN, a linear layer, or one attending query; the backbone is never trained."""

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from videomae_jax.apps import predictions
from videomae_jax.config import Config, UserError
from videomae_jax.data import pipeline
from videomae_jax.evaluation import classification, neighbours
from videomae_jax.evaluation.classification import Scores, merge_views
from videomae_jax.interop import weights
from videomae_jax.models import heads, vit
from videomae_jax.storage import Place
from videomae_jax.tasks import backbone, features
from videomae_jax.training import compute, loop, optim, report, splits

_PROTOCOLS = {
    "knn": "votes of the nearest training videos by cosine, each the mean of its clips",
    "linear": "batch norm and a linear layer by SGD on pooled features of unaugmented clips",
    "attentive": "one learned query on the tokens of each unaugmented clip by AdamW; views are averaged",
}
"""What a kind of probe does, for evaluation.json: figures of other protocols differ by ten points."""


def run(config: Config, workdir: Place, started: float) -> dict[str, Any]:
    """Probes the weights of `init_from`.

    Writes evaluation.json, predictions.csv, confusion.png and summary.json. Features are those of one central
    crop of each of `evaluate.segments` clips of a video; they are kept in WORKDIR/features, so another kind
    of probe on the same pooled features computes none.

    Raises:
        UserError: settings that do not fit, or no usable weights.
        ExportError: `init_from` holds no model.
        OutputError: features or outputs that are not finite.
    """
    kind = config.probe.kind
    _check(config, workdir)
    mesh = compute.make_mesh(config)
    model = backbone.computed(config, weights.read(config.init_from, backbone.hints(config)))
    config = _with_heads(config, model.config.encoder)
    frozen = features.Frozen(config.init_from, model, per_token=kind == "attentive")
    videos = splits.open_splits(config)
    if videos.test is videos.train or videos.train is videos.validation:
        raise UserError(
            f"{config.data.path} has no other videos to test on, and {len(videos.train)} are too few to hold "
            f"some out (data.held_out={config.data.held_out}): give it a validation or a test part"
        )
    report.write_json(workdir / "probe.json", loop.identity(config, videos.train))
    clip = (config.data.frames, config.data.stride, tuple(config.data.size))
    views = pipeline.TestViews(*clip, config.evaluate.segments, 1)
    report.say(
        f"probe {kind}: {len(videos.train)} training and {len(videos.test)} test videos, "
        f"{views.segments} clips each, of {config.init_from}"
    )
    name = "tokens" if frozen.per_token else "pooled"
    sides = {}
    for side, source in (("train", videos.train), ("test", videos.test)):
        found = features.extract(frozen, source, views, config, mesh, workdir / "features" / f"{side}_{name}")
        for reason in found.failed.values():
            report.say(f"bad video, left out: {reason}")
        sides[side] = (found, np.asarray(source.labels)[found.records])
    extracted = time.time()
    (train, labels), (test, truth) = sides["train"], sides["test"]
    probe = {"knn": _knn, "linear": _linear, "attentive": _attentive}[kind]
    values = probe(config, train.values, labels, test.values, len(videos.train.classes))
    ids = [videos.test.ids[record] for record in test.records]
    classification.check_finite(values, ids, f"the {kind} probe")
    empty = np.zeros((len(truth), 0))
    scores = Scores(test.records, merge_views(values, "softmax"), truth, empty)
    result = {
        **scores.metrics("softmax"),
        "probe": kind,
        "protocol": _PROTOCOLS[kind],
        "videos": len(test.records),
        "videos_failed": len(test.failed),
        "failed": test.failed,
        "views": {"segments": views.segments, "crops": 1},
    }
    predictions.write(workdir, result, scores, videos.test)
    report.say(f"{predictions.line(result)}; see {workdir / 'evaluation.json'}")
    seconds = {"features": round(extracted - started, 2), "probe": round(time.time() - extracted, 2)}
    summary = {"task": "probe", "evaluation": result, "bad_videos": train.failed, "seconds": seconds}
    report.write_json(workdir / "summary.json", summary)
    return summary


def _check(config: Config, workdir: Place) -> None:
    """Refuses what no probe can be made of."""
    if config.probe.kind not in _PROTOCOLS:
        raise UserError(f"probe.kind={config.probe.kind!r} is unknown: use {', '.join(_PROTOCOLS)}")
    if config.head.kind != "softmax":
        raise UserError(f"probes name classes: head.kind={config.head.kind} is for finetuning")
    if not config.init_from:
        raise UserError("a probe needs trained weights: set --config.init_from=WORKDIR or an export")
    if jax.process_count() > 1:
        raise UserError("a probe runs on one host: start it on one")
    if (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} belongs to a training run, whose results these would replace: use another"
        )


def _with_heads(config: Config, encoder: vit.Stack) -> Config:
    """The settings with the heads of an attentive probe on an encoder's tokens."""
    config = config.copy_and_resolve_references()
    config.probe.num_heads = config.probe.num_heads or encoder.num_heads
    if config.probe.kind == "attentive" and encoder.width % config.probe.num_heads:
        raise UserError(
            f"probe.num_heads={config.probe.num_heads} does not divide the width {encoder.width} of the "
            f"features: leave it at 0, the encoder's {encoder.num_heads}"
        )
    return config


def _knn(
    config: Config, train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int
) -> Float[np.ndarray, "B 1 K"]:
    """Log votes on the mean of a video's clips."""
    known, asked = (side.astype(np.float32).mean(axis=1) for side in (train, test))
    count, temperature = config.evaluate.neighbours, config.evaluate.temperature
    votes = neighbours.votes(known, labels, asked, classes, count, temperature)
    return np.log(np.maximum(votes, 1e-12))[:, None]


def _linear(
    config: Config, train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int
) -> Float[np.ndarray, "B V K"]:
    """Batch norm without scale, then a linear layer, by SGD: lr 0.1 per 256, momentum 0.9, no decay, cosine.

    As in MAE (arXiv 2111.06377); the statistics of the batch norm are those of all training clips, which are
    known because features are frozen and kept.
    """
    flat = np.asarray(train, np.float32).reshape(-1, train.shape[-1])
    mean, std = flat.mean(axis=0), np.sqrt(flat.var(axis=0) + 1e-6)
    params = {
        "kernel": 0.01 * jax.random.normal(jax.random.key(config.seed), (flat.shape[1], classes)),
        "bias": jnp.zeros(classes),
    }

    def outputs(params: Any, rows: Float[Array, "B D"]) -> Float[Array, "B K"]:
        return (rows - mean) / std @ params["kernel"] + params["bias"]

    tx = optax.trace(0.9)
    params = _fit(config, outputs, params, tx, flat, np.repeat(labels, train.shape[1]))
    rows = test.astype(np.float32).reshape(-1, test.shape[-1])
    return np.asarray(outputs(params, jnp.asarray(rows))).reshape(*test.shape[:2], classes)


def _attentive(
    config: Config, train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int
) -> Float[np.ndarray, "B V K"]:
    """An `AttentiveProbe` by AdamW with weight decay 0.05."""
    width = train.shape[-1]
    probe = heads.AttentiveProbe(width, config.probe.num_heads, classes, rngs=nnx.Rngs(config.seed))
    graphdef, state = nnx.split(probe)

    def outputs(params: Any, rows: Float[Array, "B N D"]) -> Float[Array, "B K"]:
        return nnx.merge(graphdef, params)(rows)

    tx = optim.adamw((0.9, 0.999), 1e-8, 0.05, 0.0)
    flat = train.reshape(-1, *train.shape[2:])
    params = _fit(config, outputs, nnx.to_pure_dict(state), tx, flat, np.repeat(labels, train.shape[1]))
    ask = jax.jit(outputs)
    each = [np.asarray(ask(params, jnp.asarray(video, jnp.float32))) for video in test]
    return np.stack(each)


def _fit(
    config: Config,
    outputs: Any,
    params: Any,
    tx: optim.Optimizer,
    rows: np.ndarray,
    labels: Int[np.ndarray, " N"],
) -> Any:
    """Trains `params` for `probe.epochs` on shuffled rows; a tenth of them warms up, then a cosine to 0."""
    settings = config.probe
    size = min(settings.batch_size, len(rows))
    per_epoch = len(rows) // size
    total = settings.epochs * per_epoch
    rate = optim.schedule(settings.lr * size / 256, 0.0, max(total // 10, 1), total)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(carry: Any, batch: Float[Array, "B ..."], wanted: Int[Array, " B"], step: Int[Array, ""]):
        params, opt_state = carry

        def loss(params: Any) -> Float[Array, ""]:
            logits = outputs(params, batch.astype(jnp.float32))
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (jax.tree.map(lambda p, u: p - rate(step) * u, params, updates), opt_state), value

    carry, step, value = (params, tx.init(params)), 0, math.nan
    rng = np.random.default_rng(config.seed)
    for epoch in range(settings.epochs):
        order = rng.permutation(len(rows))
        for start in range(0, per_epoch * size, size):
            chosen = np.sort(order[start : start + size])  # rows may lie on disk
            carry, value = train_step(carry, rows[chosen], labels[chosen], jnp.int32(step))
            step += 1
        if (epoch + 1) % max(settings.epochs // 10, 1) == 0:
            report.say(f"probe: epoch {epoch + 1} of {settings.epochs}, loss {float(value):.4f}")
    return carry[0]
