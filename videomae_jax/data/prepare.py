"""Videos to ArrayRecord shards that TFDS opens: verified, shrunk, re-encoded; resumable, in parts.

The work is cut into shards before it begins, each a fixed run of videos, so that whoever writes a shard
(this process, another machine with `part`, an Apache Beam worker) writes the same bytes. A shard and its
report appear by renaming, and a rerun skips them. `finish` makes TFDS's metadata of the reports, the table
of records and, last of all, the manifest: a folder without one is not finished.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from videomae_jax import storage
from videomae_jax.data import (
    decode,
    images,
    index,
    prepared,
    processes,
    ranges,
    reading,
    records,
    scenes,
    transcode,
)
from videomae_jax.data.collection import Collection, Entry
from videomae_jax.storage import PARTIAL, Place

_SETTINGS = "prepare.json"


class PrepareError(ValueError):
    """Preparation cannot go on; the text says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A run of videos of one split that is written as one file."""

    split: str
    number: int
    total: int
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of a prepared folder.

    Attributes:
        folder: to write; in a store (gs://) shards are made here and copied there.
        shard_videos: videos per shard, before those that cannot be decoded are left out.
    """

    collection: Collection
    folder: str
    form: transcode.Form
    shard_videos: int

    def shards(self) -> list[Shard]:
        """The whole work, in order."""
        found = []
        for split, entries in self.collection.splits.items():
            runs = [
                tuple(entries[start : start + self.shard_videos])
                for start in range(0, len(entries), self.shard_videos)
            ]
            found += [Shard(split, number, len(runs), run) for number, run in enumerate(runs)]
        return found

    def path(self, shard: Shard) -> Place:
        """The file of a shard."""
        name = prepared.shard_name(self.collection.name, shard.split, shard.number, shard.total)
        return storage.at(self.folder) / name

    def report(self, shard: Shard) -> Place:
        """What is known of a written shard: a line per record, and the failures. The last file it gets."""
        return self.work() / f"{shard.split}-{shard.number:05d}.json"

    def work(self) -> Place:
        """The folder of what is needed until the work is finished."""
        return storage.at(self.folder) / ".reports"

    def settings(self) -> dict[str, Any]:
        """What must be the same for a rerun."""
        form = dataclasses.asdict(self.form)
        return {
            # Of other forms a folder is what it was in format 2, and can be gone on with.
            "format": prepared.FORMAT if self.form.codec == "jpeg" else 2,
            "name": self.collection.name,
            **form,
            "shard_videos": self.shard_videos,
            "videos": self.collection.fingerprint(),
        }


def claim(job: Job) -> None:
    """Makes the folder this job's, or checks that it already is.

    Raises:
        PrepareError: it holds something else, or the work of other settings or videos.
    """
    folder = storage.at(job.folder)
    if folder.exists() and not folder.is_dir():
        raise PrepareError(f"{folder} is a file: name a folder to prepare into")
    folder.mkdir(parents=True, exist_ok=True)
    path, ours = folder / _SETTINGS, job.settings()
    others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(PARTIAL)]
    if path.exists():  # asked last: another part may have written it just now
        theirs = json.loads(path.read_text())
        if theirs.get("format", 0) > prepared.FORMAT:
            raise PrepareError(
                f"{folder} has format {theirs['format']}, this version writes {prepared.FORMAT}: update "
                f"videomae_jax, or use another folder"
            )
        changed = [f"{key}: {theirs.get(key)} -> {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
        if changed:
            raise PrepareError(
                f"{folder} holds a data set prepared otherwise ({'; '.join(changed)}): use another folder, "
                f"or the old settings to go on with it"
            )
        return
    if others:
        raise PrepareError(f"{folder} holds something else ({min(others)}): use an empty folder")
    _write(path, json.dumps(ours, indent=1))


def _write(path: Place, text: str) -> None:
    storage.write_text(path, text, writer=uuid.uuid4().hex)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a video is not stored; `is_final`: it cannot be decoded, rather than not be read just then."""

    reason: str
    is_final: bool


def encode(entry: Entry, form: transcode.Form) -> transcode.Encoded | Failure:
    """The stored form of a video, or why there is none."""
    start, end = entry.seconds or (None, None)
    try:
        return reading.patiently(lambda: transcode.transcode(entry.path, form, start, end))
    except decode.DecodeError as error:
        return Failure(str(error), is_final=not isinstance(error, decode.ReadError))


def write_shard(job: Job, shard: Shard, videos: Iterator[transcode.Encoded | Failure]) -> None:
    """Writes one shard and its report; `videos` are those of its entries, in order.

    Raises:
        PrepareError: the disk is full.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    features = records.features(job.collection)
    rows, failed, written = [], [], []
    try:
        with storage.output(job.path(shard), writer=uuid.uuid4().hex) as path:
            # Videos do not compress further; groups of one are what random access needs.
            writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for entry, video in zip(shard.entries, videos, strict=True):
                if isinstance(video, Failure):
                    about = {"split": shard.split, "id": entry.id, "shard": shard.number}
                    failed.append(about | vars(video))
                    continue
                data = records.serialize(features, job.collection, entry, video)
                writer.write(data)
                row = {"split": shard.split, "shard": shard.number, "position": len(rows), "id": entry.id}
                row |= {"label": entry.label, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                row |= {name: getattr(video, name) for name in ("frames", "fps", "height", "width", "early")}
                row["target"] = ";".join(map(repr, entry.target))
                rows.append(row | {"source_sha256": video.source_sha256})
                digest = hashlib.sha256(video.video).digest()
                written.append(ranges.Written(video.video[:64], len(video.video), digest, len(data)))
            writer.close()
            if job.form.codec == "jpeg":
                for row, value, place in zip(rows, written, ranges.places(str(path), written), strict=True):
                    row |= {"place": place, "length": value.length, "check": images.check_of(value.begin)}
        _write(job.report(shard), json.dumps({"rows": rows, "failed": failed}))
    except (RuntimeError, OSError) as error:  # the writer is C++ and has one type for all
        if "No space left" in str(error):
            raise PrepareError(
                f"no space left in {job.folder}: free some, then the same command goes on where it ended"
            ) from None
        raise


def pending(job: Job, part: int = 0, parts: int = 1) -> list[Shard]:
    """The shards of a part that are still to be written."""
    shards = job.shards()[part::parts]
    return [shard for shard in shards if not (job.report(shard).exists() and job.path(shard).exists())]


def write(job: Job, shards: Sequence[Shard], encoders: int) -> None:
    """Writes shards, their videos encoded by `encoders` processes; memory holds a few videos for each.

    Raises:
        PrepareError: the disk is full, or a process was killed.
    """
    entries = [entry for shard in shards for entry in shard.entries]
    # Spawned, not forked: libav and TFDS run threads.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(encoders, context, _start_encoder, (os.getpid(),)) as pool,
        tqdm.tqdm(total=len(entries), unit="video", smoothing=0.02, disable=None) as bar,
    ):
        try:
            videos = _encoded(pool, entries, job.form, 2 * encoders, bar)
            for shard in shards:
                write_shard(job, shard, (next(videos) for _ in shard.entries))
        except BrokenProcessPool:
            raise PrepareError(
                "a worker process was killed, perhaps for want of memory: the same command goes on where it "
                "ended; fewer processes (--processes) need less memory"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _encoded(
    pool: concurrent.futures.Executor, entries: Sequence[Entry], form: transcode.Form, ahead: int, bar: Any
) -> Iterator[transcode.Encoded | Failure]:
    """Encoded videos in order, at most `ahead` of them in memory."""
    waiting: collections.deque = collections.deque()
    for entry in entries:
        waiting.append(pool.submit(encode, entry, form))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
            bar.update()
    while waiting:
        yield waiting.popleft().result()
        bar.update()


def _start_encoder(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    processes.die_with_parent(parent)


def _report(job: Job, shard: Shard) -> dict[str, Any]:
    return json.loads(job.report(shard).read_text())


def _rows(job: Job, split: str = "") -> Iterator[dict[str, Any]]:
    """A line for each record, of one split or all; read again each time, for there may be millions."""
    for shard in job.shards():
        if split in ("", shard.split):
            yield from _report(job, shard)["rows"]


class _Sums:
    """What the records of a split come to, in all and by shard."""

    def __init__(self, job: Job, split: str):
        self.lengths = [len(_report(job, shard)["rows"]) for shard in job.shards() if shard.split == split]
        self.records = sum(self.lengths)
        self.bytes = self.frames = self.short_side = 0
        for row in _rows(job, split):
            self.bytes, self.frames = self.bytes + row["bytes"], self.frames + row["frames"]
            self.short_side = max(self.short_side, min(row["height"], row["width"]))


def finish(job: Job, max_failed: float = 1.0) -> dict[str, Any]:
    """Metadata, table and manifest of a folder whose shards are all written; returns the manifest.

    Args:
        max_failed: share of the videos that may be left out.

    Raises:
        PrepareError: shards are missing, or too many videos were left out; those that could not be read are
            then tried again by the next run.
    """
    left = pending(job)
    if left:
        raise PrepareError(
            f"{len(left)} of {len(job.shards())} shards are not written yet, the first is "
            f"{job.path(left[0]).name}: run the parts that lack"
        )
    failed = [line for shard in job.shards() for line in _report(job, shard)["failed"]]
    splits = {split: _Sums(job, split) for split in job.collection.splits}
    count = sum(part.records for part in splits.values())
    if not count:
        _clear(job)
        raise PrepareError(f"none of {len(failed)} videos can be decoded, the first: {failed[0]['reason']}")
    _check_failed(job, failed, count + len(failed), max_failed)
    for shard in job.shards():
        prepared.check_shard(job.path(shard), splits[shard.split].lengths[shard.number])
    sizes = {split: (part.lengths, part.bytes) for split, part in splits.items()}
    records.write_metadata(job.collection, job.folder, sizes)
    folder = storage.at(job.folder)
    with storage.output(folder / prepared.RECORDS) as path, path.open("w", newline="") as file:
        table = csv.DictWriter(file, prepared.COLUMNS)
        table.writeheader()
        table.writerows(_rows(job))
    for split in splits:
        index.write(folder, split, index.make(_rows(job, split)))
    for name, text in scenes.lists(job.collection).items():
        _write(folder / name, text)
    manifest = _manifest(job, splits, failed)
    manifest["hash"] = prepared.records_hash(_rows(job), manifest)
    _write(folder / prepared.MANIFEST, json.dumps(manifest, indent=1))
    _tidy(job)
    return manifest


def _check_failed(job: Job, failed: list[dict[str, Any]], videos: int, max_failed: float) -> None:
    """Refuses too many failures; those that may not be final are forgotten, so the next run tries them."""
    share = len(failed) / videos
    if share > max_failed:
        again = sum(not failure["is_final"] for failure in failed)
        _forget(job, failed)
        retried = f"the same command tries the {again} again that could not be read; " if again else ""
        raise PrepareError(
            f"{len(failed)} of {videos} videos failed, the first: {failed[0]['reason']}; "
            f"{retried}--max_failed={_round_up(share)} finishes without them (now {max_failed})"
        )


def _manifest(job: Job, splits: dict[str, _Sums], failed: list[dict[str, Any]]) -> dict[str, Any]:
    """What a folder holds and how it was made, but for its hash."""
    absent = [{"split": split, "id": video} for split, ids in job.collection.absent.items() for video in ids]
    return {
        **job.settings(),
        "records": sum(part.records for part in splits.values()),
        "frames": sum(part.frames for part in splits.values()),
        "bytes": sum(part.bytes for part in splits.values()),
        "largest_short_side": max(part.short_side for part in splits.values()),
        "splits": {
            split: {"records": part.records, "shard_lengths": part.lengths} for split, part in splits.items()
        },
        "classes": list(job.collection.classes),
        "head": job.collection.head,
        "features": records.describe(job.collection),
        "failed": failed,
        "absent": absent,
    }


def _round_up(share: float) -> float:
    return min(int(share * 100 + 1) / 100, 1.0)


def _clear(job: Job) -> None:
    """Takes back what was written of a data set without any video: it may be begun otherwise."""
    storage.remove_tree(job.work())
    for file in (*map(job.path, job.shards()), storage.at(job.folder) / _SETTINGS):
        file.unlink(missing_ok=True)


def _forget(job: Job, failed: list[dict[str, Any]], final_too: bool = False) -> None:
    """Has the shards written again of which videos could not be read, or not be decoded either."""
    again = {(f["split"], f["shard"]) for f in failed if final_too or not f["is_final"]}
    for shard in job.shards():
        if (shard.split, shard.number) in again:
            job.report(shard).unlink(missing_ok=True)


def finished(job: Job, retry_failed: bool = False, is_part: bool = False) -> dict[str, Any] | None:
    """The manifest of a folder that needs no more work.

    One whose videos could not all be read needs some: its shards with such videos are written again.

    Args:
        retry_failed: likewise for videos that could not be decoded.
        is_part: others may be at work on it at the same time.

    Raises:
        PrepareError: it needs work that one process alone can begin.
    """
    if not prepared.is_prepared(job.folder):
        return None
    manifest = prepared.read_manifest(job.folder)
    # A folder of format 1 has no way to tell, nor is it written again by this version.
    failed = manifest["failed"] if manifest["format"] > 1 else []
    again = sum(retry_failed or not failure["is_final"] for failure in failed)
    if again and is_part:
        raise PrepareError(
            f"{job.folder} is finished but for {again} videos: leave out --part, one process tries them again"
        )
    if again:
        reports = {(shard.split, shard.number): {"rows": [], "failed": []} for shard in job.shards()}
        for row in prepared.read_rows(job.folder):
            reports[row["split"], int(row["shard"])]["rows"].append(_typed(row))
        for failure in failed:
            reports[failure["split"], failure["shard"]]["failed"].append(failure)
        for shard in job.shards():
            _write(job.report(shard), json.dumps(reports[shard.split, shard.number]))
        (storage.at(job.folder) / prepared.MANIFEST).unlink()
        _forget(job, failed, retry_failed)
        return None
    _tidy(job)  # the run that finished it may have been killed just then
    return manifest


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """A line of the table of records as its report has it."""
    names = ("shard", "position", "label", "bytes", "frames", "height", "width", "place", "length", "check")
    numbers = {name: int(row[name]) for name in names if row.get(name)}
    return row | numbers | {"fps": float(row["fps"])}


def _tidy(job: Job) -> None:
    storage.remove_tree(job.work())
    for left_over in storage.at(job.folder).glob(f"{PARTIAL}*"):
        left_over.unlink(missing_ok=True)


def run(
    job: Job,
    encoders: int,
    part: tuple[int, int] = (0, 1),
    *,
    max_failed: float = 1.0,
    retry_failed: bool = False,
) -> dict[str, Any] | None:
    """Prepares a collection, or a part (i, n) of it; returns the manifest once the folder is finished.

    Args:
        max_failed, retry_failed: see `finish` and `finished`.

    Raises:
        PrepareError: see `claim`, `write` and `finish`.
    """
    claim(job)
    manifest = finished(job, retry_failed, is_part=part[1] > 1)
    if manifest is not None:
        return manifest
    if retry_failed:  # also before the folder was ever finished
        for shard in job.shards()[part[0] :: part[1]]:
            if job.report(shard).exists() and _report(job, shard)["failed"]:
                job.report(shard).unlink()
    shards = pending(job, *part)
    if shards:
        write(job, shards, encoders)
    return finish(job, max_failed) if part[1] == 1 else None
