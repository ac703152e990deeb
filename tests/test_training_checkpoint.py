"""What a failed save and a kill between two files leave, and how the next session takes it."""

import jax
import numpy as np
import pytest
from conftest import load_config, mesh_of, task_of
from flax import nnx

import videomae_jax as vm
from videomae_jax.data import prepared
from videomae_jax.interop import export
from videomae_jax.models import vit
from videomae_jax.training import checkpoint, feed, step, trainer

MODEL = vm.VideoMAEConfig(
    clip_size=(2, 32, 32),
    tubelet=(2, 16, 16),
    pixel_mean=(0.5,) * 3,
    pixel_std=(0.2,) * 3,
    encoder=vit.Stack(8, 1, 2, 8),
    decoder=None,
)


def test_a_save_that_failed_once_does_not_prevent_the_next(tmp_path, monkeypatch, capsys):
    config = load_config("debug", "task=pretrain")
    state, _ = step.init_state(trainer.recipe(config, task_of(config)), mesh_of(1), 0)
    with checkpoint.Checkpoints(tmp_path, 1, 0) as checkpoints:
        finished = checkpoints._manager.wait_until_finished

        def fail() -> None:
            monkeypatch.setattr(checkpoints._manager, "wait_until_finished", finished)
            raise OSError("no answer")

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        checkpoints.save(state, {})
        checkpoints.wait()
        assert checkpoints.latest_step == 0
    assert "(OSError: no answer)" in capsys.readouterr().out


def kept(folder, step: int, value: float) -> None:
    """Weights of `step` whose validation was `value`, as a run leaves them."""
    model = vm.VideoMAE(MODEL, rngs=nnx.Rngs(0))
    meta = export.metadata(vm.VideoMAE, MODEL, {}) | {"validation": {"step": step, "validation_top1": value}}
    export.write(folder, nnx.to_pure_dict(nnx.state(model, nnx.Param)), meta)


@pytest.mark.parametrize(
    ("name", "stored", "found"),
    [
        ("best", {"step": 1, "top1": 0.5}, {"step": 3, "top1": 0.6}),  # killed after it was written
        ("best", {"step": 4, "top1": 0.7}, {"step": 4, "top1": 0.7}),
        ("best", None, {"step": 3, "top1": 0.6}),  # killed before any checkpoint knew of it
        ("best.partial", {"step": 1, "top1": 0.5}, {"step": 3, "top1": 0.6}),  # killed before its new name
        ("none", {"step": 1, "top1": 0.5}, None),
    ],
)
def test_best_weights_after_a_kill(tmp_path, name, stored, found):
    kept(tmp_path / name, 3, 0.6)
    (tmp_path / "best").mkdir(exist_ok=True)  # perhaps half removed
    best = checkpoint.Best(tmp_path, "top1")
    best.restore(stored)
    assert best.found == found
    assert export.is_whole(tmp_path / "best") == (found is not None)


def test_what_could_not_be_read_may_be_back_in_the_next_epoch(shapes, capsys):
    source = prepared.open_source(str(shapes), "train")
    bad = feed.BadVideos(source, 1.5 / len(source))
    for epoch in range(3):
        bad.count([(epoch, "no answer", False), (epoch, "no answer", False)], epoch)
        assert (list(bad.reasons), list(bad.unread)) == ([], [source.ids[epoch]])
    assert capsys.readouterr().out.count("no answer") == 3
    bad.count([(2, "is broken", True)], 2)
    assert (bad.reasons, bad.unread) == ({source.ids[2]: "is broken"}, {})
    with pytest.raises(feed.TooManyBadVideos, match=r"2 of 32 videos .* see that it can be"):
        bad.count([(5, "no answer", False)], 2)


def test_hosts_are_told_what_may_be_back():
    rows = {"record": np.array([3, 4, 5]), "error": np.array(["", "gone", "broken"])}
    rows["num_frames"] = np.array([9, -1, 0])
    assert feed.failed(rows) == [(4, "gone", False), (5, "broken", True)]
    assert jax.process_count() == 1
