"""Columns: as tuples are, but mapped into memory, and cheap to send to another process."""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videomae_jax.data import columns, sources

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=9)


def same(column: columns.Column, expected: tuple) -> None:
    assert len(column) == len(expected)
    assert column == expected
    assert tuple(column) == expected
    assert [column[i] for i in range(-len(expected), len(expected))] == [*expected, *expected]
    for part in (slice(1, 3), slice(None, None, 2), slice(3, None), slice(2, 2)):
        assert column[part] == expected[part]
    for outside in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            column[outside]


@settings(deadline=None)
@given(TEXTS, st.data())
def test_texts_and_numbers_are_as_tuples(names, data):
    rows = np.array(data.draw(st.lists(st.integers(0, len(names) - 1), max_size=6)), np.int64)
    texts = columns.texts(names)
    same(texts, tuple(names))
    same(texts.take(rows), tuple(names[i] for i in rows))
    values = [len(name) - 1 for name in names]
    numbers = columns.numbers(values)
    same(numbers, tuple(values))
    same(numbers.take(rows), tuple(values[i] for i in rows))
    assert numbers.count(0) == values.count(0)
    assert numbers.index(values[-1]) == values.index(values[-1])
    np.testing.assert_array_equal(numbers.take(rows), np.array(values)[rows])


def test_many_rows_are_read_in_chunks():
    names = [f"class/{i}.mp4" for i in range(150_000)]
    assert list(columns.texts(names)) == names


def test_a_large_column_is_sent_as_the_names_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    count = 300_000
    for column in (columns.texts(map(str, range(count))), columns.numbers(range(count))):
        chosen = column.take(np.array([7, 9999]))
        assert len(pickle.dumps(chosen)) < 1000
        assert pickle.loads(pickle.dumps(chosen)) == tuple(chosen)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.npy")}
    assert len(files) == 3
    columns.numbers(range(count))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.npy")} == files
    small = columns.texts("ab")
    assert pickle.loads(pickle.dumps(small)) == ("a", "b")
    assert set(tmp_path.rglob("*.npy")) == set(files)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert columns.numbers(range(count)) == tuple(range(count))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=20, max_size=80), st.integers(1, 6))
def test_held_out_videos_are_chosen_as_ever(labels, videos):
    """By the hash of ids, in equal parts of each class: written out for each video."""
    ids = tuple(f"{i}.mp4" for i in range(len(labels)))
    source = sources.VideoSource("", ids, tuple(labels), ("a", "b", "c"))
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    rank = {i: [j for j in order if labels[j] == labels[i]].index(i) for i in order}
    share = {i: (rank[i] + 0.5) / labels.count(labels[i]) for i in order}
    chosen = sorted(order, key=share.__getitem__)[: min(videos, len(ids) // 10)]
    kept, held = sources.hold_out(source, videos)
    assert held.ids == tuple(ids[i] for i in sorted(chosen))
    assert sorted((*kept.ids, *held.ids)) == sorted(ids)
