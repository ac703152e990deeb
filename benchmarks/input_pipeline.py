"""CPU time of a pretraining clip, from stored video to batch, against the usual loader in the same run.

    .venv/bin/python benchmarks/input_pipeline.py VIDEO                        (needs the extra [torch])
    .venv/bin/python benchmarks/input_pipeline.py VIDEO --simulate-step-ms=0   (a step as fast as the loader)

VIDEO is taken as it is and prepared in each form; -device: with crops that the step resizes
(data.resize=device). A clip is 16 frames, stride 4, from a random offset, multi-scale crop to 224, uint8. The
usual loader: decord, PIL multi-scale crop, float32 tensor. CPU milliseconds are of the whole process, with
one loader thread as the peer has one; rounds alternate forms and peer, and the figure to quote is the median
of the rounds' ratios. `second` is what a second clip of the same frames takes (data.clips_per_video=2), as a
share of the first; `read_mb` what is read of storage for a clip, `amplified` how often that is its frames'
share of the record. Prints one table and one JSON line.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from absl import flags
from PIL import Image

from videomae_jax.data import (
    augment,
    decode,
    pipeline,
    prepare,
    prepared,
    processes,
    reading,
    rgb,
    sampling,
    sources,
    transcode,
)
from videomae_jax.data.collection import Collection, Entry

CLIP = pipeline.PretrainClip(frames=16, stride=4, size=(224, 224))
ON_DEVICE = dataclasses.replace(CLIP, short_side=256)
COPIES = 16
FEED = 2000  # clips per second that one fast accelerator takes


def cpu_ms(run: Callable[[], Any], times: int) -> float:
    """Mean CPU milliseconds of this process per call."""
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times * 1e3


def make_sources(video: pathlib.Path, folder: pathlib.Path) -> dict[str, sources.Source]:
    """`COPIES` of the video as it is, and prepared in each form."""
    files = folder / "files"
    files.mkdir()
    for copy in range(COPIES):
        shutil.copy(video, files / f"{copy:02d}{video.suffix}")
    found: dict[str, sources.Source] = {"files": sources.from_folder(files)}
    entries = [Entry(path.name, str(path)) for path in sorted(files.iterdir())]
    for codec in transcode.CODECS:
        place = folder / codec
        job = prepare.Job(Collection("videos", {"train": entries}), str(place), transcode.Form(codec), 8)
        prepare.run(job, processes.usable_cores())
        found[codec] = prepared.open_source(str(place), "train")
    return found


def stored(source: sources.Source, original: pathlib.Path) -> tuple[float, float]:
    """(bytes, as a multiple of the original's; PSNR against it in dB, of the RGB frames at its size)."""
    data = source[0]["video"]
    if isinstance(source, prepared.PreparedSource) and len(source.table.lengths):
        size = int(source.table.lengths[0])
    else:
        size = len(data) if isinstance(data, bytes) else pathlib.Path(str(data)).stat().st_size
    with decode.Video(original) as video, reading.open_video(data) as ours:
        wanted = range(0, video.num_frames, max(video.num_frames // 50, 1))
        expected, found = video.read(wanted), ours.read(wanted)
    if expected.shape != found.shape:
        expected = augment.resize(expected, found.shape[1:3])
    error = np.mean((expected.astype(np.float32) - found) ** 2)
    psnr = float(10 * np.log10(255**2 / error)) if error else float("inf")
    return size / original.stat().st_size, psnr


Frames = Callable[[np.random.Generator], list[np.ndarray]]
"""The frames of a clip from a random offset, as a peer decodes them."""


def by_decord(video: pathlib.Path) -> Frames:
    """As the published loader has them."""
    import decord

    def frames(rng: np.random.Generator) -> list[np.ndarray]:
        reader = decord.VideoReader(str(video), num_threads=1, ctx=decord.cpu(0))
        wanted = sampling.pretrain_clip(len(reader), CLIP.frames, CLIP.stride, rng)
        return list(reader.get_batch(wanted).asnumpy())

    return frames


def by_opencv(video: pathlib.Path) -> Frames:
    """By OpenCV's reader, which seeks to the first frame and skips between the others."""

    def frames(rng: np.random.Generator) -> list[np.ndarray]:
        reader = cv2.VideoCapture(str(video), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        length = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
        first, *others = sampling.pretrain_clip(length, CLIP.frames, CLIP.stride, rng)
        reader.set(cv2.CAP_PROP_POS_FRAMES, int(first))
        found = [reader.read()[1]]
        for before, index in itertools.pairwise([first, *others]):
            for _ in range(index - before):
                reader.grab()
            found.append(reader.retrieve()[1])
        return [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in found]

    return frames


def usual_loader(decoded: Frames) -> Callable[[], Any]:
    """The published loader's work for a clip: PIL crop and resize, float32 [3, T, H, W] in 0..1."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    def run() -> Any:
        frames = decoded(rng)
        top, left, height, width = augment.multi_scale_box(*frames[0].shape[:2], CLIP.size, rng)
        box = (left, top, left + width, top + height)
        images = [Image.fromarray(frame).convert("RGB").crop(box) for frame in frames]
        images = [image.resize(CLIP.size[::-1], Image.Resampling.BILINEAR) for image in images]
        stacked = torch.from_numpy(np.concatenate([np.asarray(image) for image in images], axis=2))
        pixels = stacked.permute(2, 0, 1).contiguous().float().div(255)
        return pixels.view(CLIP.frames, 3, *CLIP.size).transpose(0, 1)

    return run


def variants(
    found: dict[str, sources.Source], forms: list[str]
) -> dict[str, tuple[sources.Source, pipeline.PretrainClip]]:
    """What is measured: each form, and those of known size with crops for the device."""
    plain = {name: (source, CLIP) for name, source in found.items()}
    plain |= {f"{name}-device": (found[name], ON_DEVICE) for name in ("jpeg", "h264_intra")}
    return {name: variant for name, variant in plain.items() if not forms or name in forms}


def read_so_far() -> int:
    """Bytes that this process has read of files, from memory or not."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def stages(source: sources.Source, made: pipeline.PretrainClip) -> dict[str, Callable[[], Any]]:
    """Parts of a clip's way, each a function that does one."""
    rng = np.random.default_rng(0)
    turn = itertools.cycle(range(len(source)))

    def boxes(height: int, width: int) -> rgb.Box:
        return augment.multi_scale_box(height, width, CLIP.size, rng)

    def read() -> Any:
        return source[next(turn)]

    def decoded() -> Any:
        with reading.open_video(read()["video"]) as video:
            wanted = sampling.pretrain_clip(video.num_frames, CLIP.frames, CLIP.stride, rng)
            return video.read(wanted, boxes)

    def clip() -> Any:
        return made.random_map((0, read()), rng)

    def twice() -> Any:
        return dataclasses.replace(made, clips_per_video=2).random_map((0, read()), rng)

    return {"read": read, "decode": decoded, "clip": clip, "twice": twice}


class Loader:
    """Our whole pipeline over a source, as training runs it."""

    def __init__(self, source: sources.Source, clip: pipeline.PretrainClip, batch: int, threads: int):
        self.batch = batch
        # As many records as a real set has: Grain's shuffle is slow for a handful.
        many = source.select([record % len(source) for record in range(1 << 14)])
        dataset = pipeline.clips(many, clip, seed=0, batch_size=batch)
        self._iterator = pipeline.iterate(dataset, batch, workers=0, threads=threads)
        next(self._iterator)

    def run(self, batches: int) -> tuple[float, float]:
        """(CPU ms per clip of this process, wall seconds per batch)."""
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(batches):
            next(self._iterator)
        clips = batches * self.batch
        return (time.process_time() - cpu) / clips * 1e3, (time.perf_counter() - wall) / batches

    def waiting(self, step: float, batches: int) -> float:
        """Share of the time spent waiting for data when a step takes `step` seconds and no CPU."""
        waited, start = 0.0, time.perf_counter()
        for _ in range(batches):
            asked = time.perf_counter()
            next(self._iterator)
            waited += time.perf_counter() - asked
            time.sleep(step)
        return waited / (time.perf_counter() - start)

    def close(self) -> None:
        """Ends its threads."""
        self._iterator.close()


def compare(
    video: pathlib.Path, rounds: int, clips: int, folder: pathlib.Path, forms: list[str]
) -> list[dict[str, Any]]:
    """One row of figures per form."""
    found = variants(make_sources(video, folder), forms)
    usual, opencv = usual_loader(by_decord(video)), usual_loader(by_opencv(video))
    cpu_ms(usual, 2), cpu_ms(opencv, 2)
    with decode.Video(video) as opened:
        frames = opened.num_frames
    rows: list[dict[str, Any]] = []
    peers: list[tuple[float, float]] = []
    parts = {name: stages(*variant) for name, variant in found.items()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, functions in parts.items():
            sample = {stage: cpu_ms(run, clips) for stage, run in functions.items()}
            before = read_so_far()
            cpu_ms(functions["clip"], clips)
            sample["bytes"] = (read_so_far() - before) / clips
            loader = Loader(*found[name], 8, threads=1)
            loader.run(1)
            sample["pipeline"], _ = loader.run(max(clips // 4, 2))
            loader.close()
            sample["usual"] = cpu_ms(usual, max(clips // 4, 2))
            samples[name].append(sample)
        peers.append((cpu_ms(usual, max(clips // 4, 2)), cpu_ms(opencv, max(clips // 4, 2))))
    of_usual = statistics.median(other / own for own, other in peers)
    print(
        f"OpenCV's reader in decord's place: {statistics.median(o for _, o in peers):.1f} ms, {of_usual:.2f}"
    )
    for name, taken in samples.items():
        middle = {key: statistics.median(sample[key] for sample in taken) for key in taken[0]}
        size, psnr = stored(found[name][0], video)
        share = CLIP.frames / frames * size * video.stat().st_size
        rows.append(
            {
                "form": name,
                "read_ms": middle["read"],
                "decode_ms": middle["decode"] - middle["read"],
                "augment_ms": middle["clip"] - middle["decode"],
                "clip_ms": middle["clip"],
                "pipeline_ms": middle["pipeline"],
                "overhead": statistics.median(s["pipeline"] / s["clip"] - 1 for s in taken),
                "of_usual": statistics.median(s["pipeline"] / s["usual"] for s in taken),
                "usual_ms": middle["usual"],
                "clips_per_second_per_core": 1e3 / middle["pipeline"],
                "cores_for_2000": FEED * middle["pipeline"] / 1e3,
                "second": statistics.median(s["twice"] / s["clip"] - 1 for s in taken),
                "bytes": size,
                "read_mb": middle["bytes"] / 1e6,
                "amplified": middle["bytes"] / share,
                "psnr": psnr,
            }
        )
    return rows


def simulate(
    video: pathlib.Path, step_ms: float, folder: pathlib.Path, batches: int, forms: list[str]
) -> list[dict[str, Any]]:
    """Share of time that a step of `step_ms` (0: as long as the loader takes for a batch) waits for data."""
    rows = []
    for name, variant in variants(make_sources(video, folder), forms).items():
        loader = Loader(*variant, 8, processes.usable_cores())
        _, wall = loader.run(batches)
        step = step_ms / 1e3 or wall
        rows.append({"form": name, "step_ms": step * 1e3, "data_wait": loader.waiting(step, batches)})
        loader.close()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table."""
    names = list(rows[0])
    print("".join(f"{name:>{max(len(name) + 2, 12)}}" for name in names))
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else v for v in row.values())
        print("".join(f"{cell:>{max(len(name) + 2, 12)}}" for name, cell in zip(names, cells, strict=True)))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("video", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=24, help="per round and form")
    parser.add_argument("--forms", default="", help="measured ones, as the table calls them; all by default")
    parser.add_argument("--simulate-step-ms", type=float, default=None)
    arguments = parser.parse_args()
    forms = arguments.forms.split(",") if arguments.forms else []
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's global flags
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if arguments.simulate_step_ms is None:
            rows = compare(arguments.video, arguments.rounds, arguments.clips, folder, forms)
        else:
            rows = simulate(arguments.video, arguments.simulate_step_ms, folder, 120, forms)
    show(rows)
    print(json.dumps({"video": arguments.video.name, "cpu": _processor(), "rows": rows}))


def _processor() -> str:
    lines = pathlib.Path("/proc/cpuinfo")
    text = lines.read_text() if lines.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
