"""Pretraining's own: dual masking (VideoMAE V2) beside the plain loss."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import task_of
from flax import nnx
from flax.traverse_util import flatten_dict
from test_training_step import ROOT, TASK, batch_of

import videomae_jax as vm
from videomae_jax.interop import weights
from videomae_jax.models import heads, masking, vit
from videomae_jax.models.layout import WHOLE
from videomae_jax.tasks import table

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
