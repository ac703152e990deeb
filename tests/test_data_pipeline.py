"""The global batch is a function of (source, seed, step): for any hosts, workers and restarts."""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import clips
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videomae_jax.data import decode, pipeline, processes, randaugment, reading, sources

CLIP = pipeline.PretrainClip(frames=4, stride=1, size=(16, 16))
MIDDLE = pipeline.MiddleClip(frames=4, stride=1, size=(16, 16))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> sources.VideoSource:
    """Seven videos, one of them broken."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for i in range(6):
        clips.write(folder / f"{i}.mp4", rng.integers(0, 256, (9, 24, 32, 3), dtype=np.uint8))
    (folder / "broken.mp4").write_bytes(b"no video")
    return sources.from_folder(folder)


def read(source, steps, *, hosts=1, workers=0, threads=1, start=0, seed=3, batch_size=4, clip=CLIP):
    """Global batches from the parts of simulated hosts."""
    parts = [
        pipeline.iterate(
            pipeline.clips(
                source, clip, seed=seed, batch_size=batch_size, start_step=start, host=host, hosts=hosts
            ),
            batch_size // clip.clips_per_video // hosts,
            workers=workers,
            threads=threads,
        )
        for host in range(hosts)
    ]
    found = []
    for _ in range(steps):
        rows = [next(part) for part in parts]
        # Host h holds every hosts-th video of the batch: put them back in the order of the stream.
        found.append({name: interleave([row[name] for row in rows], clip) for name in rows[0]})
    for part in parts:
        part.close()
    return found


def interleave(parts, clip):
    videos = [part.reshape(-1, clip.clips_per_video, *part.shape[1:]) for part in parts]
    return np.stack(videos, 1).reshape(-1, *parts[0].shape[1:])


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
        "num_frames": "int32",
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


@pytest.mark.parametrize(("hosts", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_several_clips_of_each_video(source, hosts, workers):
    """Four crops of the same frames; the global batch is the same for any hosts and workers."""
    four = dataclasses.replace(CLIP, clips_per_video=4)
    batches = read(source, 6, hosts=hosts, workers=workers, batch_size=8, clip=four)
    assert_same(batches, read(source, 6, batch_size=8, clip=four))
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, np.arange(48))
    records = np.concatenate([batch["record"] for batch in batches]).reshape(12, 4)
    assert (records == records[:, :1]).all()
    assert len(set(records[:7, 0])) == 7
    videos = np.concatenate([batch["video"] for batch in batches]).reshape(12, 4, -1)
    weights = np.concatenate([batch["weight"] for batch in batches]).reshape(12, 4)
    assert all(len(np.unique(v, axis=0)) > 1 for v, w in zip(videos, weights, strict=True) if w.all())
    with pytest.raises(ValueError, match="batch size 6 is not a multiple of 1 hosts of 4 clips"):
        pipeline.clips(source, four, seed=0, batch_size=6)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_once_is_every_video_once_padded_with_weight_0(source, hosts, workers):
    batches = [
        list(
            pipeline.iterate(
                pipeline.once(source, MIDDLE, 4, host=host, hosts=hosts),
                4 // hosts,
                workers=workers,
                threads=2,
            )
        )
        for host in range(hosts)
    ]
    assert [len(part) for part in batches] == [2] * hosts  # 7 videos in batches of 4
    rows = [batch for part in batches for batch in part]
    records = np.concatenate([row["record"] for row in rows])
    weights = np.concatenate([row["weight"] for row in rows])
    assert sorted(records.tolist()) == [-1, *range(7)]
    assert weights.sum() == 6  # not the broken one, not the padding
    assert weights[records == -1] == 0
    assert {row["video"].shape for row in rows} == {(4 // hosts, 4, 16, 16, 3)}


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_each_id_once_per_epoch(source, hosts, workers):
    """Seven videos in batches of four: the counts divide nothing, epochs run across batches."""
    records = np.concatenate([b["record"] for b in read(source, 7, hosts=hosts, workers=workers)])
    assert (np.sort(records.reshape(4, 7), axis=1) == np.arange(7)).all()


@pytest.mark.parametrize(
    ("asked", "cores", "expected"),
    [
        ((-1, -1), 1, (0, 1)),
        ((-1, -1), 3, (0, 3)),
        ((-1, -1), 4, (2, 2)),
        ((-1, -1), 112, (56, 2)),
        ((8, -1), 16, (8, 2)),
        ((0, -1), 16, (0, 16)),
        ((-1, 2), 16, (8, 2)),
        ((3, 5), 4, (3, 5)),
    ],
)
def test_the_loader_fills_the_cores_and_no_more(asked, cores, expected):
    size = pipeline.loader_size(*asked, cores, 2**20, 2**40)
    assert size[:2] == expected
    assert str(cores) in size.reason
    assert ("more threads than cores" in size.reason) == (max(size.workers, 1) * size.threads > cores)


@given(
    st.integers(1, 256),
    st.sampled_from([(-1, -1), (-1, 2)]),
    st.integers(2**20, 2**30),
    st.integers(2**33, 2**37),
)
def test_the_loader_holds_no_more_than_it_may(cores, asked, batch_bytes, limit):
    size = pipeline.loader_size(*asked, cores, batch_bytes, limit)
    assert size.bytes <= limit
    free = pipeline.loader_size(*asked, cores, batch_bytes, 2**60)
    assert size.workers == free.workers or f"as many as fit {limit / 2**30:.0f} GiB" in size.reason


def test_usable_cores(monkeypatch, tmp_path):
    assert 1 <= processes.usable_cores() <= os.cpu_count()
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(processes.pathlib, "Path", lambda _: quota)
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: set(range(32)))
    for text, cores in (("max 100000", 32), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 32)):
        quota.write_text(text)
        assert processes.usable_cores() == cores


def test_a_killed_worker_is_an_error(source):
    """The system may kill a loader process for want of memory: the reader must not wait for ever."""
    iterator = pipeline.iterate(pipeline.clips(source, CLIP, seed=0, batch_size=4), 4, workers=1, threads=1)
    next(iterator)
    children = multiprocessing.active_children()
    assert children
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="terminated"):
        collections.deque(itertools.islice(iterator, 100), maxlen=0)


def test_middle_clips_are_fixed_and_name_what_fails(source):
    found, ids, bad = pipeline.middle_clips(source, MIDDLE)
    again, _, _ = pipeline.middle_clips(source, MIDDLE)
    np.testing.assert_array_equal(found, again)
    assert found.shape == (6, 4, 16, 16, 3)
    assert ids == [f"{i}.mp4" for i in range(6)]
    assert list(bad) == ["broken.mp4"]


def test_workers_die_with_a_killed_parent(source, tmp_path):
    script = tmp_path / "loader.py"
    script.write_text(f"""
import time
from absl import flags
from videomae_jax.data import pipeline, processes, randaugment, sources
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


@pytest.mark.parametrize(("hosts", "workers"), [(1, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("stride", [1, 0])
def test_finetuning_clips(source, stride, hosts, workers):
    """Repeated augmentation: two clips of each video with choices of their own, the same for any layout."""
    policy = randaugment.parse("rand-m7-n4-mstd0.5-inc1")
    clip = pipeline.FinetuneClip(4, stride, (16, 16), policy, erasing=0.5, clips_per_video=2)
    batches = read(source, 4, batch_size=4, clip=clip, hosts=hosts, workers=workers)
    assert_same(batches, read(source, 4, batch_size=4, clip=clip))
    erase = np.concatenate([batch["erase"] for batch in batches])
    assert erase.shape == (16, 4)
    assert erase.dtype == np.int32
    assert 0 < (erase[:, 2] > 0).sum() < 16
    for batch in batches:
        assert batch["video"].shape == (4, 4, 16, 16, 3)
        good = batch["weight"].reshape(2, 2)[:, 0] == 1
        first, second = batch["video"].reshape(2, 2, -1).swapaxes(0, 1)
        assert (first[good] != second[good]).any(axis=1).all()


def test_clips_are_merged_without_a_copy():
    video = np.zeros((3, 2, 4, 8, 8, 3), np.uint8)
    fields = {"label": np.arange(3), "index": np.arange(3, dtype=np.uint32)}
    merged = pipeline._merged({"video": video, **fields})
    assert np.shares_memory(merged["video"], video)
    assert merged["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert merged["index"].tolist() == list(range(6))
    assert merged["index"].dtype == np.uint32


def test_repeated_augmentation_decodes_once(tmp_path, monkeypatch):
    """As published: the clips of a video show the same frames, each augmented by itself."""
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(40, 32, 32))
    reads, plain = [], decode.Video.read
    monkeypatch.setattr(decode.Video, "read", lambda self, *args: reads.append(1) or plain(self, *args))
    clip = pipeline.FinetuneClip(4, 2, (16, 16), flip=False, erasing=0.0, clips_per_video=3)
    record = {"video": path, "name": "a", "label": 0, "record": 0, "error": ""}
    made = clip.random_map((0, record), np.random.default_rng(0))["video"]
    numbers = [clips.frame_numbers(one) for one in made]
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(reads) == 1


def test_a_second_try_draws_what_the_first_one_did(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(60, 48, 64))
    monkeypatch.setattr(reading, "_PAUSES", (0.0, 0.0))
    record = {"video": path, "name": "a", "label": 0, "record": 0, "error": ""}
    plain, fails = decode.Video.each, [False, True]

    def unsteady(self, *args):
        frames = plain(self, *args)
        yield next(frames)
        if fails.pop(0):
            raise decode.ReadError("outage")
        yield from frames

    monkeypatch.setattr(decode.Video, "each", unsteady)
    clip = pipeline.PretrainClip(frames=4, stride=2, size=(32, 32))
    fails[:] = [False]
    first = clip.random_map((0, record), np.random.default_rng(3))
    fails[:] = [True, False]
    second = clip.random_map((0, record), np.random.default_rng(3))
    assert (first["weight"], second["weight"], fails) == (1, 1, [])
    np.testing.assert_array_equal(second["video"], first["video"])


def test_a_folder_that_cannot_be_listed_and_a_video_of_one_pixel(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(reading, "_PAUSES", (0.0, 0.0))
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.gif")
    clip = pipeline.PretrainClip(frames=2, stride=1, size=(32, 32))
    record = {"video": str(tmp_path / "dot.gif"), "name": "dot", "label": 0, "record": 0, "error": ""}
    assert clip.random_map((0, record), np.random.default_rng(0))["weight"] == 1

    def fails(_folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "listdir", fails)
    made = clip.random_map((0, record | {"video": str(tmp_path)}), np.random.default_rng(0))
    assert (made["weight"], made["error"]) == (0, f"{tmp_path}: cannot be read (Input/output error)")


def test_reading_is_tried_again_and_decoding_is_not(tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(8, 32, 32))
    tries, plain = [], reading.open_video
    monkeypatch.setattr(reading, "_PAUSES", (0.0, 0.0))
    clip = pipeline.MiddleClip(4, 1, (16, 16))
    record = {"video": path, "name": "a", "label": 0, "record": 0, "error": ""}
    for kind, failures, weight in (
        (decode.ReadError, 2, 1),
        (decode.ReadError, 3, 0),
        (decode.DecodeError, 1, 0),
    ):
        tries.clear()

        def opened(*args, kind=kind, failures=failures):
            tries.append(1)
            if len(tries) <= failures:
                raise kind("outage")
            return plain(*args)

        monkeypatch.setattr(reading, "open_video", opened)
        made = clip.map((0, record))
        assert made["weight"] == weight
        assert len(tries) == (3 if kind is decode.ReadError else 1)


def test_each_clip_of_a_video_is_erased_elsewhere(tmp_path):
    path = clips.write(tmp_path / "a.mp4", clips.numbered_frames(20, 32, 32))
    clip = pipeline.FinetuneClip(4, 1, (16, 16), flip=False, erasing=1.0, clips_per_video=3)
    record = {"video": path, "name": "a", "label": 0, "record": 0, "error": ""}
    made = clip.random_map((0, record), np.random.default_rng(0))
    assert len(np.unique(made["erase"], axis=0)) == 3
