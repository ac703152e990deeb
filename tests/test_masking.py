"""Counts of the fact sheet, the shape of each kind of mask, and independence of batch and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import videomae_jax as vm
from videomae_jax.models import masking

# (kind, grid, ratio, visible, hidden): fact sheet, sections 2.1 and 2.2.
COUNTS = [
    ("tube", (8, 14, 14), 0.50, 784, 784),
    ("tube", (8, 14, 14), 0.75, 392, 1176),
    ("tube", (8, 14, 14), 0.80, 320, 1248),
    ("tube", (8, 14, 14), 0.85, 240, 1328),
    ("tube", (8, 14, 14), 0.90, 160, 1408),
    ("tube", (8, 14, 14), 0.95, 80, 1488),
    ("tube", (8, 16, 16), 0.75, 512, 1536),
    ("tube", (8, 16, 16), 0.90, 208, 1840),
    ("tube", (8, 20, 20), 0.90, 320, 2880),
    ("random", (8, 14, 14), 0.75, 392, 1176),
    ("random", (8, 14, 14), 0.90, 157, 1411),
    ("random", (8, 14, 14), 0.95, 79, 1489),
    ("frame", (8, 14, 14), 0.875, 196, 1372),
]
MASKS = {"tube": vm.tube_mask, "random": vm.random_mask, "frame": vm.frame_mask}


@pytest.mark.parametrize(("kind", "grid", "ratio", "visible", "hidden"), COUNTS)
def test_counts(kind, grid, ratio, visible, hidden):
    assert masking.counts(kind, grid, ratio) == (visible, hidden)
    mask = MASKS[kind](jax.random.key(0), 3, grid, ratio)
    np.testing.assert_array_equal(mask.sum(axis=1), hidden)
    np.testing.assert_array_equal((~mask).sum(axis=1), visible)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    st.sampled_from(["tube", "random", "frame"]),
    st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(2, 5)),
    st.floats(0.5, 0.75),
    st.integers(0, 2**31 - 1),
)
def test_indices_partition_the_grid_in_ascending_order(kind, grid, ratio, seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    visible, hidden = masking.indices(keys, kind, grid, ratio)
    for part in (visible, hidden):
        assert (np.diff(part, axis=1) > 0).all()
    both = np.sort(np.concatenate([visible, hidden], axis=1), axis=1)
    np.testing.assert_array_equal(both, np.broadcast_to(np.arange(np.prod(grid)), both.shape))


def test_tubes_are_the_same_in_all_slices_and_frames_are_whole():
    tube = vm.tube_mask(jax.random.key(1), 4, (8, 14, 14), 0.9).reshape(4, 8, 196)
    np.testing.assert_array_equal(tube, np.broadcast_to(tube[:, :1], tube.shape))
    assert not (tube[0] == tube[1]).all()
    frame = vm.frame_mask(jax.random.key(1), 4, (8, 14, 14), 0.875).reshape(4, 8, 196)
    np.testing.assert_array_equal(frame, np.broadcast_to(frame[..., :1], frame.shape))
    random = vm.random_mask(jax.random.key(1), 4, (8, 14, 14), 0.9).reshape(4, 8, 196)
    assert not (random == random[:, :1]).all()


def test_every_place_is_hidden_equally_often():
    mask = vm.tube_mask(jax.random.key(2), 4000, (1, 4, 4), 0.75)
    np.testing.assert_allclose(mask.mean(axis=0), 0.75, atol=0.04)


def test_a_row_depends_on_its_own_index_only():
    few = vm.tube_mask(jax.random.key(3), 3, (2, 4, 4), 0.5)
    many = vm.tube_mask(jax.random.key(3), 9, (2, 4, 4), 0.5)
    np.testing.assert_array_equal(few, many[:3])


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_device_layout_changes_no_mask(devices):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    place = jax.NamedSharding(mesh, jax.P("data"))
    keys = jax.random.split(jax.random.key(4), 8)
    expected = masking.indices(keys, "tube", (4, 8, 8), 0.9)
    draw = jax.jit(lambda k: masking.indices(k, "tube", (4, 8, 8), 0.9), in_shardings=place)
    visible, hidden = draw(jax.device_put(keys, place))
    assert len(visible.sharding.device_set) == devices
    np.testing.assert_array_equal(visible, expected[0])
    np.testing.assert_array_equal(hidden, expected[1])


def test_boolean_and_index_forms_agree():
    mask = vm.random_mask(jax.random.key(5), 3, (2, 3, 4), 0.6)
    visible, hidden = masking.from_mask(mask)
    np.testing.assert_array_equal(masking.to_mask(hidden, 24), mask)
    assert not np.take_along_axis(np.asarray(mask), np.asarray(visible), 1).any()


@pytest.mark.parametrize("ratio", [0.0, 0.001, 1.0, 1.5, -0.2])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match="at least one visible and one hidden"):
        vm.tube_mask(jax.random.key(0), 1, (8, 14, 14), ratio)


def test_odd_masks_are_refused(untyped):
    with pytest.raises(ValueError, match="unknown mask 'cube'"):
        masking.counts("cube", (2, 2, 2), 0.5)
    uneven = np.array([[True, False, False], [True, True, False]])
    for bad, text in (
        (uneven, r"hides \[1, 2\] of 3"),
        (np.ones((2, 3), bool), r"hides \[3, 3\]"),
        (np.ones((2, 3), np.int32), "int32"),
    ):
        with pytest.raises(ValueError, match=text):
            masking.from_mask(jnp.asarray(bad))
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda m: masking.from_mask(m)[0])(jnp.asarray(uneven))


def test_the_running_cell_is_the_published_one():
    """Fact sheet 2.3: cells of phase 0, and each phase as many steps further along the same cycle."""
    cycle = [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]]  # 1: dropped; in the order of a cell
    keys = jax.random.split(jax.random.key(0), 64)
    kept = masking.running_cell(keys, (8, 4, 6), 0.5)
    assert kept.shape == (64, masking.running_cell_count((8, 4, 6), 0.5)) == (64, 96)
    found = set()
    for row in np.asarray(kept):
        assert (np.diff(row) > 0).all()
        dropped = np.ones(8 * 4 * 6, int)
        dropped[row] = 0
        cells = dropped.reshape(8, 2, 2, 3, 2).transpose(0, 1, 3, 2, 4).reshape(8, 6, 4)
        assert (cells == cells[:, :1]).all()
        found.add(tuple(map(tuple, cells[:, 0])))
    assert found == {tuple(tuple(cycle[(f + phase) % 4]) for f in range(8)) for phase in range(4)}


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 1176), (0.5, 784), (0.75, 392)])
def test_the_running_cell_keeps_as_many_in_every_slice(ratio, kept):
    found = np.asarray(masking.running_cell(jax.random.split(jax.random.key(1), 4), (8, 14, 14), ratio))
    assert found.shape == (4, kept)
    assert all((np.bincount(row // 196) == kept // 8).all() for row in found)


@pytest.mark.parametrize(("grid", "ratio"), [((2, 3, 4), 0.5), ((2, 4, 5), 0.5), ((2, 4, 4), 0.4)])
def test_running_cells_that_cannot_be(grid, ratio):
    with pytest.raises(ValueError, match="the running cell"):
        masking.running_cell(jax.random.split(jax.random.key(0), 2), grid, ratio)


def test_rectangles_of_multi_block(monkeypatch):
    """V-JEPA's: 0.15 and 0.7 of the plane, aspects from 0.75 to 1.5; one here, so that it is seen whole."""
    monkeypatch.setattr(masking, "_SHORT", (1, masking._SHORT[1]))
    monkeypatch.setattr(masking, "_LONG", (1, masking._LONG[1]))
    draw = jax.vmap(lambda key: masking._blocks(key, 40, 40))
    planes = np.asarray(draw(jax.random.split(jax.random.key(0), 200))).reshape(-1, 40, 40) > 0
    tall, wide = planes.any(2).sum(1), planes.any(1).sum(1)
    np.testing.assert_array_equal(planes.sum((1, 2)), tall * wide)
    is_long, aspect = tall * wide > 800, tall / wide
    assert 0.4 < is_long.mean() < 0.6
    assert (tall * wide)[is_long].mean() / 1600 == pytest.approx(0.7, abs=0.02)
    assert (tall * wide)[~is_long].mean() / 1600 == pytest.approx(0.15, abs=0.01)
    assert 0.7 < aspect[~is_long].min() < 0.85
    assert 1.35 < aspect[~is_long].max() < 1.6
