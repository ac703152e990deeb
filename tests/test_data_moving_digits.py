"""The generated set of studies: digits are real and differ between splits, motion is only in time."""

import hashlib

import numpy as np
import pytest

from videomae_jax import config as settings
from videomae_jax.config import UserError
from videomae_jax.data import moving_digits, prepared
from videomae_jax.data.moving_digits import CLASSES, LOOKS, MovingDigits
from videomae_jax.training import splits

SPEC = MovingDigits(size=32, frames=16, videos=32, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return moving_digits.generate(SPEC, tmp_path_factory.mktemp("cache"), processes=1)


def digest(folder) -> dict[str, str]:
    paths = sorted(folder.rglob("*.mp4"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_splits_are_distinct_and_balanced(folder):
    for split, count in {"train": 32, "validation": 16, "test": 16}.items():
        source = prepared.open_source(str(folder), split)
        assert source.classes == CLASSES
        assert set(np.bincount(source.labels)) == {count // 16}
    found = digest(folder)
    assert len(set(found.values())) == len(found) == 64


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(folder, tmp_path):
    assert digest(moving_digits.generate(SPEC, tmp_path, processes=2)) == digest(folder)


def test_no_split_has_a_digit_of_another():
    images = {name: moving_digits.digits(name) for name in SPEC.splits()}
    for kind in moving_digits.KINDS:
        drawn = [{image.tobytes() for image in images[name][kind]} for name in SPEC.splits()]
        assert min(map(len, drawn)) > 20
        assert len(drawn[0] | drawn[1] | drawn[2]) == sum(map(len, drawn))


@pytest.mark.parametrize("look", LOOKS)
def test_the_background_stands_still_and_digits_move(look):
    """Most of the frame never changes but where digits pass."""
    spec = MovingDigits(size=32, frames=16, videos=16, seed=0, look=look)
    videos = [moving_digits.render(spec, "train", CLASSES[i], np.random.default_rng(i)) for i in range(16)]
    changes = np.abs(np.diff(np.stack(videos).astype(int), axis=1)).max(axis=-1)
    assert 0.05 < (changes > 20).mean() < 0.5
    assert (changes == 0).mean() > 0.2


@pytest.mark.parametrize(("motion", "reverse"), [("left", "right"), ("up", "down")])
def test_reversed_in_time_a_class_is_its_opposite(motion, reverse):
    """A sheet moves by whole frames: backwards from where it ended, it shows the same pictures."""
    forward, backward = (
        moving_digits.render(SPEC, "train", f"3_{name}", np.random.default_rng(4))
        for name in (motion, reverse)
    )
    assert (forward[0] == backward[0]).all()
    assert np.abs(forward[5].astype(int) - backward[5]).mean() > 5
    assert np.abs(np.sort(forward[5], axis=None).astype(int) - np.sort(backward[5], axis=None)).mean() < 3


def test_looks_differ():
    means = {}
    for look in LOOKS:
        spec = MovingDigits(size=32, frames=4, videos=16, seed=0, look=look)
        videos = [moving_digits.render(spec, "train", name, np.random.default_rng(1)) for name in CLASSES]
        means[look] = np.mean(videos)
    assert abs(means["a"] - means["b"]) > 20


def test_settings_of_another_set_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    c = settings.defaults()
    c.data.path, c.data.generate.look = "moving_shapes", "b"
    with pytest.raises(UserError, match="look='b' is of moving_digits: moving_shapes has one look"):
        splits.open_splits(c)
    c.data.path, c.data.generate.look = "moving_digits", "z"
    with pytest.raises(UserError, match="look='z' is unknown: use a or b"):
        splits.open_splits(c)
