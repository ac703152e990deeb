"""Classes of videos, named, from any classifier: the mean of the softmax over test views."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from videomae_jax import storage
from videomae_jax.apps import embed, videos
from videomae_jax.config import UserError
from videomae_jax.data import pipeline
from videomae_jax.evaluation import classification
from videomae_jax.hosts import Lock
from videomae_jax.interop import weights
from videomae_jax.models.detector import ActionDetector
from videomae_jax.models.heads import VideoClassifier
from videomae_jax.storage import Place

SUFFIXES = (".json", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Options:
    """How videos are looked at.

    Attributes:
        top: classes to name.
        segments: clips spread over a video; `crops` of each.
        split: of a divided folder; "all".
        hints: what files of weights do not tell; the stride counts for any.
    """

    top: int = 5
    segments: int = 5
    crops: int = 3
    split: str = "all"
    hints: weights.Hints = dataclasses.field(default_factory=weights.Hints)


def run(
    paths: Sequence[str], checkpoint: str, out: str, options: Options, say: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """The best classes of each video with their scores, best first; `say` is called with each as it is done.

    A video that cannot be decoded has its reason in `error` and no classes. `out` (.json, .csv, .parquet; ""
    for none) gets all of them; until then those that are done are in OUT.partial, and a killed run goes on.

    Raises:
        UserError: no classifier, numbers that are not positive, or a file that cannot be written.
        OutputError: scores that are not finite.
    """
    if min(options.top, options.segments, options.crops) < 1:
        raise UserError("--top, --segments and --crops must be positive")
    target = storage.at(out)
    if out and target.suffix not in SUFFIXES:
        raise UserError(f"--out={out} has an unknown suffix: use {', '.join(SUFFIXES)}")
    if out:
        videos.make_room(target, paths)
    named = videos.find(paths, options.split)
    model = weights.read(checkpoint, options.hints)
    if isinstance(model, ActionDetector):
        raise UserError(f"{checkpoint} holds a detector, which looks at boxes: use the command detect")
    if not isinstance(model, VideoClassifier):
        raise UserError(
            f"{checkpoint} holds a pretraining model, which has no classes: finetune it first, or use embed"
        )
    stride = weights.read_stride(checkpoint, options.hints)
    frames, height, width = model.config.clip_size
    views = pipeline.TestViews(frames, stride, (height, width), options.segments, options.crops)
    if not out:
        return list(_each(named, {}, model, views, options.top, checkpoint, say))
    with Lock(target.with_name(target.name + ".lock")):
        partial = storage.scratch(target.with_name(target.name + ".partial"))
        about = [
            embed.identity(model),
            stride,
            options.top,
            options.segments,
            options.crops,
        ]
        before = _resume(partial, about)
        with partial.open("a") as file:

            def keep(row: dict[str, Any]) -> None:
                file.write(json.dumps(row) + "\n")
                file.flush()
                say(row)

            rows = list(_each(named, before, model, views, options.top, checkpoint, keep))
        _write(target, [{name: row[name] for name in row if name != "identity"} for row in rows])
        partial.unlink()
    return rows


def _each(
    named: Sequence[videos.Named],
    before: dict[str, dict[str, Any]],
    model: VideoClassifier,
    views: pipeline.TestViews,
    top: int,
    checkpoint: str,
    say: Callable[[dict[str, Any]], None],
) -> Iterator[dict[str, Any]]:
    """The row of each video, from `before` where it is known."""
    names = model.config.classes
    for index, video in enumerate(named):
        identity = video.identity()
        if identity in before:
            yield before[identity]
            continue
        row = {"id": video.name, "classes": []}
        made = views.map((index, video.record()))
        if made["weight"]:
            outputs = np.stack([np.asarray(model(jnp.asarray(view)[None]))[0] for view in made["video"]])
            classification.check_finite(outputs.reshape(1, -1), [video.name], checkpoint)
            scores = classification.merge_views(outputs[None], model.config.head)[0]
            best = np.argsort(-scores, kind="stable")[:top]
            if model.config.head == "regression":  # values, not classes: all of them, in their order
                best = np.arange(len(scores))
            row["classes"] = [{"name": names[place], "score": float(scores[place])} for place in best]
        else:
            row["error"] = made["error"]
        row["identity"] = identity
        say(row)
        yield row


def _resume(partial: pathlib.Path, about: list[Any]) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run with the same weights and options left, by the identity of their video."""
    head = json.dumps({"about": about})
    lines = partial.read_text().splitlines() if partial.exists() else []
    if lines[:1] != [head]:
        lines = [head]
    whole = [line for line in lines[1:] if line.endswith("}")]  # the last may have been cut off
    partial.write_text("".join(line + "\n" for line in (head, *whole)))
    return {row["identity"]: row for row in map(json.loads, whole)}


def _write(target: Place, rows: list[dict[str, Any]]) -> None:
    with storage.output(target) as file:
        _write_rows(file, rows)


def _write_rows(target: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    if target.suffix == ".json":
        target.write_text(json.dumps(rows, indent=2) + "\n")
    elif target.suffix == ".csv":
        with target.open("w", newline="") as file:
            table = csv.writer(file)
            count = max(len(row["classes"]) for row in rows) if rows else 0
            pairs = [f"{name} {place}" for place in range(1, count + 1) for name in ("class", "score")]
            table.writerow(["id", "error", *pairs])
            for row in rows:
                values = [value for found in row["classes"] for value in (found["name"], found["score"])]
                values += [""] * (len(pairs) - len(values))
                table.writerow([row["id"], row.get("error", ""), *values])
    else:
        import pyarrow
        from pyarrow import parquet

        kind = pyarrow.list_(pyarrow.struct([("name", pyarrow.string()), ("score", pyarrow.float64())]))
        columns = {
            "id": pyarrow.array([row["id"] for row in rows]),
            "error": pyarrow.array([row.get("error", "") for row in rows]),
            "classes": pyarrow.array([row["classes"] for row in rows], kind),
        }
        parquet.write_table(pyarrow.table(columns), target)
