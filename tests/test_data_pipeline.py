"""The global batch is a function of (source, seed, step): for any hosts, workers and restarts."""

import collections
import os
import signal
import subprocess
import sys
import time

import clips
import numpy as np
import pytest

from videomae_jax.data import pipeline, sources

CLIP = pipeline.PretrainClip(frames=4, stride=1, size=(16, 16))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> sources.VideoSource:
    """Seven videos, one of them broken."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for i in range(6):
        clips.write(folder / f"{i}.mp4", rng.integers(0, 256, (9, 24, 32, 3), dtype=np.uint8))
    (folder / "broken.mp4").write_bytes(b"no video")
    return sources.from_folder(folder)


def read(source, steps, *, hosts=1, workers=0, threads=1, start=0, seed=3, batch_size=4):
    """Global batches from the parts of simulated hosts."""
    parts = [
        pipeline.iterate(
            pipeline.clips(
                source, CLIP, seed=seed, batch_size=batch_size, start_step=start, host=host, hosts=hosts
            ),
            batch_size // hosts,
            workers=workers,
            threads=threads,
        )
        for host in range(hosts)
    ]
    found = []
    for _ in range(steps):
        rows = [next(part) for part in parts]
        # Host h holds every hosts-th example of the batch: put them back in the order of the stream.
        found.append(
            {
                name: np.stack([row[name] for row in rows], 1).reshape(batch_size, *rows[0][name].shape[1:])
                for name in rows[0]
            }
        )
    for part in parts:
        part.close()
    return found


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_batch(source):
    (batch,) = read(source, 1)
    assert batch["video"].shape == (4, 4, 16, 16, 3)
    assert {name: str(value.dtype) for name, value in batch.items() if name != "error"} == {
        "video": "uint8",
        "index": "uint32",
        "label": "int32",
        "weight": "float32",
        "record": "int32",
    }


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(source, hosts):
    assert_same(read(source, 5), read(source, 5, hosts=hosts))


@pytest.mark.parametrize("threads", [0, 3])
def test_threads_change_nothing(source, threads):
    assert_same(read(source, 5), read(source, 5, threads=threads))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(source, workers):
    assert_same(read(source, 5), read(source, 5, workers=workers))


def test_starting_in_the_middle_continues(source):
    assert_same(read(source, 6)[4:], read(source, 2, start=4, hosts=2))


def test_every_video_once_per_epoch_in_a_new_order_and_crop(source):
    batches = read(source, 14)  # 8 epochs of 7 videos
    records = np.concatenate([batch["record"] for batch in batches]).reshape(8, 7)
    assert (np.sort(records, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in records.tolist()}) > 4
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), np.arange(56))
    crops = collections.defaultdict(set)
    for batch in batches:
        for record, video in zip(batch["record"], batch["video"], strict=True):
            crops[int(record)].add(video.tobytes())
    assert all(len(crops[r]) > 3 for r in crops if source.ids[r] != "broken.mp4")


def test_another_seed_is_another_stream(source):
    assert not (read(source, 1)[0]["video"] == read(source, 1, seed=4)[0]["video"]).all()


def test_a_broken_video_weighs_nothing_and_says_why(source):
    batches = read(source, 7)
    for batch in batches:
        for record, weight, error, video in zip(
            batch["record"], batch["weight"], batch["error"], batch["video"], strict=True
        ):
            if source.ids[record] == "broken.mp4":
                assert weight == 0
                assert "broken.mp4" in error
                assert not video.any()
            else:
                assert weight == 1
                assert error == ""
                assert video.any()


def test_hosts_must_divide_the_batch(source):
    with pytest.raises(ValueError, match="batch size 4 is not a multiple of 3 hosts"):
        pipeline.clips(source, CLIP, seed=0, batch_size=4, hosts=3)


def test_middle_clips_are_fixed_and_name_what_fails(source):
    found, ids, bad = pipeline.middle_clips(source, CLIP)
    again, _, _ = pipeline.middle_clips(source, CLIP)
    np.testing.assert_array_equal(found, again)
    assert found.shape == (6, 4, 16, 16, 3)
    assert ids == [f"{i}.mp4" for i in range(6)]
    assert list(bad) == ["broken.mp4"]


def test_workers_die_with_a_killed_parent(source, tmp_path):
    script = tmp_path / "loader.py"
    script.write_text(f"""
import time
from absl import flags
from videomae_jax.data import pipeline, sources
if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    clip = pipeline.PretrainClip(4, 1, (16, 16))
    source = sources.from_folder({source.root!r})
    data = pipeline.clips(source, clip, seed=0, batch_size=4)
    iterator = pipeline.iterate(data, 4, workers=1, threads=1)
    next(iterator)
    print("ready", flush=True)
    time.sleep(60)
""")
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout.readline() == "ready\n"
    group = [int(p) for p in os.listdir("/proc") if p.isdigit() and _session(p) == parent.pid]
    assert len(group) > 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not any(_session(str(pid)) == parent.pid for pid in group):
            return
        time.sleep(0.1)
    pytest.fail("worker processes outlived their parent")


def _session(pid: str) -> int:
    """The session of a living process; -1 of a dead one."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[3])
