"""The videos that a command is given: files, folders, lists, prepared data; all parts of them or one."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from concurrent import futures

from etils import epath

from videomae_jax import storage
from videomae_jax.config import UserError
from videomae_jax.data import decode, prepared, reading, sources
from videomae_jax.data.reading import AnyVideo
from videomae_jax.data.sources import Record, Source
from videomae_jax.storage import Place

SPLITS = ("train", "validation", "test")
_ASKED_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Named:
    """A video of a source, under a name that no other one has."""

    name: str
    source: Source
    index: int

    def record(self) -> Record:
        """The video."""
        return self.source[self.index]

    def open(self) -> AnyVideo:
        """The open video.

        Raises:
            DecodeError: it cannot be opened.
        """
        record = self.record()
        if record["error"]:
            raise decode.DecodeError(record["error"])
        return reading.open_video(record["video"], record["name"])

    def identity(self) -> str:
        """A hash of the name, and of the file's place, size and time (of a prepared one, of its content)."""
        facts: list[object] = [self.name]
        record = self.record()
        if isinstance(record["video"], str):
            path = record["video"]
            facts.append(path)
            facts += stamp(path)
        elif isinstance(record["video"], bytes):
            facts.append(hashlib.sha256(record["video"]).hexdigest())
        else:
            facts.append(record["video"].digest())
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def stamp(path: str) -> list[list[int]]:
    """Size and time of a file, or of a folder and what it holds; of a folder in a store, nothing."""
    if storage.is_remote(path):
        place = epath.Path(path)
        if not place.is_file():
            return []
        stat = place.stat()
        return [[stat.length, int(stat.mtime or 0)]]
    inside = sorted(entry.path for entry in os.scandir(path)) if os.path.isdir(path) else []
    stats = [os.stat(place) for place in (path, *inside) if os.path.exists(place)]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def stamps(source: Source) -> list[list[list[int]]]:
    """`stamp` of every file of a source, or of its folder where it is prepared."""
    if not isinstance(source, sources.VideoSource):
        return [stamp(str(source.root))]
    paths = [str(sources.join(source.root, name)) for name in source.ids]
    with futures.ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:  # a store answers after 10 to 50 ms
        return list(pool.map(stamp, paths))


def find(paths: Sequence[str], split: str) -> list[Named]:
    """The videos of one file, folder, list or prepared data set after the other; says what is left out.

    Names are those of the sources, after `split/` where a folder is divided, and after the path where there
    are several.

    Args:
        split: the part of what is divided: train, validation, test; all.

    Raises:
        UserError: an unknown split, or one that is not there.
        SourceError: nothing to read.
    """
    if split not in (*SPLITS, "all"):
        raise UserError(f"--split={split} is unknown: use {', '.join(SPLITS)} or all")
    found = []
    for path in paths:
        folder = os.path.dirname(path) if _is_video(path) else path
        prefix = f"{folder}/" if len(paths) > 1 and folder else ""
        for part, source in _sources(path, split).items():
            for note in source.notes:
                print(note, flush=True)
            names = [f"{prefix}{part}{name}" for name in source.ids]
            found += [Named(name, source, index) for index, name in enumerate(names)]
    repeated = {video.name for video in found} if len({video.name for video in found}) < len(found) else ()
    if repeated:
        raise UserError(f"{', '.join(paths)} name a video twice: pass each once")
    return found


def _is_video(path: str) -> bool:
    return pathlib.PurePath(path).suffix.lower() in sources.SUFFIXES and epath.Path(path).is_file()


def _sources(path: str, split: str) -> dict[str, Source]:
    """The sources of a path, by what their names begin with."""
    if _is_video(path):
        folder, name = os.path.split(path)
        return {"": sources.VideoSource(folder or ".", (name,), (-1,))}
    there = [part for part in SPLITS if prepared.has_split(path, part)]
    if not there:
        if split != "all":
            raise UserError(f"{path} is not divided: leave --split={split} out")
        return {"": prepared.open_source(path, "train", head="")}
    wanted = there if split == "all" else [split]
    if not set(wanted) <= set(there):
        raise UserError(f"{path} has no part {split}: it has {', '.join(there)}")
    return {
        f"{part}/" if len(wanted) > 1 else "": prepared.open_source(path, part, head="") for part in wanted
    }


def make_room(target: Place, inputs: Sequence[str] = ()) -> None:
    """Makes the folder of a file that will be written, and sees that it can be.

    Raises:
        UserError: it cannot, or it is one of `inputs`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except Exception as error:  # each store's client has its own
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out={target} cannot be written ({reason}): choose another") from None
    if target.is_dir():
        raise UserError(f"--out={target} is a folder: name a file")
    if any(
        os.path.exists(path) and os.path.exists(target) and os.path.samefile(path, target) for path in inputs
    ):
        raise UserError(f"--out={target} is what is read: name another file")
