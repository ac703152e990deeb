"""Own videos: a folder (divided or not, classes or not), or a CSV list."""

import re

from etils import epath

from videomae_jax.data import prepared, sources
from videomae_jax.data.collection import Collection, Entry


def video_folder(source: epath.Path, videos: epath.Path, head: str, allow_missing: bool) -> Collection:
    """The splits of a folder, or a list, which is all "train"; ids are relative paths.

    Args:
        videos: where relative paths of a list start; the list itself: at its folder.

    Raises:
        SourceError: nothing to read, or splits with different classes.
    """
    path = str(source)
    names = [split for split in ("train", "validation", "test") if prepared.has_split(path, split)]
    root = str(videos) if videos != source else ""
    found = {
        split: prepared.open_source(path, split, head, root, allow_missing) for split in names or ["train"]
    }
    if any(not isinstance(split, sources.VideoSource) for split in found.values()):
        raise sources.SourceError(f"{path} is prepared already")
    for split in found.values():
        for note in split.notes:
            print(note, flush=True)
    classes = max((split.classes for split in found.values()), key=len)
    splits = {}
    for name, split in found.items():
        unknown = sorted(set(split.classes) - set(classes))
        if unknown:
            raise sources.SourceError(f"{path}: class {unknown[0]} of {name} is not a class of the others")
        split = sources.relabel(split, classes)
        splits[name] = [
            Entry(video, str(split[i]["video"]), label, target=split.targets[i] if split.targets else ())
            for i, (video, label) in enumerate(zip(split.ids, split.labels, strict=True))
        ]
    name = re.sub(r"\W+", "_", source.stem).strip("_").lower()
    absent = {name: split.absent for name, split in found.items() if split.absent}
    name = name if name[:1].isalpha() else f"videos_{name}"
    return Collection(name, splits, classes, absent=absent, head=head)
