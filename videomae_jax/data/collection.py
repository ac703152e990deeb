"""What `prepare` takes: videos by split, with ids, labels and class names."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from videomae_jax.data import sources
from videomae_jax.data.sources import SourceError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One video, or a part of one.

    Attributes:
        id: unique in its split; it names the record.
        path: of the file, or of a folder of frames.
        label: class, -1 where unknown.
        seconds: (start, end) of the part that is stored; None: all of it.
        extra: values of the collection's extra features, as JSON has them.
        target: of "multilabel" and "regression", what is predicted in place of a class.
    """

    id: str
    path: str
    label: int = -1
    seconds: tuple[float, float] | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Collection:
    """Named videos, in the order in which they are stored.

    Attributes:
        name: of the data set, as TFDS knows it.
        splits: split -> its videos.
        classes: names in label order; empty without labels. They name the targets of the other heads.
        extra: name -> (shape, dtype name) of features beside the usual ones; None: any length.
        absent: split -> ids that an annotation file names and no file was found for.
        head: "softmax", "multilabel" or "regression": see `lists.from_csv`.
    """

    name: str
    splits: Mapping[str, Sequence[Entry]]
    classes: tuple[str, ...] = ()
    extra: Mapping[str, tuple[tuple[int | None, ...], str]] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    head: str = "softmax"

    def fingerprint(self) -> str:
        """Hash of names, labels, order and extra values; not of the files' bytes or places."""
        total = hashlib.sha256(json.dumps([self.name, self.classes, dict(self.extra)]).encode())
        for split, entries in self.splits.items():
            total.update(f"\n{split}\n".encode())
            for entry in entries:
                line = [entry.id, entry.label, entry.seconds, dict(entry.extra), *entry.target]
                total.update(json.dumps(line).encode())
        return total.hexdigest()[:16]

    def checked(self, allow_missing: bool) -> "Collection":
        """This collection, if its ids are unique, its labels known, and no file absent (unless allowed).

        Raises:
            SourceError: it is not so; the text names the first culprit.
        """
        for split, entries in self.splits.items():
            seen: set[str] = set()
            for entry in entries:
                if entry.id in seen:
                    raise SourceError(f"{split}: the id {entry.id} is there twice: every video needs its own")
                seen.add(entry.id)
                if self.classes and not -1 <= entry.label < len(self.classes):
                    raise SourceError(
                        f"{split}: {entry.id} has label {entry.label}, of {len(self.classes)} classes"
                    )
        count = sum(map(len, self.absent.values()))
        named = count + sum(map(len, self.splits.values()))
        if count and not allow_missing:
            split, ids = next((split, ids) for split, ids in self.absent.items() if ids)
            raise SourceError(
                f"{count} of {named} videos are absent, the first is {ids[0]} ({split}): pass the folder "
                f"that holds them, or --allow_missing to prepare the others and list these in the manifest"
            )
        if count == named:
            raise SourceError(f"{self.name}: there is no video to prepare")
        return self


class VideoFinder:
    """Finds videos in a folder, however deep, by NAME or FOLDER/NAME, without suffix."""

    def __init__(self, folder: epath.Path):
        if not folder.is_dir():
            raise SourceError(f"{folder} is no folder of videos: pass the one that holds them with --videos")
        self._by_name: dict[str, list[epath.Path]] = {}
        for path in (folder / video for video in sources.videos_below(folder)):
            name = path.stem if path.suffix.lower() in sources.SUFFIXES else path.name
            for key in (name, f"{path.parent.name}/{name}"):
                self._by_name.setdefault(key, []).append(path)

    def parts(self) -> dict[str, list[tuple[int, int, str]]]:
        """Id of an original video -> (first second, last, name) of the parts that are called ID_START_END."""
        found: dict[str, list[tuple[int, int, str]]] = {}
        for name in sorted(self._by_name):
            if match := re.fullmatch(r"([^/]+)_(\d{6})_(\d{6})", name):
                found.setdefault(match[1], []).append((int(match[2]), int(match[3]), name))
        return found

    def entries(self, wanted: Iterable[tuple[Entry, Sequence[str]]]) -> tuple[list[Entry], list[str]]:
        """(entries whose file is there, with its path; ids of the others); each has its possible names.

        Raises:
            SourceError: two files have a wanted name.
        """
        found, absent = [], []
        for entry, names in wanted:
            paths = next((self._by_name[name] for name in names if name in self._by_name), [])
            if len(paths) > 1:
                raise SourceError(f"{paths[0]} and {paths[1]} have the same name: keep one of them")
            if paths:
                found.append(dataclasses.replace(entry, path=str(paths[0])))
            else:
                absent.append(entry.id)
        return found, absent


def find_file(folder: epath.Path, what: str, *names: str) -> epath.Path:
    """The first of the files `names` that is in a folder, or in a folder in it.

    Raises:
        SourceError: there is none.
    """
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())] if folder.is_dir() else []
    for name in names:
        for place in places:
            if (place / name).is_file():
                return place / name
    raise SourceError(f"{folder} holds no {what} ({' or '.join(names)}): pass the folder of annotation files")


def collect(
    name: str,
    splits: Mapping[str, Iterable[tuple[Entry, Sequence[str]]]],
    finder: VideoFinder,
    classes: tuple[str, ...],
    extra: Mapping[str, tuple[tuple[int | None, ...], str]] | None = None,
) -> Collection:
    """What annotation files name (entries and the names of their files) and a folder holds."""
    found = {split: finder.entries(wanted) for split, wanted in splits.items()}
    return Collection(
        name=name,
        splits={split: entries for split, (entries, _) in found.items()},
        classes=classes,
        extra=extra or {},
        absent={split: ids for split, (_, ids) in found.items()},
    )
