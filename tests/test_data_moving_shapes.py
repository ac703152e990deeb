"""The generated data set: real files, one bytes-for-bytes result per seed, motion only in time."""

import hashlib
import socket

import numpy as np
import pytest

from videomae_jax.data import decode, generated, moving_shapes, prepared

SPEC = moving_shapes.MovingShapes(size=32, frames=16, videos=32, seed=0)


def digest(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.mp4"))
    }


def test_splits_are_distinct_balanced_and_decodable(shapes):
    seen = set()
    for split, count in SPEC.splits().items():
        source = prepared.open_source(str(shapes), split)
        assert len(source) == count
        assert source.classes == moving_shapes.CLASSES
        assert set(np.bincount(source.labels)) == {count // 8}
        files = {hashlib.sha256((shapes / split / i).read_bytes()).hexdigest() for i in source.ids}
        assert not files & seen
        seen |= files
    with decode.Video(shapes / "train" / source.ids[0].replace("test", "train")) as video:
        assert video.read(range(video.num_frames)).shape == (16, 32, 32, 3)


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(shapes, tmp_path):
    assert digest(moving_shapes.generate(SPEC, tmp_path, processes=2)) == digest(shapes)


def test_another_seed_gives_other_videos():
    first, other = (moving_shapes.render(SPEC, "up", np.random.default_rng([seed, 0, 7])) for seed in (0, 1))
    assert np.abs(first.astype(int) - other).mean() > 10


def test_the_cache_is_used_again(shapes, monkeypatch):
    monkeypatch.setattr(generated.multiprocessing, "get_context", None)
    assert moving_shapes.generate(SPEC, shapes.parent, processes=1) == shapes


def test_nothing_is_left_when_generation_fails_or_was_killed(shapes, tmp_path):
    name = shapes.name
    (tmp_path / "killed" / f"{name}.partial-{socket.gethostname()}-99999999").mkdir(parents=True)
    other = f"{name}.partial-{socket.gethostname()}-2-99999999"  # of a host with a longer name
    (tmp_path / "killed" / other).mkdir()
    moving_shapes.generate(SPEC, tmp_path / "killed", processes=1)
    assert {d.name for d in (tmp_path / "killed").iterdir()} == {name, other}
    with pytest.raises(ValueError, match="even frame size"):
        moving_shapes.generate(moving_shapes.MovingShapes(31, 4, 8, 0), tmp_path / "failed", processes=1)
    assert list((tmp_path / "failed").iterdir()) == []


@pytest.mark.parametrize(
    ("motion", "reverse"),
    [("left", "right"), ("up", "down"), ("up_left", "down_right"), ("down_left", "up_right")],
)
def test_pairs_are_time_reversed(motion, reverse):
    """The same draws give the mirrored trajectory, so a pair shares its single frames."""
    time = np.linspace(-0.5, 0.5, 9, dtype=np.float32)[:, None, None]
    paths = []
    for name, clock in ((motion, time), (reverse, -time)):
        rng = np.random.default_rng(5)
        paths.append(moving_shapes._trajectory(name, clock, 32.0, 1.0, rng))
    for forward, backward in zip(*paths, strict=True):
        np.testing.assert_allclose(forward % 32, backward % 32, atol=1e-3)


def test_a_single_frame_does_not_tell_the_class():
    """The mean frame of every class is alike, while motion differs in sign between pairs."""
    means = []
    for motion in moving_shapes.CLASSES:
        videos = [moving_shapes.render(SPEC, motion, np.random.default_rng(i)) for i in range(40)]
        means.append(np.mean([v[8].astype(float) for v in videos], axis=0).mean(axis=2))
    assert np.abs(np.array(means) - np.mean(means, axis=0)).mean() < 12
