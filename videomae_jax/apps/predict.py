"""Classes of videos, named, from any classifier: the mean of the softmax over test views."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from videomae_jax.apps.embed import open_videos
from videomae_jax.config import UserError
from videomae_jax.data import pipeline
from videomae_jax.evaluation.classification import merge_views
from videomae_jax.interop import weights
from videomae_jax.models.heads import VideoClassifier


def run(path: str, checkpoint: str, *, top: int, segments: int, crops: int, out: str) -> list[dict[str, Any]]:
    """The `top` classes of each video with their scores, best first; `out` (.json) gets all of them too.

    A video that cannot be decoded has its reason in `error` and no classes.

    Raises:
        UserError: no classifier, or numbers that are not positive.
    """
    if min(top, segments, crops) < 1:
        raise UserError("--top, --segments and --crops must be positive")
    videos = open_videos(path)
    model = weights.load(checkpoint)
    if not isinstance(model, VideoClassifier):
        raise UserError(
            f"{checkpoint} holds a pretraining model, which has no classes: finetune it first, or use embed"
        )
    frames, height, width = model.config.clip_size
    stride = weights.read_stride(checkpoint, weights.Hints())
    views = pipeline.TestViews(frames, stride, (height, width), segments, crops)
    names, found = model.config.classes, []
    for i, video in enumerate(videos.ids):
        made = views.map((i, videos[i]))
        if not made["weight"]:
            found.append({"id": video, "classes": [], "error": made["error"]})
            continue
        outputs = np.stack([np.asarray(model(jnp.asarray(view)[None]))[0] for view in made["video"]])
        scores = merge_views(outputs[None], model.config.head)[0]
        best = np.argsort(-scores, kind="stable")[:top]
        classes = [{"name": names[place], "score": float(scores[place])} for place in best]
        found.append({"id": video, "classes": classes})
    if out:
        pathlib.Path(out).write_text(json.dumps(found, indent=2) + "\n")
    return found
