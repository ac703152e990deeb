"""Prepared data: exact frames, the same bytes whoever writes them, resumable, checked."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import clips
import numpy as np
import pytest
import tensorflow_datasets as tfds

from videomae_jax.apps import prepare as command
from videomae_jax.data import decode, images, pipeline, prepare, prepared, reading, sources
from videomae_jax.data.collection import Entry


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """Ten videos in two classes and two splits, one of them broken."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for i in range(count):
            frames = np.repeat(np.repeat(rng.integers(0, 256, (12, 8, 12, 3), dtype=np.uint8), 4, 1), 4, 2)
            clips.write(root / split / ("run" if i % 2 else "walk") / f"{i}.mp4", frames)
    (root / "train" / "run" / "broken.mp4").write_bytes(b"no video")
    return root


def run(source, folder, **options) -> dict:
    command.run(str(source), str(folder), command.Options(**{"processes": 1, "shard_videos": 3, **options}))
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def done(videos, tmp_path_factory) -> pathlib.Path:
    """`videos` prepared with the defaults, three videos per shard."""
    folder = tmp_path_factory.mktemp("prepared") / "own"
    run(videos, folder)
    return folder


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_manifest(done, videos):
    manifest = prepared.read_manifest(str(done))
    assert manifest["records"] == 10
    assert manifest["splits"]["train"] == {"records": 8, "shard_lengths": [3, 2, 3]}
    assert manifest["splits"]["validation"] == {"records": 2, "shard_lengths": [2]}
    assert manifest["classes"] == ["run", "walk"]
    (failure,) = manifest["failed"]
    assert failure["id"] == "run/broken.mp4"
    assert "cannot be opened" in failure["reason"]
    assert not list(done.glob(".*"))


def test_tfds_opens_it_by_its_ordinary_api(done, videos):
    builder = tfds.builder_from_directory(done)
    assert builder.info.features["label"].names == ["run", "walk"]
    found = builder.as_data_source("train")
    assert len(found) == 8
    assert "tensorflow" not in sys.modules
    record = found[0]
    assert (record["id"], record["label"], record["frames"], record["fps"]) == (b"run/1.mp4", 0, 12, 10.0)
    assert (record["height"], record["width"]) == (32, 48)
    with reading.open_video(record["video"]) as video:
        assert video.num_frames == 12


def test_tfds_finds_it_by_name(done):
    import tensorflow_datasets as tfds

    name = prepared.read_manifest(str(done))["name"]
    found, direct = (
        tfds.data_source(name, data_dir=done, split="train"),
        tfds.builder_from_directory(done).as_data_source("train"),
    )
    assert [record["id"] for record in found] == [record["id"] for record in direct]
    assert tfds.builder(name, data_dir=done).info.features["label"].names == ["run", "walk"]


def test_the_loader_reads_it_like_files(done, videos):
    clip = pipeline.PretrainClip(4, 1, (16, 16))
    source = prepared.open_source(str(done), "train")
    assert source.ids == tuple(i for i in sources.from_folder(videos / "train").ids if "broken" not in i)
    batches = [
        next(pipeline.iterate(pipeline.clips(source, clip, seed=0, batch_size=8), 8, workers=w, threads=2))
        for w in (0, 1)
    ]
    np.testing.assert_array_equal(batches[0]["video"], batches[1]["video"])
    assert sorted(batches[0]["record"]) == list(range(8))
    assert (batches[0]["weight"] == 1).all()
    few = source.select([6, 1])
    assert few.ids == (source.ids[6], source.ids[1])
    assert digest_of(few[1]) == digest_of(source[1])
    assert source.fingerprint() != few.fingerprint()


def digest_of(record: sources.Record) -> str:
    with reading.open_video(record["video"]) as video:
        return video.digest()


@pytest.mark.parametrize("way", ["again", "two processes", "parts"])
def test_all_ways_give_the_same_bytes(done, videos, tmp_path, way):
    folder = tmp_path / "own"
    if way == "parts":
        for part in (2, 0, 1):
            command.run(
                str(videos), str(folder), command.Options(processes=1, shard_videos=3, part=f"{part}/3")
            )
            assert not prepared.is_prepared(str(folder))
        run(videos, folder, finish=True)
    else:
        run(videos, folder, processes=2 if way == "two processes" else 1)
    assert contents(folder) == contents(done)


def assert_session_ends(session: int) -> None:
    """Waits until no process of a session is left (Python's resource tracker ends with the last one)."""
    for _ in range(100):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("encoders outlived their killed parent")


def test_killed_at_random_points_and_run_again(done, videos, tmp_path):
    folder = tmp_path / "own"
    words = [sys.executable, "-m", "videomae_jax", "prepare", str(videos), str(folder)]
    words += ["--processes=1", "--shard_videos=3"]
    moments = random.Random(0)
    for sign in ("prepare.json", ".partial-*", ".reports/*-00000.json", ".reports/*-00001.json"):
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while not list(folder.glob(sign)) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_session_ends(process.pid)
        assert not (folder / "manifest.json").exists()
    subprocess.run(words, check=True, capture_output=True)
    assert contents(folder) == contents(done)


def test_a_shard_that_is_written_is_not_written_again(done, videos, tmp_path, monkeypatch):
    job = command._job(str(videos), str(tmp_path / "own"), command.Options(shard_videos=3))
    prepare.claim(job)
    prepare.write(job, prepare.pending(job)[:2], 1)
    assert len(prepare.pending(job)) == 2
    written = []
    plain = prepare.write_shard
    monkeypatch.setattr(prepare, "write_shard", lambda j, s, v: written.append(s.number) or plain(j, s, v))
    prepare.run(job, 1)
    assert len(written) == 2
    assert contents(tmp_path / "own") == contents(done)
    assert prepare.run(job, 1) == prepared.read_manifest(job.folder)  # finished: nothing to do


def test_damage_is_found_and_named(done, tmp_path, capsys):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    run_check = command.Options(check=True)
    command.run("-", str(tmp_path), run_check)
    assert "all 10 records are as written" in capsys.readouterr().out
    shard = next(p for p in tmp_path.iterdir() if "train.array_record-00001" in p.name)
    data = bytearray(shard.read_bytes())
    row = prepared.read_rows(str(tmp_path))[3]  # the first one of this shard
    place = data.find(images.MAGIC, int(row["bytes"]))
    data[place + 200] ^= 255
    shard.write_bytes(data)
    with pytest.raises(command.UserError, match="damaged in 1 places"):
        command.run("-", str(tmp_path), run_check)
    assert f"{shard.name}, record 1 (" in capsys.readouterr().out
    source = prepared.open_source(str(tmp_path), "train")
    bad = [record for record in map(source.__getitem__, range(len(source))) if record["error"]]
    assert len(bad) == 1, [record["error"] for record in bad]
    assert f"{shard.name}, record 1 ({source.ids[bad[0]['record']]}): cannot be read" in bad[0]["error"]
    shard.unlink()
    with pytest.raises(command.UserError):
        command.run("-", str(tmp_path), run_check)
    assert f"{shard.name}: is absent" in capsys.readouterr().out


def copied(done, tmp_path) -> pathlib.Path:
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("codec", ["mjpeg", "jpeg"])
def test_labels_of_exchanged_shards_are_refused(done, videos, tmp_path, codec):
    """Two shards of equal length: without looking closer, each video would have another's label."""
    if codec == "jpeg":
        folder = copied(done, tmp_path)
    else:
        run(videos, folder := tmp_path / "own", codec=codec)
    first, last = (folder / prepared.shard_name("own0", "train", i, 3) for i in (0, 2))
    first.rename(tmp_path / "x"), last.rename(first), (tmp_path / "x").rename(last)
    source = prepared.open_source(str(folder), "train")
    for i in (0, 1, 2, 5, 6, 7):
        record = source[i]
        assert record["video"] == b""
        # JPEGs are looked for where they stood in the right shard.
        said = f"({source.ids[i]}): {'holds ' if codec == 'mjpeg' else 'cannot be read '}"
        assert said in record["error"]
    assert source[3]["error"] == ""
    assert len(list(prepared.damage(str(folder)))) == 6


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda f: (f / "own0-train.array_record-00001-of-00003").unlink(), "00001-of-00003: is absent"),
        (
            lambda f: shutil.copy(
                f / "own0-train.array_record-00001-of-00003", f / "a.array_record-00000-of-00001"
            ),
            "a.array_record-00000-of-00001: is no shard of this data set",
        ),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace('"run",\n  "walk"', '"walk",\n  "run"')
            ),
            "its classes, head or features are not those prepared",
        ),
        (lambda f: (f / "label.labels.txt").write_text("walk\nrun\n"), "label.labels.txt has other classes"),
        (
            lambda f: (f / "records.csv").write_text(
                (f / "records.csv").read_text().replace("1.mp4,0,", "1.mp4,1,")
            ),
            "records.csv does not match",
        ),
    ],
)
def test_what_check_finds(done, tmp_path, change, fault):
    folder = copied(done, tmp_path)
    assert list(prepared.damage(str(folder))) == []
    change(folder)
    assert any(fault in found for found in prepared.damage(str(folder)))


def test_finish_refuses_a_missing_shard(videos, tmp_path):
    for part in ("0/2", "1/2"):
        command.run(str(videos), str(tmp_path), command.Options(processes=1, shard_videos=3, part=part))
    (tmp_path / prepared.shard_name("own0", "train", 1, 3)).unlink()
    with pytest.raises(prepare.PrepareError, match=r"1 of 4 shards .* the first is .*-00001-of"):
        run(videos, tmp_path, finish=True)
    (tmp_path / prepared.shard_name("own0", "train", 1, 3)).write_bytes(b"")
    with pytest.raises(sources.SourceError, match=r"-00001-of-00003: .*remove it"):
        run(videos, tmp_path, finish=True)


def test_videos_that_could_not_be_read_are_tried_again(videos, done, tmp_path, monkeypatch, capsys):
    """An outage is not a verdict: a run ends with an error above --max_failed, and mends what it can."""
    root, out = tmp_path / "own0", tmp_path / "out"
    shutil.copytree(videos, root)
    away = [root / "train" / "walk" / f"{i}.mp4" for i in (2, 4)]
    job = command._job(str(root), str(out), command.Options(shard_videos=3))
    for path in away:  # after the folder was looked through
        path.rename(path.with_suffix(".away"))
    with pytest.raises(
        prepare.PrepareError, match=r"3 of 11 videos failed.*tries the 2 again that could not"
    ):
        prepare.run(job, 1, max_failed=0.2)
    assert not (out / "manifest.json").exists()
    manifest = prepare.run(job, 1, max_failed=0.5)
    assert sorted((f["id"], f["is_final"]) for f in manifest["failed"]) == [
        ("run/broken.mp4", True),
        ("walk/2.mp4", False),
        ("walk/4.mp4", False),
    ]
    for path in away:
        path.with_suffix(".away").rename(path)
    assert run(root, out)["hash"] == json.loads((done / "manifest.json").read_text())["hash"]
    assert contents(out)["records.csv"] == contents(done)["records.csv"]
    assert list(prepared.damage(str(out))) == []
    # What cannot be decoded is final, unless it is said that it was mended.
    shutil.copy(away[0], root / "train" / "run" / "broken.mp4")
    assert run(root, out)["records"] == 10
    manifest = run(root, out, retry_failed=True)
    assert (manifest["records"], manifest["failed"]) == (11, [])
    assert list(prepared.damage(str(out))) == []


def test_failed_videos_are_tried_again_before_a_folder_was_ever_finished(videos, tmp_path):
    root, out = tmp_path / "own0", tmp_path / "out"
    shutil.copytree(videos, root)
    with pytest.raises(prepare.PrepareError, match="1 of 11 videos failed"):
        run(root, out, max_failed=0.0)
    good, broken = (root / "train" / name for name in ("walk/2.mp4", "run/broken.mp4"))
    shutil.copy(good, broken)
    with pytest.raises(prepare.PrepareError, match="1 of 11 videos failed"):
        run(root, out, max_failed=0.0)
    assert run(root, out, max_failed=0.0, retry_failed=True)["failed"] == []


def test_targets_are_prepared(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        clips.write(tmp_path / name, clips.numbered_frames(4))
    (tmp_path / "l.csv").write_text("a.mp4,0.5;-1\nb.mp4,2;1e-9\n")
    with pytest.raises(sources.SourceError, match=r"line 1: '0\.5;-1' is several classes"):
        run(tmp_path / "l.csv", tmp_path / "x")
    for head, text, targets in (
        ("regression", "a.mp4,0.5;-1\nb.mp4,2;1e-9\n", ((0.5, -1.0), (2.0, 1e-9))),
        ("multilabel", "a.mp4,jump;run\nb.mp4,;\n", ((1.0, 1.0), (0.0, 0.0))),
    ):
        (tmp_path / "l.csv").write_text(text)
        run(tmp_path / "l.csv", tmp_path / head, head=head)
        source = prepared.open_source(str(tmp_path / head), "train", head)
        assert (source.targets, source.labels, source.head) == (targets, (-1, -1), head)
        stored = tfds.builder_from_directory(str(tmp_path / head)).as_data_source("train")
        np.testing.assert_allclose([record["target"] for record in stored], targets)
        with pytest.raises(sources.SourceError, match=f"is prepared for {head}, not for head.kind=softmax"):
            prepared.open_source(str(tmp_path / head), "train")


def test_what_is_there_is_not_overwritten(videos, done, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(prepare.PrepareError, match=r"holds something else \(notes.txt\)"):
        run(videos, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    before = contents(done)
    with pytest.raises(prepare.PrepareError, match="codec: jpeg -> mjpeg"):
        run(videos, done, codec="mjpeg")
    with pytest.raises(prepare.PrepareError, match="is a file"):
        run(videos, done / "manifest.json")
    assert contents(done) == before


def test_a_newer_format_is_refused(done, tmp_path, videos):
    for name in ("manifest.json", "prepare.json"):
        found = json.loads((done / name).read_text()) | {"format": 4}
        (tmp_path / name).write_text(json.dumps(found))
    with pytest.raises(sources.SourceError, match="has format 4, this version reads up to 3: update"):
        prepared.open_source(str(tmp_path), "train")
    with pytest.raises(prepare.PrepareError, match="has format 4, this version writes 3: update"):
        run(videos, tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dataset": "kinetics"}, "--dataset=kinetics is unknown: use video_folder, kinetics400"),
        ({"codec": "av1"}, "--codec=av1 is unknown: use jpeg"),
        ({"short_side": 0}, "--short_side=0 must be positive"),
        ({"part": "3/3"}, "--part=3/3 is not understood"),
        ({"part": "1"}, "--part=1 is not understood"),
    ],
)
def test_wrong_options(videos, tmp_path, options, text):
    with pytest.raises(command.UserError) as error:
        run(videos, tmp_path, **options)
    assert text in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unfinished_parts_are_named(videos, tmp_path):
    command.run(str(videos), str(tmp_path), command.Options(processes=1, shard_videos=3, part="0/2"))
    with pytest.raises(prepare.PrepareError, match=r"2 of 4 shards .* the first is .*-00001-of"):
        run(videos, tmp_path, finish=True)


def test_a_finished_folder_is_not_begun_again_in_parts(done, tmp_path, videos):
    shutil.copytree(done, tmp_path / "copy")
    with pytest.raises(prepare.PrepareError, match="is finished but for 1 videos: leave out --part"):
        run(videos, tmp_path / "copy", part="0/2", retry_failed=True)
    assert run(videos, tmp_path / "copy", part="0/2") == json.loads((done / "manifest.json").read_text())


def test_a_full_disk_is_one_line_and_nothing_is_lost(videos, tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full:
        def __init__(self, *_):
            pass

        def write(self, _data):
            raise RuntimeError("write() failed: No space left on device; writing x")

        def close(self):
            pass

    job = command._job(str(videos), str(tmp_path), command.Options(shard_videos=3))
    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(prepare.PrepareError, match=r"no space left in .*: free some"):
            prepare.run(job, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"prepare.json"}
    assert prepare.run(job, 1)["records"] == 10


def test_a_killed_encoder_is_one_line(videos, tmp_path):
    job = command._job(str(videos), str(tmp_path), command.Options(shard_videos=3))
    prepare.claim(job)
    entry = Entry("stop", str(videos / "train" / "run" / "1.mp4"))
    shard = prepare.Shard("train", 0, 1, (entry,))
    import multiprocessing
    import threading

    def kill():
        for _ in range(100):
            time.sleep(0.1)
            for child in multiprocessing.active_children():
                child.kill()
                return

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(prepare.PrepareError, match="a worker process was killed"):
        prepare.write(job, [shard], 1)
    thread.join()
    assert not (tmp_path / ".reports").exists()


def test_frame_folders_are_prepared_too(tmp_path):
    from PIL import Image

    folder = tmp_path / "frames" / "jump" / "video1"
    folder.mkdir(parents=True)
    for i, frame in enumerate(clips.numbered_frames(12)):
        Image.fromarray(frame).save(folder / f"img_{i + 1}.png")
    manifest = run(tmp_path / "frames", tmp_path / "out")
    assert (manifest["records"], manifest["frames"]) == (1, 12)
    record = prepared.open_source(str(tmp_path / "out"), "train")[0]
    assert clips.frame_numbers(reading.open_video(record["video"]).read(range(12))) == list(range(12))


def test_a_prepared_folder_is_not_prepared_again(done, tmp_path):
    with pytest.raises(sources.SourceError, match="is prepared already"):
        run(done, tmp_path)


def test_what_cannot_be_encoded_is_left_out_and_named(tmp_path):
    """A frame too small for 4:2:0, beside a good video: the others are prepared."""
    clips.write(tmp_path / "in" / "good.mp4", clips.numbered_frames(5))
    with decode.av.open(str(tmp_path / "in" / "thin.mkv"), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1, 8, "gray"
        for frame in clips.numbered_frames(5, 8, 1):
            container.mux(stream.encode(decode.av.VideoFrame.from_ndarray(frame[..., 0], format="gray")))
        container.mux(stream.encode(None))
    assert decode.read_clip(tmp_path / "in" / "thin.mkv", [0]).shape == (1, 8, 1, 3)
    manifest = run(tmp_path / "in", tmp_path / "out", max_failed=0.5)
    assert manifest["records"] == 1
    assert "thin.mkv: cannot be encoded as jpeg" in manifest["failed"][0]["reason"]


def test_a_folder_of_the_format_before_is_gone_on_with(videos, tmp_path):
    """Only the form that is new needs a new version to be read."""
    for codec, known in (("h264_intra", 2), ("jpeg", 3)):
        run(videos, tmp_path / codec, codec=codec)
        assert prepared.read_manifest(str(tmp_path / codec))["format"] == known
    before = (tmp_path / "h264_intra" / "manifest.json").read_bytes()
    run(videos, tmp_path / "h264_intra", codec="h264_intra")
    assert (tmp_path / "h264_intra" / "manifest.json").read_bytes() == before
