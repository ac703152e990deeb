"""The work of `prepare` as an Apache Beam pipeline: one element per shard, the same bytes as without it.

Needs the extra `[beam]`, which pins older libraries than JAX's: give it an environment of its own. All
workers see the folder and the videos by the same paths. What a shard is made of lies in the folder: the
pipeline itself holds their number only, and is as small for ten million videos as for ten.
"""

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

from videomae_jax import storage
from videomae_jax.data import prepare
from videomae_jax.storage import Place


def _place(job: prepare.Job, number: int) -> Place:
    return job.work() / f"beam-{number:06d}.pickle"


def write(job: prepare.Job, number: int) -> None:
    """Writes the shard `number` of those that were left, its videos one after the other."""
    shard: prepare.Shard = pickle.loads(_place(job, number).read_bytes())
    prepare.write_shard(job, shard, (prepare.encode(entry, job.form) for entry in shard.entries))


def run(
    job: prepare.Job, options: Sequence[str], *, max_failed: float = 1.0, retry_failed: bool = False
) -> dict[str, Any]:
    """Prepares a collection on the runner that `options` name (--runner=...); returns the manifest.

    Raises:
        PrepareError: see `prepare.claim` and `prepare.finish`.
    """
    prepare.claim(job)
    manifest = prepare.finished(job, retry_failed)
    if manifest is not None:
        return manifest
    left = prepare.pending(job)
    for number, shard in enumerate(left):
        with storage.output(_place(job, number)) as path:
            path.write_bytes(pickle.dumps(shard))
    bare = dataclasses.replace(job, collection=dataclasses.replace(job.collection, splits={}, absent={}))
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbers = (
            pipeline
            | beam.Create([len(left)])
            | beam.FlatMap(lambda count: iter(range(count)))
            | beam.Reshuffle()
        )
        numbers | beam.Map(lambda number: write(bare, number))  # pyright: ignore[reportUnusedExpression]
    return prepare.finish(job, max_failed)
