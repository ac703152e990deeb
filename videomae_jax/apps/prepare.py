"""The command `prepare`: a collection of videos to a prepared data set, here or on many machines."""

import dataclasses
import re
import shlex

from etils import epath

from videomae_jax import storage
from videomae_jax.config import UserError
from videomae_jax.data import prepare, prepared, transcode
from videomae_jax.data.builders import BUILDERS, video_folder
from videomae_jax.data.processes import usable_cores
from videomae_jax.data.sources import HEADS


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of the command, as they were given; the command line describes them."""

    dataset: str = "video_folder"
    videos: str = ""
    codec: str = "jpeg"
    short_side: int = 256
    shard_videos: int = 256
    processes: int = 0
    head: str = "softmax"
    part: str = ""
    finish: bool = False
    check: bool = False
    allow_missing: bool = False
    max_failed: float = 0.1
    retry_failed: bool = False
    beam_options: str = ""


def run(source: str, folder: str, options: Options) -> None:
    """Prepares `source` into `folder` and says how it went.

    Raises:
        UserError: options that make no sense, or a damaged folder (`check`).
        SourceError: `source` cannot be read or does not fit the data set.
        PrepareError: the work cannot go on.
    """
    if options.check:
        _check(folder)
        return
    if not 0 <= options.max_failed <= 1:
        raise UserError(f"--max_failed={options.max_failed} must be a share, from 0 to 1")
    job = _job(source, folder, options)
    part = _part(options.part)
    processes = options.processes or usable_cores()
    how = {"max_failed": options.max_failed, "retry_failed": options.retry_failed}
    prepare.claim(job)
    if options.dataset == "boxes":  # before the manifest: a finished folder has its lists
        for file in epath.Path(source).iterdir():
            if re.fullmatch(r"(excluded|detected)_\w+\.(csv|json|pkl)|scored\.csv|.*min\.json", file.name):
                with storage.output(storage.at(folder) / file.name) as path:
                    path.write_bytes(file.read_bytes())
    if options.finish:
        manifest = prepare.finished(job, options.retry_failed) or prepare.finish(job, options.max_failed)
    elif options.beam_options:
        from videomae_jax.data import prepare_beam  # Beam has an environment of its own

        manifest = prepare_beam.run(job, shlex.split(options.beam_options), **how)
    else:
        videos = sum(map(len, job.collection.splits.values()))
        print(
            f"{videos} videos, {job.form.codec}, short side {job.form.short_side}, {processes} processes",
            flush=True,
        )
        manifest = prepare.run(job, processes, part, **how)
    if manifest is None:
        print(f"part {options.part} of {folder} is written; --finish ends the work when all parts are")
        return
    for failure in manifest["failed"]:
        print(f"left out: {failure['reason']}")
    counts = ", ".join(f"{split} {found['records']}" for split, found in manifest["splits"].items())
    print(
        f"{folder}: {manifest['records']} videos ({counts}), {manifest['bytes'] / 1e6:.1f} MB, "
        f"{len(manifest['failed'])} failed, {len(manifest['absent'])} absent, hash {manifest['hash'][:16]}"
    )


def _job(source: str, folder: str, options: Options) -> prepare.Job:
    if options.dataset not in (known := ("video_folder", *BUILDERS)):
        raise UserError(f"--dataset={options.dataset} is unknown: use {', '.join(known)}")
    if options.codec not in transcode.CODECS:
        raise UserError(f"--codec={options.codec} is unknown: use {', '.join(transcode.CODECS)}")
    for name in ("short_side", "shard_videos"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)} must be positive")
    where = epath.Path(source)
    if not where.exists():
        raise UserError(f"{source} does not exist: pass a folder of videos, a list, or annotation files")
    if options.head not in HEADS:
        raise UserError(f"--head={options.head} is unknown: use {', '.join(HEADS)}")
    videos = epath.Path(options.videos or source)
    if options.dataset == "video_folder":
        collection = video_folder(where, videos, options.head, options.allow_missing)
    elif options.head != "softmax":
        raise UserError(
            f"--head={options.head} is for lists of one's own, not for --dataset={options.dataset}"
        )
    elif options.dataset == "boxes" and options.videos:
        raise UserError("--dataset=boxes finds its videos in FOLDER/videos: leave --videos out")
    else:
        collection = BUILDERS[options.dataset](where, videos)
    form = transcode.Form(options.codec, options.short_side)
    path = str(storage.at(folder))
    return prepare.Job(collection.checked(options.allow_missing), path, form, options.shard_videos)


def _part(text: str) -> tuple[int, int]:
    if not text:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--part={text} is not understood: use I/N with I from 0 to N - 1")
    return int(match[1]), int(match[2])


def _check(folder: str) -> None:
    faults = 0
    for fault in prepared.damage(folder):
        print(fault, flush=True)
        faults += 1
    if faults:
        raise UserError(f"{folder} is damaged in {faults} places: prepare it again")
    manifest = prepared.read_manifest(folder)
    print(f"{folder}: all {manifest['records']} records are as written, hash {manifest['hash'][:16]}")
