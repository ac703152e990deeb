"""Own videos: a folder (divided or not, classes or not), or a CSV list."""

import re

from etils import epath

from videomae_jax.data import prepared, sources
from videomae_jax.data.collection import Collection, Entry


def video_folder(source: epath.Path, _videos: epath.Path) -> Collection:
    """The splits of a folder, or a list, which is all "train"; ids are relative paths.

    Raises:
        SourceError: nothing to read, or splits with different classes.
    """
    path = str(source)
    names = [split for split in ("train", "validation", "test") if prepared.has_split(path, split)]
    found = {split: prepared.open_source(path, split) for split in names or ["train"]}
    if any(not isinstance(split, sources.VideoSource) for split in found.values()):
        raise sources.SourceError(f"{path} is prepared already")
    classes = max((split.classes for split in found.values()), key=len)
    splits = {}
    for name, split in found.items():
        unknown = sorted(set(split.classes) - set(classes))
        if unknown:
            raise sources.SourceError(f"{path}: class {unknown[0]} of {name} is not a class of the others")
        splits[name] = [
            Entry(
                video,
                str(sources.join(split.root, video)),
                label,
            )
            for video, label in zip(split.ids, _labels(split, classes), strict=True)
        ]
    name = re.sub(r"\W+", "_", source.stem).strip("_").lower()
    return Collection(name if name[:1].isalpha() else f"videos_{name}", splits, classes)


def _labels(split: sources.Source, classes: tuple[str, ...]) -> list[int]:
    """Labels among all classes; a split's own count only the classes that it has."""
    return [classes.index(split.classes[label]) if label >= 0 else -1 for label in split.labels]
