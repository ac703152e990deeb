"""AVA-Kinetics: AVA 2.2, and key frames of Kinetics-700 with boxes and AVA's actions (arXiv 2005.00214).

Read from AVA's files and kinetics_train_v1.0.csv, kinetics_val_v1.0.csv. Their seconds are those of the
original videos; the clips are called ID_START_END, from second START on.
"""

import csv

from etils import epath

from videomae_jax.data.builders.ava import PARTS, action_names, entries, features, key_frame, key_frames
from videomae_jax.data.collection import Collection, Entry, VideoFinder, collect, find_file
from videomae_jax.data.sources import SourceError


def ava_kinetics(annotations: epath.Path, videos: epath.Path) -> Collection:
    """One record per annotated key frame, with the id MOVIE/SECOND or ID_START_END/SECOND; label -1.

    Args:
        videos: folder that holds both, however deep.

    Raises:
        SourceError: annotation files of something else.
    """
    finder = VideoFinder(videos)
    splits = {}
    for split, short in PARTS.items():
        splits[split] = entries(annotations, short) + _entries(annotations, short, finder)
    names = action_names(annotations)
    return collect("ava_kinetics", splits, finder, names, features(len(names)))


def _entries(annotations: epath.Path, short: str, finder: VideoFinder) -> list[tuple[Entry, list[str]]]:
    file = find_file(annotations, f"{short} list of Kinetics", f"kinetics_{short}_v1.0.csv")
    with file.open("r") as lines:
        rows = [row for row in csv.reader(lines) if row]
    odd = next((row for row in rows if len(row) not in (2, 7, 8)), None)
    if odd is not None:
        raise SourceError(f"{file} is no list of AVA-Kinetics: {odd} has {len(odd)} columns, not 2, 7 or 8")
    # Without the person's number, and, of a key frame without anybody, the box and action.
    frames = key_frames(file, [[*row, *[""] * (7 - len(row)), "0"][:8] for row in rows], set())
    clips = finder.parts()
    found = []
    for (video, second), boxes in frames.items():
        there = [(start, name) for start, end, name in clips.get(video, ()) if start <= second <= end]
        start, name = there[0] if there else (0, video)  # without its clip it is absent
        found.append((key_frame(name, second - start, boxes), [name]))
    return found
