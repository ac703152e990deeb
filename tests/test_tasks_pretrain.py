"""Pretraining's own: dual masking (VideoMAE V2) beside the plain loss."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, task_of
from flax import nnx
from flax.traverse_util import flatten_dict
from test_training_step import ROOT, TASK, batch_of

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax.apps import prepare
from videomae_jax.interop import transfer, weights
from videomae_jax.models import heads, masking, vit
from videomae_jax.models.layout import WHOLE
from videomae_jax.tasks import table
from videomae_jax.training import compute

DUAL = dataclasses.replace(TASK, decoder_mask="running_cell")
BATCH = {name: jnp.asarray(value) for name, value in batch_of().items()}


def terms(task, batch=BATCH):
    return task.terms(task.init(jax.random.key(0)), None, batch, ROOT, jnp.int32(0), WHOLE)


def test_dual_masking_is_the_plain_loss_to_the_last_bit_where_nothing_is_dropped(monkeypatch):
    _, hidden = TASK.masks(BATCH, ROOT)
    monkeypatch.setattr(masking, "running_cell", lambda *_: hidden)
    assert terms(DUAL) == terms(TASK)


def test_dual_masking_is_the_mean_over_kept_and_hidden():
    """By its definition: predictions at all kept places, errors of the hidden ones alone."""
    visible, hidden = DUAL.masks(BATCH, ROOT)
    places, counts = DUAL.decoded(BATCH, ROOT, hidden)
    assert places.shape == (8, 16)
    for row in range(8):
        both = set(np.asarray(places[row]).tolist()) & set(np.asarray(hidden[row]).tolist())
        assert set(np.asarray(places[row])[np.asarray(counts[row]) > 0].tolist()) == both
    assert 0 < counts.sum() < counts.size  # some kept places are visible
    model = jax.tree.map(lambda x: x, TASK.init(jax.random.key(0)))

    losses = nnx.merge(TASK.graphdef, model).token_losses(BATCH["video"], visible, places, True, "mse")
    found = terms(DUAL)
    np.testing.assert_allclose(found.total / found.weight, (losses * counts).sum() / counts.sum(), rtol=1e-6)
    assert abs(found.total / found.weight - terms(TASK).total / terms(TASK).weight) > 1e-4


def test_a_clip_of_weight_zero_counts_for_no_token():
    weight = jnp.ones(8).at[3].set(0.0)
    changed = BATCH["video"].at[3].set(7)
    one, other = (terms(DUAL, BATCH | {"weight": weight, "video": v}) for v in (BATCH["video"], changed))
    assert one == other
    assert one.weight < terms(DUAL).weight


def test_fewer_operations_than_without():
    """Published for ViT-B: 35.5 to 25.9 GFLOP (multiply-adds) forward, a ratio of 0.73."""
    assert DUAL.flops_per_clip() < TASK.flops_per_clip()
    with pytest.raises(ValueError, match="even grid"):
        dataclasses.replace(
            DUAL, model=dataclasses.replace(TASK.model, clip_size=(4, 12, 16))
        ).flops_per_clip()


def test_weights_to_start_from(debug_config, tmp_path):
    """All of another pretraining; without its decoder where that has other sizes; a classifier's encoder."""
    task = task_of(debug_config)
    names = [f"params/{name}" for name in flatten_dict(task.init(jax.random.key(0)), sep="/")]
    model = nnx.merge(task.graphdef, task.init(jax.random.key(5)))
    vm.save(model, tmp_path / "mae")
    theirs = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/")
    shared = {field.name: getattr(task.model, field.name) for field in dataclasses.fields(vit.BackboneConfig)}
    for pooling in ("mean", "first"):
        config = heads.ClassifierConfig(**shared, classes=("run", "sit"), pooling=pooling)
        vm.save(heads.VideoClassifier(config, rngs=nnx.Rngs(1)), tmp_path / pooling)

    def taken(source, **decoder):
        debug_config.init_from = str(tmp_path / source)
        debug_config.model.decoder.update(decoder)
        found = task_of(debug_config).start(debug_config, names)
        return {name.removeprefix("params/"): value for name, value in found.items()}

    found = taken("mae")
    assert found.keys() == theirs.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    encoder = {name for name in theirs if name.startswith("encoder/")}
    norm = {"encoder/norm/scale", "encoder/norm/bias"}
    assert taken("first").keys() == encoder
    assert taken("mean").keys() == encoder - norm
    assert taken("mae", mlp_dim=24).keys() == encoder


def test_published_weights_go_on(debug_config, golden):
    """A published checkpoint tells the heads of none of its blocks: the settings do."""
    source = golden / "pretrain_checkpoint.pth"
    model = weights.read(source, weights.Hints(heads_by_width={48: 3, 32: 2}))
    debug_config.data.update(frames=16, size=(64, 64))
    debug_config.model.tubelet = model.config.tubelet
    debug_config.model.encoder.update(vars(model.config.encoder))
    debug_config.model.decoder.update(vars(model.config.decoder))
    debug_config.init_from = str(source)
    theirs = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/")
    found = task_of(debug_config).start(debug_config, [f"params/{name}" for name in theirs])
    for name, value in theirs.items():
        np.testing.assert_array_equal(found[f"params/{name}"], value, err_msg=name)


@pytest.mark.slow
def test_pretraining_goes_on_from_weights(debug_config, tmp_path):
    """Its first loss is that of the run it starts from, not that of fresh weights."""
    debug_config.optim.update(duration=30)
    debug_config.loss.normalize_target, debug_config.log.statistics = False, "raw"
    debug_config.log.steps = 1
    losses = {}
    for name, source in (("first", ""), ("second", str(tmp_path / "first"))):
        debug_config.init_from = source
        table.train(debug_config, tmp_path / name, time.time())
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses["first"][-1] < 0.8 * losses["first"][0]
    assert abs(losses["second"][0] - losses["first"][-1]) < 0.5 * (losses["first"][0] - losses["first"][-1])


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_positions_go_on_from_the_table_that_was_trained(shapes, tmp_path, task):
    """`interpolate` after weights of 32 pixels, and of 48 with either kind of table."""
    c = load_config("debug", f"data={shapes},task={task}")
    before = task_of(c).model
    c.data.size = (48, 48)
    here = dataclasses.replace(before, clip_size=(before.clip_size[0], 48, 48))
    stages = {
        "small": (before, before.grid),
        "recomputed": (dataclasses.replace(here, position_grid=before.grid), None),
        "interpolated": (
            dataclasses.replace(here, position_grid=before.grid, position_resize="interpolate"),
            before.grid,
        ),
    }
    c.model.position_resize = "interpolate"
    kind = vm.VideoMAE if task == "pretrain" else heads.VideoClassifier
    for name, (config, expected) in stages.items():
        vm.save(kind(config, rngs=nnx.Rngs(0)), tmp_path / name)
        c.init_from = str(tmp_path / name)
        model = table.make_task(compute.on_this_machine(settings.checked(c)), None, c.init_from).model
        assert model.position_grid == expected
        found = model.positions(here.grid, here.encoder.width)
        is_trained = np.array_equal(found, config.positions(here.grid, here.encoder.width))
        assert is_trained == (name != "small")


def test_weights_that_fit_in_part(debug_config, golden, tmp_path):
    """Layer scale has arrays of its own; heads of an unused decoder need not be known."""
    task = task_of(debug_config)
    scaled = dataclasses.replace(task.model, layer_scale=0.1)
    for name, config in (("scaled", scaled), ("plain", task.model)):
        vm.save(vm.VideoMAE(config, rngs=nnx.Rngs(0)), tmp_path / name)
    with pytest.raises(
        transfer.TransferError, match=r"no place for, the first is encoder/blocks/.*layer_scale"
    ):
        transfer.read(tmp_path / "scaled", task.model, names_of(vm.load(tmp_path / "plain")))
    with pytest.raises(transfer.TransferError, match="lacks 2 arrays"):
        transfer.read(tmp_path / "plain", scaled, names_of(vm.load(tmp_path / "scaled")))
    hints = weights.Hints(num_heads=3, decoder_num_heads=2)
    theirs = weights.read_config(golden / "pretrain_checkpoint.pth", hints)
    other = dataclasses.replace(theirs, decoder=vit.Stack(16, 1, 2, 32))
    names = names_of(vm.VideoMAE(other, rngs=nnx.Rngs(0)))
    taken = transfer.read(golden / "pretrain_checkpoint.pth", other, names)
    assert taken.fresh == sorted(name for name in names if name.startswith("decoder/"))


def names_of(model):
    return list(flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/"))


def test_numbers_are_no_names_of_classes(debug_config, tmp_path):
    model = task_of(debug_config).model
    shared = {field.name: getattr(model, field.name) for field in dataclasses.fields(vit.BackboneConfig)}

    def config(*classes):
        return heads.ClassifierConfig(**shared, classes=classes)

    made = heads.VideoClassifier(config("0", "1", "2"), rngs=nnx.Rngs(0))
    vm.save(made, tmp_path / "made")
    for classes, is_taken in ((("0", "1", "2"), True), (("2", "1"), True), (("0", "1"), False)):
        taken = transfer.read(tmp_path / "made", config(*classes), names_of(made))
        assert ("head/kernel" in taken.matched) == is_taken


@pytest.mark.parametrize(("head", "labels"), [("multilabel", ("a;b", "c")), ("regression", ("0.5", "2"))])
def test_labels_that_pretraining_does_not_read_may_be_of_any_kind(shapes, head, labels, tmp_path, capsys):
    files = sorted((shapes / "train").rglob("*.mp4"))[:8]
    rows = [f"{file},{labels[i % 2]}" for i, file in enumerate(files)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    prepare.run(
        str(tmp_path / "list.csv"), str(tmp_path / "prepared"), prepare.Options(head=head, processes=1)
    )
    for path in ("list.csv", "prepared"):
        c = load_config("debug", f"data={tmp_path / path}")
        videos = task_of(c).open_videos(c)
        assert (len(videos.train), set(videos.train.labels)) == (8, {-1})
        assert "its labels are not read" in capsys.readouterr().out
