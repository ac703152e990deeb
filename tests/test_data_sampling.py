"""Frame indices of the fact sheet's worked examples, and bounds for every length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videomae_jax.data import sampling


class Fixed(np.random.Generator):
    """An rng whose integers are known."""

    def __init__(self, value):
        super().__init__(np.random.PCG64(0))
        self.value = value

    def integers(self, *_bounds, size=None):
        return np.full(size, self.value) if size else self.value


def test_pretraining_examples():
    def indices(n, stride=4):
        return sampling.pretrain_clip(n, 16, stride, None).tolist()

    assert indices(30) == [0, 4, 8, 12, 16, 20, 24] + [28] * 9
    assert indices(61) == [*range(0, 57, 4), 56]
    assert indices(3) == [0] * 16
    assert sampling.pretrain_clip(64, 16, 4, None).tolist() == list(range(0, 64, 4))
    assert sampling.pretrain_clip(300, 16, 4, Fixed(7)).tolist() == list(range(7, 71, 4))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.integers(1, 400), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_pretraining_equals_the_running_index_of_the_published_code(n, stride, seed):
    found = sampling.pretrain_clip(n, 16, stride, np.random.default_rng(seed))
    free = n - 16 * stride + 1
    running = (np.random.default_rng(seed).integers(free) if free > 0 else 0) + 1
    expected = []
    for _ in range(16):
        expected.append(running - 1)
        if running + stride < n:
            running += stride
    assert found.tolist() == expected


def test_dense_training_examples():
    s0 = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    assert sampling.dense_clip(300, 16, 4, Fixed(64)).tolist() == s0
    assert sampling.dense_clip(300, 16, 4, Fixed(74)).tolist() == [10 + i for i in s0]
    assert sampling.dense_clip(64, 16, 4, None).tolist() == s0
    assert sampling.dense_clip(30, 16, 4, None).tolist() == [0, 5, 10, 15, 20, 25] + [29] * 10
    assert sampling.dense_clip(10, 16, 4, None).tolist() == [0] + [9] * 15
    assert sampling.dense_clip(3, 16, 4, None).tolist() == [2] * 16
    # V2 validation: the clip ends at (64 + 300) // 2.
    assert sampling.dense_clip(300, 16, 4, None).tolist() == [118 + i for i in s0]


def test_dense_test_examples():
    def views(n, segments=5):
        return [sampling.dense_view(n, 16, 4, i, segments) for i in range(segments)]

    spans = [(view[0], view[-1]) for view in views(300)]
    assert spans == [(0, 60), (56, 116), (116, 176), (176, 236), (236, 296)]
    assert [view[0] // 4 for view in views(100)] == [0, 2, 4, 6, 9]
    assert all((view == views(50)[0]).all() for view in views(50))
    assert views(50)[0].tolist() == [*range(0, 50, 4), 48, 48, 48]
    assert views(300, 1)[0][0] == 29 * 4  # one segment: the centre, where the published code fails


def test_segment_examples():
    one = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    two = [1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 26, 28, 31, 33, 36, 38]
    assert [sampling.segment_view(40, 16, i, 2).tolist() for i in range(2)] == [one, two]
    assert sampling.segment_clip(40, 16, Fixed(1)).tolist() == [2 * i + 1 for i in range(16)]
    assert sampling.segment_clip(64, 16, None).tolist() == [4 * i + 2 for i in range(16)]
    assert sampling.segment_clip(10, 16, None).tolist() == [0] * 6 + list(range(10))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 500), st.integers(1, 10))
def test_indices_exist_and_never_go_back(n, views):
    rng = np.random.default_rng(n)
    found = [sampling.dense_clip(n, 16, 4, r) for r in (rng, None)]
    found += [sampling.segment_clip(n, 16, r) for r in (rng, None)]
    found += [sampling.pretrain_clip(n, 16, 4, r) for r in (rng, None)]
    found += [sampling.dense_view(n, 16, 4, i, views) for i in range(views)]
    found += [sampling.segment_view(n, 16, i, views) for i in range(views)]
    for indices in found:
        assert len(indices) == 16
        assert indices.min() >= 0
        assert indices.max() < n
        assert (np.diff(indices) >= 0).all()


@pytest.mark.parametrize("views", [1, 2, 3])
def test_segment_views_share_no_place(views):
    taken = np.concatenate([sampling.segment_view(960, 16, i, views) for i in range(views)])
    assert len(set(taken.tolist())) == 16 * views
