"""Latent targets: the teacher stays as it is, targets are its tokens, and what does not fit is refused."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, task_of
from flax import nnx

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax.models import masking
from videomae_jax.models.layout import WHOLE
from videomae_jax.tasks import table
from videomae_jax.training import step


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.fixture(scope="module")
def teacher(shapes, tmp_path_factory):
    """The work folder of a masked autoencoder."""
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    config = load_config("debug", f"data={shapes}")
    config.optim.update(duration=2, warmup=1)
    table.train(config, workdir, time.time())
    return workdir


def latent_config(shapes, teacher):
    config = load_config("debug", f"data={shapes},task=latent,teacher={teacher}")
    config.optim.update(duration=4, warmup=1)
    return config


def test_the_teacher_is_bit_equal_before_and_after_and_the_student_moves(shapes, teacher, tmp_path):
    config = latent_config(shapes, teacher)
    before = params_of(vm.load(teacher))["encoder"]
    made = []
    plain = step.make_train_step

    def spying(*args, **kwargs):
        train_step = plain(*args, **kwargs)

        def kept(state, batch, root):
            state, metrics = train_step(state, batch, root)
            made.append(jax.device_get(state))
            return state, metrics

        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", spying)
        table.train(config, tmp_path, time.time())
    jax.tree.map(np.testing.assert_array_equal, made[-1].others["teacher"]["encoder"], before)
    first, last = (state.params["encoder"]["blocks"]["fc1"]["kernel"] for state in (made[0], made[-1]))
    assert np.abs(first - last).max() > 1e-4
    student = vm.load(tmp_path)
    assert student.config.decoder is None
    jax.tree.map(np.testing.assert_array_equal, params_of(student), {"encoder": made[-1].params["encoder"]})


def test_targets_are_the_normalised_tokens_of_the_whole_clip(shapes, teacher, rng):
    task = task_of(latent_config(shapes, teacher))
    video = jnp.asarray(rng.integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8))
    model = vm.load(teacher)
    tokens = np.asarray(model.encode(video), np.float64)
    expected = (tokens - tokens.mean(axis=-1, keepdims=True)) / tokens.std(axis=-1, keepdims=True)
    others = {"teacher": {"encoder": params_of(model)["encoder"]}}
    found = task.targets(others, video, WHOLE)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    params = task.init(jax.random.key(0))
    batch = {"video": video, "weight": jnp.ones(2), "index": jnp.arange(2, dtype=jnp.uint32)}
    root = jax.random.key(1)
    terms = task.terms(params, others, batch, root, jnp.int32(0), WHOLE)
    visible, hidden = masking.indices(
        step.clip_keys(root, "mask", batch["index"]), "tube", task.model.grid, 0.75
    )
    predicted = nnx.merge(task.graphdef, params).predict(video, visible, hidden)
    wanted = np.take_along_axis(np.asarray(found), np.asarray(hidden)[:, :, None], axis=1)
    mean = ((np.asarray(predicted) - wanted) ** 2).mean()  # the loss of the debug settings
    assert float(terms.total / terms.weight) == pytest.approx(mean, rel=1e-4)


def test_a_file_of_other_layouts_is_a_teacher(shapes, teacher, tmp_path):
    """Hugging Face's and the official layout hold the same encoder."""
    model = vm.load(teacher)
    expected = params_of(model)["encoder"]["blocks"]["fc1"]["kernel"]
    vm.export_torch(model, tmp_path / "hf")
    config = latent_config(shapes, tmp_path / "hf")
    found = task_of(config).start(config, [])
    np.testing.assert_array_equal(found["others/teacher/encoder/blocks/fc1/kernel"], expected)


def test_multi_block_masks_hide_blocks_and_leave_a_fixed_number():
    grid, ratio = (4, 14, 14), 0.75
    keys = jax.random.split(jax.random.key(0), 64)
    visible, hidden = masking.indices(keys, "multi_block", grid, ratio)
    assert visible.shape == (64, 4 * 49)
    assert hidden.shape == (64, 4 * 147)
    both = np.sort(np.concatenate([visible, hidden], axis=1), axis=1)
    np.testing.assert_array_equal(both, np.broadcast_to(np.arange(4 * 196), both.shape))
    first = np.asarray(visible)[:, :49]
    for slice_ in range(4):  # the same places in all slices
        np.testing.assert_array_equal(
            np.asarray(visible)[:, 49 * slice_ : 49 * (slice_ + 1)], first + 196 * slice_
        )
    # Neighbours of a visible place are visible more often than with places drawn one by one.
    plane = np.zeros((64, 196), bool)
    np.put_along_axis(plane, first, True, axis=1)
    plane = plane.reshape(64, 14, 14)
    beside = (plane[:, :, 1:] & plane[:, :, :-1]).sum() / plane[:, :, 1:].sum()
    assert beside > 0.4  # 0.25 where nothing is in blocks
    again, _ = masking.indices(keys[::-1], "multi_block", grid, ratio)
    np.testing.assert_array_equal(again, visible[::-1])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"teacher": ""}, "task=latent learns from a teacher: set --config.teacher"),
        ({"data.frames": 4}, r"sees clips of \(8, 32, 32\) .* the student \(4, 32, 32\)"),
        ({"data.size": (16, 16)}, "use the clip size of the teacher"),
        ({"loss.kind": "huber"}, "loss.kind='huber' is unknown"),
        ({"init_from": "x"}, "init_from=x is set, but only pretrain .* would read it"),
    ],
)
def test_settings_that_do_not_fit(shapes, teacher, changes, text):
    config = latent_config(shapes, teacher)
    config.update_from_flattened_dict(changes)
    with pytest.raises(settings.UserError, match=text):
        task_of(config)


def test_a_teacher_that_is_not_there(shapes, tmp_path):
    with pytest.raises(settings.UserError, match="holds no model"):
        task_of(latent_config(shapes, tmp_path / "nowhere"))
