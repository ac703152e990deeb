"""k-NN while training: what features of whole clips know of the classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from videomae_jax.config import UserError
from videomae_jax.data import pipeline, sources
from videomae_jax.evaluation import classification, neighbours
from videomae_jax.training import report, testing
from videomae_jax.training.splits import spread
from videomae_jax.training.task import Run, Validate

Pooled = Callable[[Any, UInt8[Array, "B T H W C"]], Float[Array, "B D"]]


def validator(pooled: Pooled, stride: int, run: Run) -> Validate:
    """knn_top1 of held-out videos among the training videos, by their middle clips.

    Args:
        pooled: (parameters, clips) -> features.

    Raises:
        UserError: the videos have no classes, or there are none to hold out; when it looks, none of a side
            can be decoded.
    """
    config, train, held_out = run.config, run.videos.train, run.videos.validation
    if len(train.classes) < 2 or train is held_out or min(min(train.labels), min(held_out.labels)) < 0:
        raise UserError(
            f"evaluate.every={config.evaluate.every}: k-NN while training needs labelled videos, some of "
            f"them held out; set --config.evaluate.every=0"
        )
    train = train.select(spread(len(train), config.evaluate.knn_videos))
    held_out = sources.relabel(held_out, train.classes)
    clip = pipeline.ValidationClip(config.data.frames, stride, tuple(config.data.size))
    sides = [testing.Evaluator(pooled, side, clip, config, run.mesh) for side in (train, held_out)]
    said: set[str] = set()

    def look(side: testing.Evaluator, params: Any) -> tuple[np.ndarray, np.ndarray]:
        outputs = side.run(params)
        for video, reason in outputs.failed.items():
            if video not in said:
                said.add(video)
                report.say(f"bad video, left out of k-NN: {reason}")
        if not len(outputs.records):
            raise UserError(f"k-NN while training: none of {len(side.source)} videos can be decoded")
        return outputs.values[:, 0], np.asarray(side.source.labels)[outputs.records]

    def validate(params: Any, _step: int) -> dict[str, float]:
        known, asked = (look(side, params) for side in sides)
        lost = sum(int((~np.isfinite(values).all(axis=1)).sum()) for values, _ in (known, asked))
        if lost:
            report.say(f"warning: the features of {lost} videos are not finite: k-NN counts them as wrong")
        if not np.isfinite(known[0]).all(axis=1).any():
            return {"knn_top1": 0.0}
        count, temperature = config.evaluate.neighbours, config.evaluate.temperature
        votes = neighbours.votes(*known, asked[0], len(train.classes), count, temperature)
        return {"knn_top1": float((classification.label_ranks(votes, asked[1]) == 0).mean())}

    return validate
