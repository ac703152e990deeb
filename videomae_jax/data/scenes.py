"""Videos with boxes: key frames, who is where in them, and what they do; a folder of one's own.

    FOLDER/classes.csv (or .pbtxt)        number,name of each action
    FOLDER/train.csv, validation.csv, test.csv    video,time,left,top,right,bottom,action[,person]
    FOLDER/videos/NAME.mp4 (any suffix)   the videos that the rows name
    FOLDER/detected_validation.csv, detected_test.csv    boxes that a detector found (optional); .json and
                                          .pkl too, see `boxes.read_detections`
    FOLDER/excluded_validation.csv, excluded_test.csv    video,time that do not count (optional)
    FOLDER/scored.csv                     the classes that count in tests, where not all do (AVA: 60 of 80)

This is AVA's form; times are seconds into the file. What `prepare --dataset=ava` and `--dataset=boxes` write
has the same lists, and in place of videos/ a record of `CLIP_SECONDS` around each key frame.
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Container
from typing import ClassVar, NamedTuple

import numpy as np
from etils import epath

from videomae_jax.data import boxes, prepared, reading, sources
from videomae_jax.data.boxes import Row
from videomae_jax.data.collection import Collection
from videomae_jax.data.decode import DecodeError
from videomae_jax.data.sources import Record, Source, SourceError

PARTS = ("train", "validation", "test")
# Of AVA's 80 actions the official metric takes those that occur often enough.
_LEFT_OUT = {2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75}
_SCORED = dict.fromkeys(("ava", "ava_kinetics"), set(range(1, 81)) - _LEFT_OUT)
CLIP_SECONDS = 3.0
"""Length of a prepared clip, its key frame in the middle: 64 frames of 24 to 30 per second, and some."""


class Scene(NamedTuple):
    """What is known of a key frame.

    Attributes:
        time: seconds into the video, or into its record in prepared data.
        corners: of each box, in parts of the frame, float32 [R, 4].
        actions: of each box, places in the classes; () of one that a detector found.
        scores: how sure the detector is of each, float32 [R]; 1 for annotated boxes.
    """

    time: float
    corners: np.ndarray
    actions: tuple[tuple[int, ...], ...]
    scores: np.ndarray


class SceneRecord(Record):
    """A record of a key frame."""

    scene: Scene


@dataclasses.dataclass(frozen=True)
class SceneSource(Source):
    """Key frames with boxes, as `Source`; an id is `video,milliseconds`, there is no label.

    Attributes:
        scenes: what is known of each.
        files: path of each video, by name; of prepared data there are none, but `stored`.
        numbers: number of each class in the files, in order.
        scored: places of the classes that count in tests (scored.csv); (): all.
        missing: key frames of the list that prepared data lacks.
        excluded: ids that do not count.
        stored: records of prepared data; `places` are those of the key frames among them.
    """

    scenes: tuple[Scene, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    numbers: tuple[int, ...] = ()
    noun: ClassVar[str] = "key frames"
    scored: tuple[int, ...] = ()
    missing: int = 0
    excluded: frozenset[str] = frozenset()
    stored: prepared.PreparedSource | None = None
    places: tuple[int, ...] = ()

    @functools.cached_property
    def _paths(self) -> dict[str, str]:
        return dict(self.files)

    def __getitem__(self, index: int) -> SceneRecord:
        index = int(index)
        name, scene = self.ids[index], self.scenes[index]
        if self.stored is not None:
            record = self.stored[self.places[index]]
            return {**record, "name": name, "label": -1, "record": index, "scene": scene}
        video = self._paths[name.rpartition(",")[0]]
        return {"video": video, "name": name, "label": -1, "record": index, "error": "", "scene": scene}

    @functools.cached_property
    def _rates(self) -> dict[str, float]:
        return {row["id"]: float(row["fps"]) for row in prepared.read_rows(self.root)}

    def beyond(self, frames: int) -> int:
        """Of how many key frames the stored seconds have fewer frames than a clip that spans so many."""
        if self.stored is None:
            return 0
        rates = (self._rates[self.stored.ids[place]] for place in self.places)
        return sum(bool(rate) and frames / rate > CLIP_SECONDS for rate in rates)

    def select(self, indices) -> "SceneSource":
        """The key frames at `indices`, in that order."""
        chosen = super().select(indices)
        places = tuple(self.places[i] for i in indices) if self.places else ()
        return dataclasses.replace(chosen, scenes=tuple(self.scenes[i] for i in indices), places=places)

    def frame_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the frames of each key frame; (0, 0) where they cannot be read.

        Of files each is looked into once.
        """
        if self.stored is not None:
            rows = prepared.read_rows(self.root)
            by_id = {row["id"]: (int(row["height"]), int(row["width"])) for row in rows}
            return [by_id[self.stored.ids[place]] for place in self.places]
        sizes: dict[str, tuple[int, int]] = {}
        for name, path in self.files:
            try:
                sizes[name] = reading.patiently(lambda path=path: _size(path))
            except DecodeError:
                sizes[name] = (0, 0)
        return [sizes[name.rpartition(",")[0]] for name in self.ids]

    def fingerprint(self) -> str:
        """As `Source.fingerprint`, of boxes and actions too."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for scene in self.scenes:
            digest.update(scene.corners.tobytes() + scene.scores.tobytes() + str(scene.actions).encode())
        return digest.hexdigest()[:16]


def _size(path: str) -> tuple[int, int]:
    with reading.open_video(path) as video:
        return video.read([0])[0].shape[:2]


def id_of(frame: tuple[str, int]) -> str:
    """The id of a frame (video, milliseconds)."""
    return f"{frame[0]},{frame[1]}"


def record_id(frame: tuple[str, int]) -> str:
    """The id of a prepared record of a frame."""
    return f"{frame[0]}/{frame[1] / 1000:.10g}"


def has_boxes(path: str) -> bool:
    """Whether a folder is one of this form."""
    return (epath.Path(path) / "train.csv").is_file() and _class_list(epath.Path(path)) is not None


def has_part(path: str, part: str) -> bool:
    """Whether it has boxes for a part."""
    return (epath.Path(path) / f"{part}.csv").is_file()


def open_scenes(path: str, part: str) -> SceneSource:
    """The annotated key frames of a part that have a box.

    Raises:
        SourceError: a file that is not there or not understood, a box that is none, an unknown action or
            video, naming file and line.
    """
    folder = epath.Path(path)
    listed = _class_list(folder)
    if listed is None or not has_part(path, part):
        raise SourceError(
            f"{path} has no {part}.csv and classes.csv: boxes of one's own are a folder with classes.csv, "
            f"train.csv, validation.csv (video,time,left,top,right,bottom,action) and videos/"
        )
    actions = boxes.read_actions(str(listed))
    numbers = tuple(sorted(actions))
    place = {number: i for i, number in enumerate(numbers)}
    file = str(folder / f"{part}.csv")
    rows = _checked_rows(file, place, listed.name)
    stored = prepared.open_prepared(path, part) if prepared.is_prepared(path) else None
    videos = {} if stored is not None else _find_videos(folder, file, rows)
    # A box of several actions stands there once for each.
    frames: dict[tuple[str, int], dict[tuple, set[int]]] = {}
    for row in rows:
        who = (row.corners, row.extra)
        frames.setdefault(row.frame, {}).setdefault(who, set()).add(place[row.action])
    place_of = {name: i for i, name in enumerate(stored.ids)} if stored is not None else {}
    kept = [frame for frame in sorted(frames) if stored is None or record_id(frame) in place_of]
    missing = len(frames) - len(kept)
    times = _times(kept, path, stored)
    scored = folder / "scored.csv"
    scenes = tuple(
        Scene(
            time,
            np.array([who[0] for who in frames[frame]], np.float32),
            tuple(tuple(sorted(done)) for done in frames[frame].values()),
            np.ones(len(frames[frame]), np.float32),
        )
        for frame, time in zip(kept, times, strict=True)
    )
    excluded = folder / f"excluded_{part}.csv"
    return SceneSource(
        root=path,
        ids=tuple(id_of(frame) for frame in kept),
        labels=(-1,) * len(kept),
        classes=tuple(actions[number] for number in numbers),
        scenes=scenes,
        files=tuple(sorted(videos.items())),
        numbers=numbers,
        excluded=frozenset(map(id_of, boxes.read_frames(str(excluded)) if excluded.is_file() else ())),
        stored=stored,
        places=tuple(place_of[record_id(frame)] for frame in kept) if stored is not None else (),
        scored=_places(scored, place) if scored.is_file() else (),
        missing=missing,
        notes=(f"{file}: {missing} key frames are not among the prepared ones: left out",) if missing else (),
    )


def _checked_rows(file: str, actions: Container[int], listed: str) -> list[Row]:
    """The rows of a file that have a box."""
    rows = [row for row in boxes.read_rows(file) if row.corners]
    for row in rows:
        check_box(file, row)
        if row.action not in actions:
            raise SourceError(f"{file} line {row.line}: action {row.action} is not in {listed}")
    if not rows:
        raise SourceError(f"{file} has no box in it")
    return rows


def _times(frames: list[tuple[str, int]], path: str, stored: prepared.PreparedSource | None) -> list[float]:
    """When key frames are on show, in seconds: in their videos, or in their records.

    A record of `CLIP_SECONDS` begins with the frame that is on show half of them before its key frame's time,
    and that frame with a time of its own.

    Raises:
        SourceError: the records do not tell.
    """
    if stored is None:
        return [milliseconds / 1000 for _, milliseconds in frames]
    rows = prepared.read_rows(path)
    early = {row["id"]: row.get("early") for row in rows if row["split"] == stored.split}
    if any(not early[record_id(frame)] for frame in frames):
        raise SourceError(
            f"{path} was prepared by a version that did not keep where in a record its key frame is: prepare "
            f"into another folder"
        )
    return [min(frame[1] / 1000, CLIP_SECONDS / 2) + float(early[record_id(frame)] or 0) for frame in frames]


def check_box(file: str, row: Row) -> None:
    """Refuses a box that lies outside the frame or is reversed.

    Raises:
        SourceError: naming the line.
    """
    assert row.corners
    left, top, right, bottom = row.corners
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise SourceError(
            f"{file} line {row.line}: the box {left:g},{top:g},{right:g},{bottom:g} is none: corners are "
            f"parts of the frame, 0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )


def lists(collection: Collection) -> dict[str, str]:
    """The lists of a collection of key frames, by file name, for its prepared folder; of others none."""
    if "boxes" not in collection.extra:
        return {}
    numbered = [(i, name) for i, name in enumerate(collection.classes, 1)]
    found = {"classes.csv": "".join(f"{i},{name}\n" for i, name in numbered)}
    if collection.name in _SCORED:
        scored = [(i, name) for i, name in numbered if i in _SCORED[collection.name]]
        found["scored.csv"] = "".join(f"{i},{name}\n" for i, name in scored)
    for part, entries in collection.splits.items():
        lines = io.StringIO()
        table = csv.writer(lines, lineterminator="\n")
        for entry in entries:
            video, _, second = entry.id.rpartition("/")
            each = zip(*(entry.extra[name] for name in ("boxes", "actions", "persons")), strict=True)
            rows = [
                (video, second, *map(repr, corners), action + 1, person)
                for corners, marks, person in each
                for action in np.flatnonzero(marks)
            ]
            table.writerows(rows or [(video, second)])
        found[f"{part}.csv"] = lines.getvalue()
    return found


def detected_file(path: str, part: str) -> str:
    """The file of a detector's boxes for a part: detected_PART.csv, .json or .pkl; "": there is none."""
    files = [epath.Path(path) / f"detected_{part}{suffix}" for suffix in boxes.DETECTIONS]
    return next((str(file) for file in files if file.is_file()), "")


def detected(source: SceneSource, file: str, threshold: float) -> SceneSource:
    """The same videos with the boxes that a detector found, those of `threshold` or more.

    Key frames without any are left out; their truth still counts. A box that stands there for several
    actions is one, of its best score.

    Raises:
        SourceError: a file of other videos, or without a box of that score.
    """
    found: dict[tuple[str, int], dict[tuple, float]] = collections.defaultdict(dict)
    known = {name.rpartition(",")[0] for name in source.ids}
    place_of = {name: i for i, name in enumerate(source.stored.ids)} if source.stored is not None else {}
    rows = [row for row in boxes.read_detections(file) if row.corners]
    lacking = 0
    for row in rows:
        if row.extra >= threshold and row.video in known and (inside := boxes.inside(row)):
            if source.stored is not None and record_id(row.frame) not in place_of:
                lacking += 1
                continue
            of_frame = found[row.frame]
            of_frame[inside.corners] = max(row.extra, of_frame.get(inside.corners, 0.0))
    if not found:
        best = max((row.extra for row in rows), default=None)
        why = "no box in it" if best is None else f"none of score {threshold:g} or more of these videos"
        raise SourceError(f"{file}: {why}: detections are video,time,left,top,right,bottom,class,score")
    named = {id_of(frame) for frame in found}
    if not named & set(source.ids):
        raise SourceError(f"{file} and {source.root} have no key frame in common, such as {min(named)} ms")
    kept = sorted(found)
    times = _times(kept, source.root, source.stored)
    scenes = tuple(
        Scene(
            time,
            np.array(list(found[frame]), np.float32),
            ((),) * len(found[frame]),
            np.array(list(found[frame].values()), np.float32),
        )
        for frame, time in zip(kept, times, strict=True)
    )
    places = tuple(place_of[record_id(frame)] for frame in kept) if source.stored is not None else ()
    ids = tuple(map(id_of, kept))
    notes = source.notes
    if lacking:
        notes += (
            f"{file}: {lacking} boxes are of key frames that are not among the prepared ones: left out",
        )
    return dataclasses.replace(
        source, ids=ids, labels=(-1,) * len(ids), scenes=scenes, places=places, notes=notes
    )


def hold_out(source: SceneSource) -> tuple[SceneSource, SceneSource]:
    """(kept, held out): all key frames of a tenth of the videos, chosen by the hash of their names.

    Of one video alone, it is both.
    """
    names = sorted({name.rpartition(",")[0] for name in source.ids}, key=sources.hash_of)
    held = set(names[: max(len(names) // 10, 1)]) if len(names) > 1 else set(names)
    places = {True: [], False: []}
    for place, name in enumerate(source.ids):
        places[name.rpartition(",")[0] in held].append(place)
    return source.select(places[len(names) == 1] or places[False]), source.select(places[True])


def _places(file: epath.Path, place: dict[int, int]) -> tuple[int, ...]:
    """The places of the classes that a list names."""
    numbers = boxes.read_actions(str(file))
    unknown = sorted(set(numbers) - set(place))
    if unknown:
        raise SourceError(f"{file}: action {unknown[0]} is not in the class list")
    return tuple(place[number] for number in sorted(numbers))


def _class_list(folder: epath.Path) -> epath.Path | None:
    lists = [folder / f"classes{suffix}" for suffix in (".csv", ".pbtxt")]
    return next((file for file in lists if file.is_file()), None)


def _find_videos(folder: epath.Path, file: str, rows: list[Row]) -> dict[str, str]:
    """The file of each video that rows name, in FOLDER/videos, or one of its folders."""
    root = folder / "videos"
    there: dict[str, list[str]] = collections.defaultdict(list)
    for video in sources.videos_below(root) if root.is_dir() else ():
        for name in {video, os.path.splitext(video)[0]}:
            there[name].append(video)
    found = {}
    for row in rows:
        files = there.get(row.video, [])
        if not files:
            raise SourceError(f"{file} line {row.line}: there is no video {row.video} in {root}")
        if len(files) > 1 and row.video not in files:
            raise SourceError(
                f"{file} line {row.line}: {root} has {' and '.join(files)}: name {row.video} with its suffix"
            )
        found[row.video] = str(root / (row.video if row.video in files else files[0]))
    return found
