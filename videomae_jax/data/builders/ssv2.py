"""Something-Something V2 from its JSON files: labels, train, validation and (without labels) test."""

import json
from typing import Any

from etils import epath

from videomae_jax.data.collection import Collection, Entry, VideoFinder, collect, find_file
from videomae_jax.data.sources import SourceError

_CLASSES = 174


def ssv2(annotations: epath.Path, videos: epath.Path) -> Collection:
    """Videos ID.webm (or another container, or a folder of frames ID); labels by the official numbers.

    Raises:
        SourceError: annotation files of something else, or a label that they do not list.
    """
    numbers = {name: int(number) for name, number in _read(annotations, "labels").items()}
    if sorted(numbers.values()) != list(range(_CLASSES)):
        raise SourceError(
            f"{annotations} has {len(numbers)} classes, not the {_CLASSES} of Something-Something V2"
        )
    splits = {}
    for split in ("train", "validation", "test"):
        rows = _read(annotations, split, optional=split == "test")
        splits[split] = [(Entry(str(row["id"]), "", _label(row, numbers)), [str(row["id"])]) for row in rows]
    return collect(
        "ssv2", splits, VideoFinder(videos), tuple(sorted(numbers, key=lambda name: numbers[name]))
    )


def _read(annotations: epath.Path, what: str, optional: bool = False) -> Any:
    try:
        file = find_file(annotations, f"{what} file", f"{what}.json", f"something-something-v2-{what}.json")
    except SourceError:
        if optional:
            return []
        raise
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise SourceError(f"{file} is no JSON ({error})") from None


def _label(row: dict[str, Any], numbers: dict[str, int]) -> int:
    if "template" not in row:
        return -1
    name = row["template"].replace("[", "").replace("]", "")
    if name not in numbers:
        raise SourceError(f"video {row['id']} has the label {name!r}, which the labels file does not list")
    return numbers[name]
