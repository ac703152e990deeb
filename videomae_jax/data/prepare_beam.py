"""The work of `prepare` as an Apache Beam pipeline: one element per shard, the same bytes as without it.

Needs the extra `[beam]`, which pins older libraries than JAX's: give it an environment of its own. All
workers see the folder and the videos by the same paths.
"""

from collections.abc import Sequence
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

from videomae_jax.data import prepare


def write(job: prepare.Job, number: int) -> None:
    """Writes shard `number` of the whole work, its videos one after the other."""
    shard = job.shards()[number]
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
    every = job.shards()
    pending = set(prepare.pending(job))
    left = [number for number, shard in enumerate(every) if shard in pending]
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbers = pipeline | beam.Create(left) | beam.Reshuffle()
        numbers | beam.Map(lambda number: write(job, number))  # pyright: ignore[reportUnusedExpression]
    return prepare.finish(job, max_failed)
