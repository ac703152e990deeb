"""Prepared folders as the loader opens them: many shards, many threads, classes, entries."""

import concurrent.futures
import pathlib
import subprocess
import sys
import time

import clips
import numpy as np
import pytest

from videomae_jax.apps import prepare as command
from videomae_jax.data import prepare, prepared, sources, transcode
from videomae_jax.data.builders.video_folder import video_folder
from videomae_jax.data.collection import Collection, Entry


def test_shards_are_opened_by_one_thread_at_a_time(monkeypatch):
    """TFDS's lazy imports, begun by two threads at once, can stand still for ever."""
    inside, most, made = [], [], []

    class Slow(prepared._Shards):
        def __init__(self, root, split):
            inside.append(split)
            most.append(len(inside))
            time.sleep(0.05)
            made.append((root, split))
            inside.pop()

    monkeypatch.setattr(prepared, "_Shards", Slow)
    prepared._opened.cache_clear()
    wanted = [("here", split) for split in ("train", "train", "test", "test")]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda pair: prepared._shards(*pair), wanted))
    prepared._opened.cache_clear()
    assert max(most) == 1
    assert sorted(made) == [("here", "test"), ("here", "train")]
    assert found[0] is found[1]


def test_more_shards_than_files_may_be_open(tmp_path):
    """With a limit of 100 open files, 300 shards are read at random."""
    clips.write(tmp_path / "in" / "a.mp4", clips.numbered_frames(3, 16, 16))
    entries = [Entry(str(i), str(tmp_path / "in" / "a.mp4")) for i in range(300)]
    job = prepare.Job(Collection("many", {"train": entries}), str(tmp_path / "out"), transcode.Form(), 1)
    encoded = prepare.encode(entries[0], job.form)
    prepare.claim(job)
    for shard in job.shards():
        prepare.write_shard(job, shard, iter([encoded]))
    prepare.finish(job)
    script = (
        "import resource, random, sys\n"
        "from videomae_jax.data import prepared\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "source = prepared.open_source(sys.argv[1], 'train')\n"
        "order = random.Random(0).sample(range(300), 300) * 2\n"
        "print(sum(not source[i]['error'] and source[i]['video'].num_frames == 3 for i in order))\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "out")]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.stdout == "600\n", found.stderr


def test_a_part_without_records_is_not_there(tmp_path):
    clips.write(tmp_path / "a.mp4", clips.numbered_frames(6))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    splits = {
        split: [Entry(name, str(tmp_path / name))]
        for split, name in (("train", "a.mp4"), ("test", "bad.mp4"))
    }
    prepare.run(
        prepare.Job(Collection("own", splits), str(tmp_path / "set"), transcode.Form(), 2), 1, max_failed=1.0
    )
    folder = str(tmp_path / "set")
    assert prepared.has_split(folder, "train")
    assert not prepared.has_split(folder, "test")
    assert [prepared.is_empty(folder, part) for part in ("train", "validation", "test")] == [
        False,
        False,
        True,
    ]
    assert not prepared.is_empty(str(tmp_path), "test")
    with pytest.raises(sources.SourceError, match=r"has no split test: it has train$"):
        prepared.open_source(folder, "test")


def test_parts_that_start_at_once_share_a_folder(tmp_path, monkeypatch):
    """Another one writes the settings while this one looks at the folder."""
    job = prepare.Job(Collection("own", {"train": []}), str(tmp_path / "set"), transcode.Form(), 2)
    plain, others = pathlib.Path.iterdir, [1]

    def late(self):
        if others.pop() if others else False:
            prepare.claim(job)
        return plain(self)

    monkeypatch.setattr(pathlib.Path, "iterdir", late)
    prepare.claim(job)
    assert [entry.name for entry in plain(tmp_path / "set")] == ["prepare.json"]


def test_ids_labels_and_absent_videos_are_checked():
    one = Entry("a", "a.mp4", 0)
    with pytest.raises(sources.SourceError, match="the id a is there twice"):
        Collection("x", {"train": [one, one]}, ("c",)).checked(False)
    with pytest.raises(sources.SourceError, match="a has label 3, of 1 classes"):
        Collection("x", {"train": [Entry("a", "", 3)]}, ("c",)).checked(False)
    lacking = Collection("x", {"train": [one]}, ("c",), absent={"train": ["b"]})
    with pytest.raises(sources.SourceError, match="1 of 2 videos are absent, the first is b"):
        lacking.checked(False)
    assert lacking.checked(True) is lacking
    with pytest.raises(sources.SourceError, match="no video to prepare"):
        Collection("x", {"train": []}, absent={"train": ["b"]}).checked(True)


def test_classes_of_a_split_that_lacks_some(tmp_path):
    for name in ("train/a/1.mp4", "train/b/2.mp4", "val/b/3.mp4"):
        clips.write(tmp_path / name, clips.numbered_frames(3))
    collection = video_folder(command.epath.Path(tmp_path), command.epath.Path(tmp_path), "softmax", False)
    assert collection.classes == ("a", "b")
    assert [entry.label for entry in collection.splits["validation"]] == [1]


@pytest.mark.parametrize("text", ['{"name": "x"}', '{"format": "1.0"}', "[1]"])
def test_the_manifest_of_something_else_makes_no_prepared_data(text, tmp_path, rng):
    clips.write(tmp_path / "0.mp4", rng.integers(0, 256, (4, 16, 16, 3), np.uint8))
    (tmp_path / "manifest.json").write_text(text)
    assert prepared.open_source(str(tmp_path), "train").ids == ("0.mp4",)


def test_a_folder_into_which_nothing_was_stored_may_be_begun_otherwise(tmp_path, rng):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    clips.write(tmp_path / "good.mp4", rng.integers(0, 256, (4, 16, 16, 3), np.uint8))
    options = command.Options(processes=1)
    (tmp_path / "list.csv").write_text("bad.mp4\n")
    with pytest.raises(prepare.PrepareError, match="none of 1 videos can be decoded"):
        command.run(str(tmp_path / "list.csv"), str(tmp_path / "prepared"), options)
    (tmp_path / "list.csv").write_text("good.mp4\n")
    command.run(str(tmp_path / "list.csv"), str(tmp_path / "prepared"), options)
    assert len(prepared.open_source(str(tmp_path / "prepared"), "train")) == 1
