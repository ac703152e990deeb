"""Parts of records: the bytes that ArrayRecord's own reader gives, without reading the rest."""

import hashlib
import os
import pathlib
import shutil

import clips
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from videomae_jax.data import decode, images, index, pipeline, prepare, prepared, ranges, sources, transcode
from videomae_jax.data.collection import Collection, Entry

# Around the size of Riegeli's blocks, 64 KiB less 24 bytes, and above several.
LENGTHS = [1, 9, 65_400, 65_488, 65_511, 65_512, 65_513, 40, 200_000, 3, 131_024, 7, 700_000, 12]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[pathlib.Path, list[bytes], list[ranges.Written]]:
    """A file of records, each some other bytes and a value."""
    rng = np.random.default_rng(0)
    values = [b"value%d" % i + rng.bytes(length) for i, length in enumerate(LENGTHS * 3)]
    path = tmp_path_factory.mktemp("records") / "a.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    about = []
    for value in values:
        before, after = rng.bytes(rng.integers(9000)), rng.bytes(rng.integers(300))
        writer.write(before + value + after)
        length = len(before + value + after)
        about.append(ranges.Written(value[:10], len(value), hashlib.sha256(value).digest(), length))
    writer.close()
    return path, values, about


def test_a_part_is_what_the_whole_record_has_there(written):
    path, values, about = written
    reader, rng = ArrayRecordReader(str(path)), np.random.default_rng(1)
    for i, (value, place) in enumerate(zip(values, ranges.places(str(path), about), strict=True)):
        found = ranges.Value(str(path), place, len(value))
        assert found[:] == value
        assert value in reader.read([i])[0]
        assert len(found) == len(value)
        for start, stop in np.sort(rng.integers(0, len(value) + 1, (30, 2))):
            assert found[start:stop] == value[start:stop]
        assert found[-3:] == value[-3:]


def test_what_was_not_written_so_has_no_place(written, tmp_path):
    path, _, about = written
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a").write_bytes(data)
    for file, expected in ((path, [about[0], about[9]]), (path, about[::-1]), (tmp_path / "a", about)):
        with pytest.raises(decode.ReadError, match="is not found as it was written"):
            list(ranges.places(str(file), expected))


def test_a_file_that_ends_or_is_not_there(written, tmp_path):
    path, values, about = written
    *_, last = ranges.places(str(path), about)
    (tmp_path / "cut").write_bytes(path.read_bytes()[: last + 5])
    with pytest.raises(decode.ReadError, match="cut: is cut off"):
        ranges.Value(str(tmp_path / "cut"), last, len(values[-1]))[:]
    with pytest.raises(decode.ReadError, match="none: cannot be read \\(No such file"):
        ranges.Value(str(tmp_path / "none"), 0, 10)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> pathlib.Path:
    """Two videos of 100 noisy frames, prepared."""
    folder, rng = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    for name in "ab":
        clips.write(folder / f"{name}.mp4", rng.integers(0, 256, (100, 64, 96, 3), dtype=np.uint8))
    entries = [Entry(name, str(folder / name)) for name in ("a.mp4", "b.mp4")]
    job = prepare.Job(Collection("some", {"train": entries}), str(folder / "out"), transcode.Form(), 8)
    prepare.run(job, 1)
    return folder / "out"


def test_a_clip_reads_little_more_than_its_frames(stored, monkeypatch):
    source = prepared.open_source(str(stored), "train")
    read, plain = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, n, at: (read.append(n), plain(file, n, at))[1])
    clip = pipeline.PretrainClip(frames=4, stride=2, size=(32, 32))
    made = clip.random_map((0, source[1]), np.random.default_rng(0))
    assert made["weight"] == 1
    length = int(source.table.lengths[1])
    assert len(read) == 5  # the table, and four frames
    assert sum(read) < 2**13 + 5 / 100 * length < length / 5


def test_of_a_file_in_a_store_one_request_takes_all_frames(stored, bucket, monkeypatch):
    import fsspec

    shutil.copytree(stored, bucket / "some")
    asked, kind = [], type(fsspec.filesystem("gs"))
    plain = kind.cat_file
    monkeypatch.setattr(kind, "cat_file", lambda self, *a, **kw: (asked.append(kw), plain(self, *a, **kw))[1])
    local = prepared.open_source(str(stored), "train")
    remote = prepared.open_source("gs://bucket/some", "train")
    with remote[0]["video"] as video, local[0]["video"] as expected:
        np.testing.assert_array_equal(video.read([3, 9, 30]), expected.read([3, 9, 30]))
    assert len(asked) == 2
    assert asked[1]["end"] - asked[1]["start"] < 0.3 * int(local.table.lengths[0])


def test_indexes_of_stores_are_kept_apart(stored, bucket, tmp_path, monkeypatch):
    """The same records in other shards have the same hash, and other places."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entries = [Entry(name, str(stored.parent / name)) for name in ("a.mp4", "b.mp4")]
    job = prepare.Job(Collection("some", {"train": entries}), str(bucket / "apart"), transcode.Form(), 1)
    assert prepare.run(job, 1)["hash"] == prepared.read_manifest(str(stored))["hash"]
    shutil.copytree(stored, bucket / "together")
    for name in ("together", "apart"):
        source = prepared.open_source(f"gs://bucket/{name}", "train")
        assert [source[i]["error"] for i in (0, 1)] == ["", ""]
        with source[1]["video"] as video:
            video.read([0, 99])
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(sources.SourceError, match=r"cannot be written .*set XDG_CACHE_HOME to another"):
        prepared.open_source("gs://bucket/apart", "train")


def test_another_video_in_its_place_is_refused(stored, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(stored, folder)
    places = np.load(folder / "index" / "train-places.npy")
    lengths = np.load(folder / "index" / "train-lengths.npy")
    np.save(folder / "index" / "train-places.npy", places[::-1])
    np.save(folder / "index" / "train-lengths.npy", lengths[::-1])
    source = prepared.open_source(str(folder), "train")
    for record in (source[0], source[1]):
        assert record["video"] == b""
        assert f"({record['name']}): holds another video, so its label would be" in record["error"]
    assert len(list(prepared.damage(str(folder)))) == 3  # the index, and both videos


def test_a_wrong_byte_anywhere_is_noticed(stored):
    source = prepared.open_source(str(stored), "train")
    with source[0]["video"] as video:
        data = video._data[:]
    for place in range(0, len(data), 997):
        wrong = bytearray(data)
        wrong[place] ^= 1
        with pytest.raises(decode.DecodeError, match="is damaged"), images.JpegFrames(bytes(wrong)) as video:
            video.read(range(100))


def test_an_index_is_made_of_the_table_of_records(stored, tmp_path):
    """As for folders of versions that had none."""
    folder = tmp_path / "copy"
    shutil.copytree(stored, folder)
    shutil.rmtree(folder / index.FOLDER)
    plain, made = (prepared.open_source(str(place), "train") for place in (stored, folder))
    assert not index.differs(plain.table, made.table)
    assert isinstance(plain.table.places, np.memmap)
    assert not isinstance(made.table.places, np.memmap)
    assert (made.ids, made.labels) == (plain.ids, plain.labels)
    np.save(stored.parent / "x.npy", plain.table.labels[:1])
    shutil.copytree(stored, tmp_path / "cut")
    shutil.copy(stored.parent / "x.npy", tmp_path / "cut" / "index" / "train-labels.npy")
    with pytest.raises(prepared.SourceError, match="1 of 2 records of train are in its index"):
        prepared.open_source(str(tmp_path / "cut"), "train")
    (tmp_path / "cut" / "index" / "train-labels.npy").unlink()
    with pytest.raises(prepared.SourceError, match=r"index is damaged .*: prepare the data set again"):
        prepared.open_source(str(tmp_path / "cut"), "train")


def test_ten_thousand_opens_leave_nothing_open(stored):
    source = prepared.open_source(str(stored), "train")
    before = len(os.listdir("/proc/self/fd"))
    held = [source[i % 2]["video"] for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    del held
    for i in range(10_000):
        with source[i % 2]["video"] as video:
            assert video.num_frames == 100
    del video
    assert len(os.listdir("/proc/self/fd")) == before
