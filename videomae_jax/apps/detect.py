"""The command `detect`: what is done in the boxes of any video, as JSON and drawn into the video."""

import dataclasses
import fractions
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from flax import nnx

from videomae_jax import storage
from videomae_jax.apps import annotate, people, videos
from videomae_jax.config import UserError
from videomae_jax.data import augment, boxes, decode, detection_clips, proposals, reading, scenes
from videomae_jax.data.reading import AnyVideo
from videomae_jax.evaluation import classification, detection
from videomae_jax.interop import weights
from videomae_jax.models.detector import ActionDetector

BoxesAt = Callable[[float], tuple[np.ndarray, np.ndarray]]
"""seconds -> (boxes in parts of the frame, how sure of each)"""

_READABLE = 360  # least height of what is drawn on, pixels
_LINKED = 0.3  # least overlap of two boxes, one key frame apart, of the same person


@dataclasses.dataclass(frozen=True)
class Options:
    """How a video is looked at.

    Attributes:
        boxes: "whole", "people", "torchvision", "onnx:FILE", or a CSV of video,time,left,top,right,bottom.
        every: seconds from one key frame to the next; of a CSV its own times are taken.
        top: actions to name, of each box.
        least: score that an action must have to be drawn.
        threshold: least score of a box of torchvision or `onnx`.
    """

    boxes: str = "whole"
    every: float = 1.0
    top: int = 3
    least: float = 0.2
    threshold: float = 0.4


@dataclasses.dataclass
class Key:
    """A key frame: its boxes in parts of the frame, and what is done there.

    Attributes:
        tracks: number of each box's person, see `link`.
        scores: of each action, float32 [R, K].
    """

    time: float
    corners: np.ndarray
    sure: np.ndarray
    tracks: list[int]
    scores: np.ndarray


def run(
    path: str, checkpoint: str, out: str, options: Options, hints: weights.Hints | None = None
) -> dict[str, Any]:
    """Writes OUT (.mp4) with boxes and actions, and beside it the same as .json; returns that.

    Args:
        hints: what a file of weights does not tell.

    Raises:
        UserError: no detector, no box in the video, options or files that do not fit.
        DecodeError: the video cannot be read.
        OutputError: scores that are not finite.
    """
    target = storage.at(out)
    if target.suffix != ".mp4":
        raise UserError(f"--out={out}: name a .mp4 file")
    videos.make_room(target, [path])
    if options.every <= 0 or options.top < 1:
        raise UserError("--every and --top must be positive")
    hints = hints or weights.Hints()
    model = weights.read(checkpoint, hints)
    if not isinstance(model, ActionDetector):
        raise UserError(f"{checkpoint} holds no detector: train one with configs/detect.py")
    recipe = weights.read_recipe(checkpoint, hints)
    if not {"stride", "test_short"} <= set(recipe):
        raise UserError(f"{checkpoint} does not tell its stride and frame size: name a run, or its best/")
    look = _looker(model, recipe)
    with reading.open_video(path, path) as video:
        keys = list(_keys(video, path, options, look))
        link(keys)
        smooth(keys)
        if not any(len(key.corners) for key in keys):
            raise UserError(
                f"{path}: no box in {len(keys)} key frames: pass --boxes=whole, a CSV, or another detector"
            )
        lost = np.concatenate([key.scores for key in keys if len(key.corners)])
        classification.check_finite(lost, [path] * len(lost), checkpoint)
        names = model.config.classes
        result = {
            "video": path,
            "checkpoint": checkpoint,
            "boxes": options.boxes,
            "key_frames": [_told(key, names, options.top) for key in keys],
        }
        storage.write_text(target.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        with storage.output(target) as file:
            decode.write_video(file, _drawn(video, keys, names, options), _rate(video))
    count = sum(len(key.corners) for key in keys)
    people_seen = len({track for key in keys for track in key.tracks})
    print(f"{out}: {len(keys)} key frames, {count} boxes of {people_seen} tracks, and {target.stem}.json")
    return result


def _looker(
    model: ActionDetector, recipe: dict[str, Any]
) -> Callable[[AnyVideo, float, np.ndarray], np.ndarray]:
    """(video, seconds, boxes) -> scores float32 [R, K]; compiled once for each number of boxes up to a power
    of two.
    """
    config = model.config
    graphdef, params = nnx.split(model)
    frames, stride, short, patch = (
        config.clip_size[0],
        recipe["stride"],
        recipe["test_short"],
        config.tubelet[1],
    )

    @jax.jit
    def scores(params, clip, pixels):
        detector = nnx.merge(graphdef, params)
        return jax.nn.sigmoid(detector.logits(detector.normalized(clip), pixels))

    def look(video: AnyVideo, seconds: float, corners: np.ndarray) -> np.ndarray:
        clip = detection_clips.around(video, seconds, frames, stride)
        size = detection_clips.whole_tubelets(clip.shape[1], clip.shape[2], short, patch)
        slots = 1 << (len(corners) - 1).bit_length()
        pixels = np.zeros((1, slots, 4), np.float32)
        placed = proposals.resized(corners, (clip.shape[1], clip.shape[2]), size)
        pixels[0, : len(corners)] = proposals.enlarged(placed, *size)
        return np.array(scores(params, augment.interpolate(clip, size)[None], pixels))[0, : len(corners)]

    return look


def _keys(
    video: AnyVideo,
    path: str,
    options: Options,
    look: Callable[[AnyVideo, float, np.ndarray], np.ndarray],
) -> Iterator[Key]:
    """Key frames with their boxes and scores."""
    times, boxes_at = _boxes_of(video, path, options)
    for time in tqdm.tqdm(times, "looking", unit="key frame", leave=False, disable=None):
        corners, sure = boxes_at(time)
        scores = look(video, time, corners) if len(corners) else np.zeros((0, 0), np.float32)
        yield Key(time, corners, sure, [], scores)


def _boxes_of(video: AnyVideo, path: str, options: Options) -> tuple[list[float], BoxesAt]:
    """Times of key frames, and what tells the boxes of each."""
    name = options.boxes
    if name not in ("whole", "people", "torchvision") and not name.startswith("onnx:"):
        if not storage.at(name).exists():
            raise UserError(
                f"--boxes={name}: there is no such file: use whole, people, torchvision, onnx:FILE or a CSV"
            )
        listed = _listed(name, path)
        return sorted(listed), lambda time: listed[time]
    if name == "whole":
        find = people.whole
    elif name == "people":
        find = people.opencv()
    elif name == "torchvision":
        find = people.torchvision(options.threshold)
    else:
        find = people.onnx(name.removeprefix("onnx:"), options.threshold)
    times = key_times(_seconds(video), options.every)
    return times, lambda time: find(video.read([video.index_at(time)])[0])


def key_times(seconds: float, every: float) -> list[float]:
    """Times in the middle of parts of `every` seconds.

    >>> key_times(3.2, 1.0), key_times(0.4, 1.0)
    ([0.5, 1.5, 2.5], [0.2])
    """
    count = int(seconds / every)
    return [every * (i + 0.5) for i in range(count)] or [seconds / 2]


def _seconds(video: AnyVideo) -> float:
    first, last = video.time_of(0), video.time_of(video.num_frames - 1)
    if first is None or last is None:
        raise UserError(f"{video.name} has no frame rate: detect needs a video file")
    return float(last - first) + 1 / (video.fps or 25)


def _rate(video: AnyVideo) -> fractions.Fraction:
    return fractions.Fraction(video.fps or 25).limit_denominator(1001)


def _listed(file: str, path: str) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Time -> boxes and scores that a CSV has for this video."""
    rows = boxes.read_rows(file, needs_action=False)
    name = pathlib.PurePath(path)
    ours = [row for row in rows if row.video in (name.name, name.stem)]
    if not any(row.corners for row in ours):
        raise UserError(
            f"--boxes={file} has no box of {name.name} or {name.stem}"
            + (f", the first is of {rows[0].video}" if rows else "")
        )
    found: dict[float, dict[tuple, float]] = {}
    are_scores = any(row.extra % 1 for row in ours)  # else persons' numbers
    for row in ours:
        of_frame = found.setdefault(row.time, {})  # those without any box too
        if row.corners:
            scenes.check_box(file, row)
            sure = row.extra if are_scores and 0 <= row.extra <= 1 else 1.0
            of_frame[row.corners] = max(sure, of_frame.get(row.corners, 0.0))
    return {
        time: (np.array(list(each), np.float32).reshape(-1, 4), np.array(list(each.values()), np.float32))
        for time, each in found.items()
    }


def link(keys: list[Key]) -> None:
    """Numbers the boxes so that one that overlaps one of the key frame before is the same person's.

    Pairs are taken by overlap, the largest first, `_LINKED` or more.
    """
    count = 0
    for before, key in zip([None, *keys], keys, strict=False):
        tracks: dict[int, int] = {}
        if before is not None and len(before.corners) and len(key.corners):
            overlap = detection.overlaps(key.corners, before.corners)
            for flat in np.argsort(-overlap, axis=None):
                ours, theirs = (int(i) for i in np.unravel_index(flat, overlap.shape))
                if overlap[ours, theirs] < _LINKED:
                    break
                if ours not in tracks and before.tracks[theirs] not in tracks.values():
                    tracks[ours] = before.tracks[theirs]
        for place in range(len(key.corners)):
            if place not in tracks:
                tracks[place] = count
                count += 1
        key.tracks = [tracks[place] for place in range(len(key.corners))]


def smooth(keys: list[Key]) -> None:
    """Takes the mean of a person's scores with those of the key frames beside: names flicker less."""
    by_key = [dict(zip(key.tracks, key.scores.copy(), strict=True)) for key in keys]
    for place, key in enumerate(keys):
        for box, track in enumerate(key.tracks):
            beside = by_key[max(place - 1, 0) : place + 2]
            key.scores[box] = np.mean([scores[track] for scores in beside if track in scores], axis=0)


def _told(key: Key, names: tuple[str, ...], top: int) -> dict[str, Any]:
    return {
        "time": round(key.time, 3),
        "boxes": [
            {
                "track": track,
                "corners": [round(float(x), 5) for x in corners],
                "score": round(float(sure), 5),
                "actions": [
                    {"name": names[action], "score": round(float(scores[action]), 5)}
                    for action in np.argsort(-scores, kind="stable")[:top]
                ],
            }
            for track, corners, sure, scores in zip(
                key.tracks, key.corners, key.sure, key.scores, strict=True
            )
        ],
    }


def _drawn(
    video: AnyVideo, keys: list[Key], names: tuple[str, ...], options: Options
) -> Iterator[np.ndarray]:
    """Every frame with the boxes where they are at its time; of even size, and small ones larger."""
    first, rate = video.time_of(0), _rate(video)
    times = -(-_READABLE // video.read([0])[0].shape[0])
    frames = video.each(range(video.num_frames))
    for index, frame in enumerate(tqdm.tqdm(frames, "drawing", video.num_frames, leave=False, disable=None)):
        shown = video.time_of(index)
        time = float(shown - first) if shown is not None and first is not None else index / float(rate)
        corners, texts, tracks = at(keys, time, names, options)
        frame = frame.repeat(times, axis=0).repeat(times, axis=1)
        height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
        yield annotate.draw_boxes(frame[:height, :width], corners, texts, tracks)


def at(
    keys: list[Key], time: float, names: tuple[str, ...], options: Options
) -> tuple[list[np.ndarray], list[str], list[int]]:
    """(boxes, texts, tracks) to draw at a time: those of the nearest key frame, on their way to the next."""
    near = min(range(len(keys)), key=lambda place: abs(keys[place].time - time))
    key = keys[near]
    other = min(max(near + (1 if time > key.time else -1), 0), len(keys) - 1)
    span = keys[other].time - key.time
    share = (time - key.time) / span if span else 0.0
    elsewhere = dict(zip(keys[other].tracks, keys[other].corners, strict=True))
    corners, texts = [], []
    for track, ours, scores in zip(key.tracks, key.corners, key.scores, strict=True):
        theirs = elsewhere.get(track, ours)
        corners.append(ours + share * (theirs - ours))
        best = np.argsort(-scores, kind="stable")[: options.top]
        texts.append("\n".join(f"{names[a]} {scores[a]:.2f}" for a in best if scores[a] >= options.least))
    return corners, texts, key.tracks
