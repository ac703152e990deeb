"""Pretraining's own: dual masking (VideoMAE V2) beside the plain loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training_step import ROOT, TASK, batch_of

from videomae_jax.models import masking
from videomae_jax.models.layout import WHOLE

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
    from flax import nnx

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
