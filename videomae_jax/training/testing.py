"""Outputs of a model for every video of a source, each counted once whatever the batches and hosts."""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from videomae_jax import hosts, sharding
from videomae_jax.config import Config
from videomae_jax.data import pipeline
from videomae_jax.data.sources import Source
from videomae_jax.evaluation.classification import Scores, merge_views
from videomae_jax.training import feed

Views = pipeline.TestViews | pipeline.ValidationClip
Model = Callable[[Any, UInt8[Array, "B T H W C"]], Float[Array, "B ..."]]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model says of each view of each video that could be decoded.

    Attributes:
        records: place in the source, ascending, each once.
        values: float32 [B, V, ...].
        failed: id -> why it could not be decoded; of one batch, of this host's videos only.
        num_failed: how many in all.
        short: ids of videos shorter than a clip, whose last frame is repeated; likewise.
    """

    records: np.ndarray
    values: np.ndarray
    failed: dict[str, str]
    num_failed: int
    short: list[str]

    def scores(self, source: Source, head: str) -> Scores:
        """Views merged, beside the truth."""
        targets = np.asarray(source.targets, np.float64).reshape(len(source), -1)
        labels = np.asarray(source.labels)
        merged = merge_views(self.values, head)
        return Scores(self.records, merged, labels[self.records], targets[self.records])


class Evaluator:
    """Runs `model` on every view of every video of a source; compiled once, whatever the parameters.

    Args:
        model: (params, uint8 clips [B, T, H, W, C]) -> [B, ...].
        views: what of each video is looked at.
    """

    def __init__(self, model: Model, source: Source, views: Views, config: Config, mesh: Mesh):
        self.source, self.views, self.mesh = source, views, mesh
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_videos = -(-config.evaluate.batch_videos // parts) * parts
        frames, size, views_each = views.frames, views.size, views.clips_per_video
        host_bytes = self.batch_videos // jax.process_count() * views_each * frames * size[0] * size[1] * 3
        self.loader = feed.loader_size(config, host_bytes, "evaluate.batch_videos")
        outputs = sharding.replicated(mesh)

        def of_views(params: Any, video: jax.Array) -> jax.Array:
            # View by view: the memory of one clip per video, however many views there are.
            values = jax.lax.map(lambda view: model(params, view), jnp.moveaxis(video, 1, 0))
            return jnp.moveaxis(values, 0, 1)

        mapped = sharding.by_rows(of_views, mesh)

        def run(params: Any, video: jax.Array, index: jax.Array, weight: jax.Array):
            return mapped(params, video), index, weight

        self._run = jax.jit(run, out_shardings=(outputs, outputs, outputs))

    def run(self, params: Any) -> Outputs:
        """All outputs; videos that cannot be decoded are left out and named."""
        parts = list(self.batches(params))
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("records", "values")}
        ours = [[list(part.failed.items()), part.short] for part in parts]
        everyone = [part for theirs in hosts.gather(ours) for part in theirs]
        return Outputs(
            **joined,
            failed={video: reason for failed, _ in everyone for video, reason in failed},
            num_failed=sum(part.num_failed for part in parts),
            short=[video for _, short in everyone for video in short],
        )

    def batches(self, params: Any, start: int = 0) -> Generator[Outputs]:
        """The outputs of one batch of `batch_videos` videos after the other, from batch `start` on."""
        dataset = pipeline.once(
            self.source,
            self.views,
            self.batch_videos,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        host_videos = self.batch_videos // jax.process_count()
        params = sharding.replicate(params, self.mesh)  # whole, if training cuts them
        sizes = {"workers": self.loader.workers, "threads": self.loader.threads}
        ahead = feed.prefetch(
            dataset[start * host_videos :], self.source, host_videos, self.mesh, by_video=True, **sizes
        )
        before = None  # fetched when the next batch is under way
        try:
            for batch, host_fields in ahead:
                done = self._run(params, batch["video"], batch["index"], batch["weight"])
                if before:
                    yield self._fetch(*before)
                before = (done, host_fields)
            if before:
                yield self._fetch(*before)
        finally:
            ahead.close()

    def _fetch(self, done: Any, host_fields: dict[str, np.ndarray]) -> Outputs:
        values, index, weight = jax.device_get(done)
        failed, short = {}, []
        of_clip, stride = self.views.frames, self.views.stride
        needed = (of_clip - 1) * stride + 1 if stride else of_clip
        for record, error, frames in zip(
            *(host_fields[name] for name in ("record", "error", "num_frames")), strict=True
        ):
            if error:
                failed[self.source.ids[record]] = str(error)
            elif record >= 0 and frames < needed:
                short.append(self.source.ids[record])
        # The rows of a host follow one another in a batch: by index they are in the source's order.
        good = np.flatnonzero(weight > 0)
        good = good[np.argsort(index[good])]
        num_failed = int(np.sum((weight == 0) & (index < len(self.source))))
        return Outputs(index[good].astype(np.int64), values[good], failed, num_failed, short)
