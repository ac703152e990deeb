"""Distillation: nothing to learn from oneself, other sizes and orders of classes, what is refused."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, task_of
from flax import nnx
from flax.traverse_util import flatten_dict

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax.models import heads, vit
from videomae_jax.models.layout import WHOLE
from videomae_jax.tasks import distill, evaluate, table
from videomae_jax.training import splits


@pytest.fixture(scope="module")
def teacher(shapes, tmp_path_factory):
    """A classifier, wider, deeper and with more frames than the debug model; its classes are reversed."""
    config = load_config("debug", f"data={shapes},task=finetune")
    made = task_of(config, splits.open_splits(config).train).model
    sizes = {"encoder": vit.Stack(48, 4, 2, 96), "clip_size": (16, 48, 48)}
    made = dataclasses.replace(made, **sizes, classes=made.classes[::-1], head_scale=1.0)
    folder = tmp_path_factory.mktemp("teacher") / "export"
    vm.save(heads.VideoClassifier(made, rngs=nnx.Rngs(1)), folder)
    return folder


def distill_config(shapes, export, **changes):
    config = load_config("debug", f"data={shapes},task=distill,teacher={export}")
    config.data.stride = 2
    config.augment.update(mixup=0.0, cutmix=0.0, erasing=0.0)
    config.head.dropout, config.model.drop_path = 0.0, 0.0
    config.update_from_flattened_dict(changes)
    return config


def made(shapes, teacher, **changes):
    """(task, its parameters, the teacher's, a batch)"""
    config = distill_config(shapes, teacher, **changes)
    task = task_of(config, splits.open_splits(config).train)
    params = task.init(jax.random.key(0))
    others = {"teacher": nnx.to_pure_dict(nnx.state(vm.load(teacher), nnx.Param))}
    rng = np.random.default_rng(0)
    batch = {
        "video": jnp.asarray(rng.integers(0, 256, (4, *task._seen, 3), dtype=np.uint8)),
        "label": jnp.arange(4, dtype=jnp.int32),
        "weight": jnp.ones(4),
        "index": jnp.arange(4, dtype=jnp.uint32),
        "erase": jnp.zeros((4, 4), jnp.int32),
    }
    return task, params, others, batch


def loss_of(task, params, others, batch):
    terms = task.terms(params, others, batch, jax.random.key(0), jnp.int32(0), WHOLE)
    return float(terms.total / terms.weight), float(terms.metrics["agreement"] / terms.weight)


def test_the_loss_by_its_definition(shapes, teacher):
    """Each sees the clip in its own size and frames; classes meet by name."""
    changes = {"distill.temperature": 2.0, "distill.hard_weight": 0.0, "distill.feature_weight": 0.0}
    task, params, others, batch = made(shapes, teacher, **changes)
    assert task._seen == (16, 48, 48)
    assert task.clip_transform.stride == 1
    pixels = np.asarray(batch["video"])
    small = jax.image.resize(
        jnp.asarray(pixels[:, ::2], jnp.float32), (4, 8, 32, 32, 3), "linear", antialias=True
    )
    student = task.module(params)
    mean, std = (np.array(x, np.float32) for x in (task.model.pixel_mean, task.model.pixel_std))
    ours = student.head(student.pooled((small / 255 - mean) / std)) / 2
    theirs = np.asarray(vm.load(teacher)(batch["video"]))[:, ::-1] / 2
    soft, log_ours = jax.nn.softmax(theirs), jax.nn.log_softmax(ours)
    expected = 4 * float((soft * (np.log(soft) - log_ours)).sum(axis=1).mean())
    loss, agreement = loss_of(task, params, others, batch)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert agreement == float((theirs.argmax(axis=1) == np.asarray(ours).argmax(axis=1)).mean())
    plain, *_ = loss_of(dataclasses.replace(task, temperature=1.0), params, others, batch)
    assert plain != pytest.approx(loss, rel=1e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(shapes, teacher):
    task, _, others, batch = made(
        shapes, teacher, **{"distill.hard_weight": 0.0, "distill.feature_weight": 0.0}
    )
    same = dataclasses.replace(task, model=dataclasses.replace(task.teacher, head_dropout=0.0))
    loss, agreement = loss_of(same, others["teacher"], others, batch)
    assert abs(loss) < 1e-5
    assert agreement == 1.0


def test_a_student_starts_from_weights_and_learns_features_too(shapes, teacher, tmp_path):
    """What maps its features to the teacher's is new."""
    changes = {"distill.feature_weight": 0.5}
    task, params, *_ = made(shapes, teacher, **changes)
    classifier = heads.VideoClassifier(task.model, rngs=nnx.Rngs(3))
    vm.save(classifier, tmp_path / "start")
    config = distill_config(shapes, teacher, **changes)
    config.init_from = str(tmp_path / "start")
    names = [f"params/{'/'.join(path)}" for path in flatten_dict(params)]
    taken = task.start(config, names)
    assert any("/align0/" in f"/{name}" for name in names)
    assert not any("align" in name for name in taken)
    np.testing.assert_array_equal(
        taken["params/encoder/embed/kernel"],
        nnx.to_pure_dict(nnx.state(classifier))["encoder"]["embed"]["kernel"],
    )


@pytest.mark.slow
def test_labels_and_layers_add_their_share(shapes, teacher):
    task, params, others, batch = made(shapes, teacher, **{"distill.feature_weight": 0.5})
    assert task._aligned == [(0, 1), (1, 3)]  # of 2 and 4 blocks
    soft = loss_of(dataclasses.replace(task, hard_weight=0.0, feature_weight=0.0), params, others, batch)[0]
    hard = loss_of(dataclasses.replace(task, hard_weight=1.0, feature_weight=0.0), params, others, batch)[0]
    assert hard - soft == pytest.approx(np.log(8), rel=0.05)  # an untrained head guesses
    features = loss_of(dataclasses.replace(task, hard_weight=0.0), params, others, batch)[0]
    assert 0 < features - soft < 0.5 * 4
    grads = jax.grad(lambda p: task.terms(p, others, batch, jax.random.key(0), jnp.int32(0), WHOLE).total)(
        params
    )
    assert np.abs(grads["align0"]["kernel"]).max() > 0


@pytest.mark.slow
def test_a_distilled_student_is_a_classifier_that_is_evaluated(shapes, teacher, tmp_path):
    config = distill_config(shapes, teacher)
    config.optim.update(duration=2, warmup=1)
    table.train(config, tmp_path, time.time())
    assert vm.load(tmp_path).config.classes == vm.load(tmp_path / "best").config.classes
    config.teacher = ""  # a test needs none
    assert evaluate.run(config, tmp_path, "")["videos"] == 8


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"teacher": ""}, "task=distill learns from a teacher"),
        ({"data.stride": 3}, "clips of 16 frames at a stride of 3 x 8 / 16 do not divide"),
        ({"head.kind": "multilabel"}, "augment.mixup|distillation is for classes"),
    ],
)
def test_settings_that_do_not_fit(shapes, teacher, changes, text):
    config = distill_config(shapes, teacher, **changes)
    with pytest.raises(settings.UserError, match=text):
        task_of(config, splits.open_splits(load_config("debug", f"data={shapes},task=finetune")).train)


def test_a_teacher_of_other_classes_is_refused(shapes, teacher, tmp_path):
    model = vm.load(teacher)
    other = dataclasses.replace(model.config, classes=(*model.config.classes[:-1], "yoga"))
    vm.save(heads.VideoClassifier(other, rngs=nnx.Rngs(0)), tmp_path / "other")
    config = distill_config(shapes, tmp_path / "other")
    with pytest.raises(settings.UserError, match="use a teacher of the same classes"):
        task_of(config, splits.open_splits(config).train)


def test_fit():
    clips = jnp.arange(2 * 8 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 8, 4, 4, 3)
    np.testing.assert_array_equal(distill.fit(clips, (4, 4, 4)), clips[:, ::2])
    halved = distill.fit(jnp.ones((1, 4, 8, 8, 3)), (2, 4, 4))
    np.testing.assert_allclose(halved, np.ones((1, 2, 4, 4, 3)), atol=1e-6)
