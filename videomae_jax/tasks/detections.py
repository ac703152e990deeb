"""Detections of a part, each key frame once whatever the batches and hosts, and what comes of them."""

import collections
import csv
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from videomae_jax import hosts, sharding, storage
from videomae_jax.apps import annotate
from videomae_jax.config import Config, UserError
from videomae_jax.data import detection_clips, pipeline, scenes
from videomae_jax.data.scenes import SceneSource
from videomae_jax.evaluation import detection
from videomae_jax.evaluation.detection import Boxes
from videomae_jax.storage import Place
from videomae_jax.training import feed, report

Scores = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(parameters, clips uint8 [B, T, H, W, C], boxes [B, R, 4]) -> how sure of each action, [B, R, K]"""


class Views(NamedTuple):
    """How key frames are looked at; see `detection_clips.KeyView` and `whole_tubelets`."""

    frames: int
    stride: int
    short: int
    patch: int


@dataclasses.dataclass(frozen=True)
class Found:
    """What a detector says of a part.

    Attributes:
        source: the key frames with the boxes that were looked at; `truth` with the annotated ones.
        scores: of each key frame that could be decoded, by its place in `source`: float32 [boxes, K].
        failed: id -> why it could not be decoded.
    """

    source: SceneSource
    truth: SceneSource
    scores: dict[int, np.ndarray]
    failed: dict[str, str]

    def say_failed(self) -> None:
        """Names what could not be decoded."""
        for name, reason in self.failed.items():
            report.say(f"bad key frame {name}, left out: {reason}")

    @functools.cached_property
    def boxes(self) -> Boxes:
        """Every box with every action; frames are places in `source`, numbers as they are written."""
        parts = []
        for place, scores in sorted(self.scores.items()):
            scene, (count, actions) = self.source.scenes[place], scores.shape
            parts.append(
                Boxes(
                    np.full(count * actions, place),
                    np.round(scene.corners.astype(np.float64), 5).repeat(actions, axis=0),
                    np.tile(np.arange(actions), count),
                    np.round(scores * scene.scores[:, None], 5).astype(np.float64).reshape(-1),
                )
            )
        return _joined(parts)

    def precisions(self) -> dict[int, float | None]:
        """Average precision of each class, by its place."""
        number = {name: i for i, name in enumerate(self.source.ids)}
        number |= {name: len(number) + i for i, name in enumerate(self.truth.ids) if name not in number}
        skipped = [number[name] for name in self.truth.excluded if name in number]
        parts = []
        for name, scene in zip(self.truth.ids, self.truth.scenes, strict=True):
            each = [len(actions) for actions in scene.actions]
            actions = np.array([action for done in scene.actions for action in done], np.int64)
            corners = scene.corners.astype(np.float64).repeat(each, axis=0)
            parts.append(Boxes(np.full(len(actions), number[name]), corners, actions, np.ones(len(actions))))
        truth, found = (boxes.of(~np.isin(boxes.frames, skipped)) for boxes in (_joined(parts), self.boxes))
        scored = self.truth.scored or range(len(self.truth.classes))
        return detection.average_precisions(truth, found, np.array(scored))

    def figures(self) -> dict[str, float]:
        """Frame-mAP at IoU 0.5; NaN if a score is not finite, so that such weights are never the best."""
        if not all(np.isfinite(scores).all() for scores in self.scores.values()):
            return {"mAP": float("nan")}
        return {"mAP": detection.mean(self.precisions())}


def _joined(parts: list[Boxes]) -> Boxes:
    none = Boxes(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    return Boxes(*(np.concatenate(column) for column in zip(none, *parts, strict=True)))


def countable(truth: SceneSource) -> int:
    """How many true boxes count, once for each of their actions that does."""
    scored = set(truth.scored or range(len(truth.classes)))
    return sum(
        len(scored & set(done))
        for name, scene in zip(truth.ids, truth.scenes, strict=True)
        if name not in truth.excluded
        for done in scene.actions
    )


class Tester:
    """Runs a detector on every key frame of a part, frames of one size after the other.

    Args:
        part: "validation" or "test": detected_PART has a detector's boxes, without it the annotated ones are
            taken.
    """

    def __init__(
        self, scores: Scores, truth: SceneSource, part: str, views: Views, config: Config, mesh: Mesh
    ):
        self.truth, self.views, self.config, self.mesh = truth, views, config, mesh
        file = scenes.detected_file(truth.root, part)
        self.source = scenes.detected(truth, file, config.detect.threshold) if file else truth
        self.slots = max((len(scene.corners) for scene in self.source.scenes), default=1)
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch = -(-config.evaluate.batch_videos // parts) * parts
        self._sizes = self._by_size()
        for size in self._sizes:
            self._loader(size)  # what does not fit into memory is refused now
        outputs = sharding.replicated(mesh)

        def of_rows(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
            return scores(params, rows["video"], rows["boxes"])

        mapped = sharding.by_rows(of_rows, mesh)
        self._run = jax.jit(
            lambda params, rows: (mapped(params, rows), rows["index"], rows["weight"]),
            out_shardings=(outputs, outputs, outputs),
        )

    def _by_size(self) -> dict[tuple[int, int], list[int]]:
        """Places of the source by the size that their frames become."""
        sizes = collections.defaultdict(list)
        # As host 0 read them: all take the same batches.
        for place, (height, width) in enumerate(hosts.gather(self.source.frame_sizes())[0]):
            if not height:  # it will be named when it is read
                height = width = self.views.short
            size = detection_clips.whole_tubelets(height, width, self.views.short, self.views.patch)
            sizes[size].append(place)
        return dict(sorted(sizes.items()))

    def _loader(self, size: tuple[int, int]) -> pipeline.LoaderSize:
        host_bytes = self.batch // jax.process_count() * self.views.frames * size[0] * size[1] * 3
        return feed.loader_size(self.config, host_bytes, "evaluate.batch_videos")

    def run(self, params: Any) -> Found:
        """The scores of all key frames; those that cannot be decoded are left out and named."""
        params = sharding.replicate(params, self.mesh)
        scores: dict[int, np.ndarray] = {}
        failed: dict[str, str] = {}
        for size, places in self._sizes.items():
            self._run_size(params, size, places, scores, failed)
        everyone = hosts.gather(list(failed.items()))
        return Found(self.source, self.truth, scores, dict(item for theirs in everyone for item in theirs))

    def _run_size(
        self,
        params: Any,
        size: tuple[int, int],
        places: list[int],
        scores: dict[int, np.ndarray],
        failed: dict[str, str],
    ) -> None:
        source = self.source.select(places)
        view = detection_clips.KeyView(
            self.views.frames, self.views.stride, size, self.slots, len(self.truth.classes)
        )
        host, processes = jax.process_index(), jax.process_count()
        dataset = pipeline.once(source, view, self.batch, host=host, hosts=processes)
        loader = self._loader(size)
        ahead = feed.prefetch(
            dataset,
            source,
            self.batch // processes,
            self.mesh,
            workers=loader.workers,
            threads=loader.threads,
        )
        try:
            for batch, host_fields in ahead:
                values, index, weight = jax.device_get(self._run(params, batch))
                failed.update({source.ids[record]: reason for record, reason, _ in feed.failed(host_fields)})
                for row in np.flatnonzero(weight > 0):
                    place = places[index[row]]
                    scores[place] = values[row][: len(self.source.scenes[place].corners)]
        finally:
            ahead.close()


def write(workdir: Place, found: Found, config: Config, path: str) -> dict[str, Any]:
    """Writes evaluation.json, detections.csv (AVA's form) and classes.png; returns the first.

    Raises:
        UserError: key frames that cannot be decoded, unless allowed; scores that are not finite.
    """
    if found.failed and not config.evaluate.allow_failed:
        name, reason = next(iter(found.failed.items()))
        raise UserError(
            f"{len(found.failed)} of {len(found.source)} key frames cannot be decoded, the first is {name} "
            f"({reason}): mend or remove them, or report the others with "
            f"--config.evaluate.allow_failed=true"
        )
    lost = [place for place, scores in found.scores.items() if not np.isfinite(scores).all()]
    if lost:
        raise UserError(
            f"{path}: the scores of {len(lost)} key frames are not finite, the first is "
            f"{found.source.ids[lost[0]]}: these weights cannot be tested"
        )
    precisions = found.precisions()
    names = found.truth.classes
    result = {
        "mAP": detection.mean(precisions),
        "classes": {names[place]: value for place, value in precisions.items()},
        "key_frames": len(found.scores),
        "key_frames_failed": len(found.failed),
        "key_frames_not_prepared": found.truth.missing,
        "failed": dict(sorted(found.failed.items())),
        "boxes": "annotated" if found.source is found.truth else "detected",
        "checkpoint": path,
    }
    report.say(
        f"test of {path}: mAP {result['mAP']:.2%}, {result['boxes']} boxes of {len(found.scores)} key frames"
    )
    if hosts.is_writer():
        workdir.mkdir(parents=True, exist_ok=True)
        report.write_json(workdir / "evaluation.json", result)
        with storage.output(workdir / "detections.csv") as place, place.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows_of(found))
        with storage.output(workdir / "classes.png") as picture:
            annotate.draw_precisions(result["classes"]).save(picture)
    return result


def rows_of(found: Found) -> Iterator[tuple[str, ...]]:
    """All detections as AVA has them: video, time, left, top, right, bottom, action, score."""
    numbers = found.truth.numbers
    for place, scores in sorted(found.scores.items()):
        video, _, milliseconds = found.source.ids[place].rpartition(",")
        scene, time = found.source.scenes[place], f"{int(milliseconds) / 1000:.10g}"
        for corners, sure, each in zip(scene.corners, scene.scores, scores, strict=True):
            box = tuple(f"{x:.5f}" for x in corners)
            for number, score in zip(numbers, each * sure, strict=True):
                yield (video, time, *box, str(number), f"{score:.5f}")
