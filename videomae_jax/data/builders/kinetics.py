"""Kinetics-400, -600, -700 from the published CSV files: label, youtube_id, time_start, time_end, split.

Labels have no published numbers; as everywhere, they are the names in alphabetical order.
"""

import csv
from collections.abc import Callable

from etils import epath

from videomae_jax.data.collection import Collection, Entry, VideoFinder, collect, find_file
from videomae_jax.data.sources import SourceError

_FILES = {
    "train": ("train.csv", "kinetics_train.csv"),
    "validation": ("validate.csv", "val.csv", "validation.csv", "kinetics_val.csv"),
    "test": ("test.csv", "kinetics_test.csv"),
}


def kinetics(classes: int) -> Callable[[epath.Path, epath.Path], Collection]:
    """The reader of Kinetics with that many classes.

    A video is found as ID_SSSSSS_EEEEEE (seconds of its start and end, as the usual downloads name it) or ID.
    """

    def read(annotations: epath.Path, videos: epath.Path) -> Collection:
        """Raises SourceError: annotation files of something else."""
        rows = {}
        for split, names in _FILES.items():
            try:
                file = find_file(annotations, f"{split} list", *names)
            except SourceError:
                if split == "test":  # not every release has one
                    continue
                raise
            rows[split] = _rows(file)
        labels = sorted({row["label"] for row in rows["train"]})
        if len(labels) != classes:
            raise SourceError(
                f"{annotations} has {len(labels)} classes, not the {classes} of Kinetics-{classes}"
            )
        number = {label: i for i, label in enumerate(labels)}
        splits = {split: [_entry(row, number) for row in found] for split, found in rows.items()}
        return collect(f"kinetics{classes}", splits, VideoFinder(videos), tuple(labels))

    return read


def _rows(file: epath.Path) -> list[dict[str, str]]:
    with file.open("r") as lines:
        rows = list(csv.DictReader(lines))
    lacking = {"youtube_id", "time_start", "time_end"} - set(rows[0] if rows else ())
    if lacking:
        raise SourceError(f"{file} is no Kinetics list: it has no column {min(lacking)}")
    if "label" not in rows[0] and "test" not in file.name:
        raise SourceError(f"{file} is no Kinetics list: it has no column label")
    return rows


def _entry(row: dict[str, str], number: dict[str, int]) -> tuple[Entry, list[str]]:
    video, start, end = row["youtube_id"], int(float(row["time_start"])), int(float(row["time_end"]))
    name, label = f"{video}_{start:06d}_{end:06d}", row.get("label")
    if label and label not in number:
        raise SourceError(f"{name} has the label {label!r}, which no training video has")
    return Entry(name, "", number[label] if label else -1), [name, video]
