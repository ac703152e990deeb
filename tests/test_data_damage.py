"""Thousands of damaged files and of opens: no crash, no hang, no leak, no frame that is another's."""

import json
import os
import pathlib
import subprocess
import sys

import clips
import numpy as np
import pytest

from videomae_jax.data import decode, pipeline, sources

FORMS = {
    "long.mp4": dict(g=250, bf=2),
    "intra.mp4": dict(g=1),
    "short.mkv": dict(g=4),
    "part2.mov": dict(codec="mpeg4", g=6),
    "packed.avi": dict(codec="mpeg4", g=12),
    "stream.ts": dict(codec="mpeg2video", g=6),
    "jpeg.mov": dict(codec="mjpeg", qmin=4, qmax=4, strict="unofficial"),
    "vp9.webm": dict(codec="libvpx-vp9", g=8),
}
PLAIN = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
"""Without huge pages, whose rounding hides what memory a process keeps."""


def damage(good: bytes, kind: int, rng: np.random.Generator) -> bytes:
    """One of six kinds of damage, at random places."""
    data = bytearray(good)
    if kind == 0:  # bit flips
        for place in rng.integers(len(data), size=int(rng.integers(1, 40))):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # cut off
        del data[int(rng.integers(len(data))) :]
    elif kind == 2:  # a run of zeros
        start = int(rng.integers(len(data)))
        length = min(int(rng.integers(1, 600)), len(data) - start)
        data[start : start + length] = bytes(length)
    elif kind == 3:  # two parts swapped
        a, b = sorted(rng.integers(len(data), size=2).tolist())
        data = data[b:] + data[a:b] + data[:a]
    elif kind == 4:  # another file's head
        data[: int(rng.integers(8, 200))] = rng.bytes(int(rng.integers(8, 200)))
    else:
        return [b"", b"text\n" * 99, bytes(len(good)), rng.bytes(500)][int(rng.integers(4))]
    return bytes(data)


SCRIPT = """
import faulthandler, json, pathlib, resource, sys, time
import numpy as np
from videomae_jax.data import decode
faulthandler.enable()
counts, slowest, rss = {"decoded": 0, "refused": 0}, 0.0, []
files = sorted(pathlib.Path(sys.argv[1]).iterdir())
for number, path in enumerate(files):
    faulthandler.dump_traceback_later(20, exit=True)
    start = time.perf_counter()
    try:
        with decode.Video(path) as video:
            if video.num_frames > 5000:  # an index that lies: do not make an array of it
                video.read([0, video.num_frames - 1])
            frames = video.read([0, min(3, video.num_frames - 1), video.num_frames - 1])
        assert frames.dtype == np.uint8 and frames.ndim == 4 and len(frames) == 3 and frames.shape[3] == 3
        counts["decoded"] += 1
    except decode.DecodeError as error:
        assert path.name in str(error)
        counts["refused"] += 1
    slowest = max(slowest, time.perf_counter() - start)
    if number % 250 == 249:
        rss.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096)
open_files = len(list(pathlib.Path("/proc/self/fd").iterdir()))
print(json.dumps({**counts, "slowest": slowest, "rss": rss, "open_files": open_files}))
"""


@pytest.mark.slow
def test_two_thousand_damaged_files(tmp_path):
    rng = np.random.default_rng(0)
    moving = np.repeat(np.repeat(rng.integers(0, 256, (12, 4, 6, 3), dtype=np.uint8), 8, 1), 8, 2)
    good = [pathlib.Path(clips.write(tmp_path / name, moving, **options)) for name, options in FORMS.items()]
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number in range(2000):
        source = good[number % len(good)]
        data = damage(source.read_bytes(), int(rng.integers(6)), rng)
        (folder / f"{number:04d}{source.suffix}").write_bytes(data)
    words = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=PLAIN)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["decoded"] + found["refused"] == 2000
    assert min(found["decoded"], found["refused"]) > 200  # both happen
    assert found["slowest"] < 20
    assert found["open_files"] < 20
    assert found["rss"][-1] < 1.1 * found["rss"][1]
    # And through the loader: every one is drawn, those that fail weigh nothing, none takes another's place.
    source = sources.from_folder(folder)
    clip = pipeline.MiddleClip(frames=4, stride=1, size=(16, 16))
    weights, records = [], []
    for batch in pipeline.iterate(pipeline.once(source, clip, 50), 50, workers=0, threads=2):
        assert batch["video"].shape == (50, 4, 16, 16, 3)
        assert ((batch["weight"] == 0) == (batch["error"] != "")).all()
        assert not batch["video"][batch["weight"] == 0].any()
        weights += batch["weight"].tolist()
        records += batch["record"].tolist()
    assert records == list(range(2000))
    assert 200 < sum(weights) < 1800


@pytest.mark.slow
def test_ten_thousand_opens_need_no_more_memory(tmp_path):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(12), g=6)
    script = f"""
import pathlib
from videomae_jax.data import decode
data = pathlib.Path({path!r}).read_bytes()
rss = []
for number in range(10000):
    with decode.Video({path!r} if number % 2 else data) as video:
        video.read([0, 11], lambda *_: (4, 4, 16, 16))
    if number in (1000, 9999):
        rss.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]))
print(rss[1] / rss[0])
"""
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=PLAIN)
    assert float(done.stdout) < 1.05


def test_a_damaged_video_is_never_taken_for_another(tmp_path, rng):
    """Frames that do decode from a damaged file are its own: their numbers are those that were asked for."""
    path = pathlib.Path(clips.write(tmp_path / "a.mp4", clips.numbered_frames(30), g=5))
    good, wrong, right = path.read_bytes(), 0, 0
    for _ in range(60):
        data = bytearray(good)
        place = int(rng.integers(len(data) // 2))
        data[place : place + 20] = bytes(20)
        try:
            with decode.Video(bytes(data)) as video:
                if video.num_frames != 30:
                    continue
                found = clips.frame_numbers(video.read([7, 22]))
        except decode.DecodeError:
            continue
        right += found == [7, 22]
        wrong += found != [7, 22]
    assert right > 5
    assert wrong <= right // 5  # pixels may be damaged without the decoder knowing; times may not move
