"""The published schedule, value by value, and what clipping does."""

import jax.numpy as jnp
import numpy as np
import pytest

from videomae_jax.training import optim

# Base 1.0, final 0.1, 4 epochs of 5 steps, 1 warm-up epoch: fact sheet 4.1.
PUBLISHED = [
    *(0, 0.25, 0.5, 0.75, 1, 1, 0.990166, 0.961095, 0.914058, 0.851109, 0.775, 0.689058),
    *(0.597038, 0.502962, 0.410942, 0.325, 0.248891, 0.185942, 0.138905, 0.109834),
]


def test_learning_rates():
    rates = [optim.learning_rate(jnp.int32(i), 1.0, 0.1, 5, 20) for i in range(20)]
    np.testing.assert_allclose(rates, PUBLISHED, atol=1e-6)


def test_no_warm_up_and_a_single_warm_up_step():
    assert optim.learning_rate(jnp.int32(0), 1.0, 0.0, 0, 10) == 1
    assert optim.learning_rate(jnp.int32(0), 1.0, 0.0, 1, 10) == 0
    assert optim.learning_rate(jnp.int32(1), 1.0, 0.0, 1, 10) == 1


def test_clipping_limits_the_global_norm():
    params = {"kernel": jnp.zeros(3), "bias": jnp.zeros(1)}
    grads = {"kernel": jnp.array([0.0, 30.0, 0.0]), "bias": jnp.array([40.0])}
    for clip, first_moment in ((0.0, 40.0 * 0.1), (5.0, 4.0 * 0.1)):
        tx = optim.adamw((0.9, 0.95), 1e-8, 0.0, clip)
        _, state = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(state[1].mu["bias"], first_moment, rtol=1e-5)


def test_decay_moves_matrices_only():
    params = {"kernel": jnp.ones((2, 2)), "mask_token": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}
    tx = optim.adamw((0.9, 0.95), 1e-8, 0.5, 0.0)
    grads = {"kernel": jnp.zeros((2, 2)), "mask_token": jnp.zeros(2), "norm": {"scale": jnp.zeros(2)}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], 0.5)
    assert not updates["mask_token"].any()
    assert not updates["norm"]["scale"].any()


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="no rule matches 'encoder/temperature'"):
        optim.decay_mask({"encoder": {"temperature": jnp.zeros(1)}})


def test_what_is_no_matrix_does_not_decay():
    flat = {name: jnp.zeros(2) for name in ("query", "gamma1", "gamma2", "q_bias", "mask_token", "scale")}
    assert not any(optim.decay_mask(flat).values())
