"""The tree of settings: locked, complete, and equal to the published tables."""

import functools
import math

import jax
import pytest
from conftest import ROOT, load_config, task_of
from flax import nnx

import videomae_jax as vm
from videomae_jax import config as settings
from videomae_jax.models import vit
from videomae_jax.models.heads import ClassifierConfig
from videomae_jax.models.layout import WHOLE
from videomae_jax.models.mae import VideoMAEConfig
from videomae_jax.tasks import table
from videomae_jax.training import compute, planned

# (size, data): batch, effective lr, effective min lr, mask, stride, decoder depth, duration, warm-up, every
# Fact sheet 4.4; HMDB51 from the paper's text.
PUBLISHED = {
    ("small", "k400"): (1024, 6e-4, 4e-5, 0.9, 4, 4, 1601, 40, 20),
    ("base", "k400"): (2048, 1.2e-3, 8e-5, 0.9, 4, 4, 1601, 40, 20),
    ("base", "k400,epochs=800"): (2048, 1.2e-3, 8e-5, 0.9, 4, 4, 801, 40, 20),
    ("base", "ssv2,epochs=800"): (2048, 1.2e-3, 8e-5, 0.9, 2, 4, 801, 40, 20),
    ("large", "k400"): (512, 3e-4, 2e-5, 0.9, 4, 12, 1601, 40, 20),
    ("huge", "k400"): (1024, 6e-4, 4e-5, 0.9, 4, 12, 1601, 40, 20),
    ("small", "ssv2"): (2048, 1.2e-3, 8e-5, 0.9, 2, 4, 2401, 40, 20),
    ("base", "ssv2"): (2048, 1.2e-3, 8e-5, 0.9, 2, 4, 2401, 40, 20),
    ("base", "ucf101"): (192, 2.25e-4, 7.5e-6, 0.75, 4, 4, 3201, 40, 100),
    ("base", "hmdb51"): (192, 2.25e-4, 7.5e-6, 0.75, 2, 4, 4800, 40, 100),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_pretraining(row):
    size, data = row
    batch, lr, min_lr, ratio, stride, depth, duration, warmup, every = PUBLISHED[row]
    c = load_config("pretrain", f"size={size},data={data}")
    plan = settings.make_schedule(c, num_videos=240_436)
    steps = 240_436 // batch
    assert (plan.steps_per_epoch, plan.total_steps) == (steps, duration * steps)
    assert (plan.warmup_steps, plan.checkpoint_steps) == (warmup * steps, every * steps)
    assert plan.peak_lr == pytest.approx(lr)
    assert plan.end_lr == pytest.approx(min_lr)
    assert (c.mask.kind, c.mask.ratio, c.data.stride) == ("tube", ratio, stride)
    assert (c.model.decoder.depth, c.data.batch_size) == (depth, batch)
    assert (c.data.frames, c.data.size, c.model.tubelet) == (16, (224, 224), (2, 16, 16))
    assert (c.optim.betas, c.optim.weight_decay, c.optim.clip_norm) == ((0.9, 0.95), 0.05, 0)
    assert (c.loss.kind, c.loss.normalize_target, c.model.drop_path) == ("mse", True, 0)
    assert c.model.remat == ("full" if size == "huge" else "none")


# (size, data): videos of a step, clips per video, lr, end lr, epochs, layer decay, drop path, head dropout,
# stride, views. Fact sheet 5.7; ssv2 large and HMDB51 from the paper's tables.
FINETUNING = {
    ("small", "k400"): (384, 2, 7.5e-4, 1.5e-6, 150, 0.75, 0.1, 0.0, 4, (5, 3)),
    ("base", "k400"): (384, 2, 7.5e-4, 1.5e-6, 75, 0.75, 0.1, 0.0, 4, (5, 3)),
    ("base", "k400,pretrained=800"): (512, 1, 2e-3, 2e-6, 100, 0.75, 0.1, 0.0, 4, (5, 3)),
    ("base", "ssv2,pretrained=800"): (512, 1, 1e-3, 2e-6, 50, 0.75, 0.1, 0.0, 0, (2, 3)),
    ("large", "k400"): (128, 2, 1e-3, 5e-7, 35, 0.75, 0.1, 0.0, 4, (5, 3)),
    ("huge", "k400"): (512, 2, 2e-3, 2e-5, 50, 0.75, 0.2, 0.5, 4, (5, 3)),
    ("small", "ssv2"): (384, 2, 1.5e-3, 1.5e-6, 40, 0.70, 0.1, 0.0, 0, (2, 3)),
    ("base", "ssv2"): (384, 2, 7.5e-4, 1.5e-6, 30, 0.75, 0.1, 0.0, 0, (2, 3)),
    ("large", "ssv2"): (512, 2, 1e-3, 2e-6, 30, 0.75, 0.2, 0.5, 0, (2, 3)),
    ("base", "ucf101"): (128, 2, 2.5e-4, 5e-6, 100, 0.70, 0.2, 0.5, 4, (5, 3)),
    ("base", "hmdb51"): (128, 2, 5e-4, 5e-7, 50, 0.70, 0.2, 0.5, 2, (10, 3)),
}


@pytest.mark.parametrize("row", FINETUNING)
def test_published_finetuning(row):
    size, data = row
    videos, clips, lr, end, epochs, decay, drop_path, dropout, stride, views = FINETUNING[row]
    c = load_config("finetune", f"size={size},data={data}")
    plan = settings.make_schedule(c, num_videos=240_436)
    steps = 240_436 // videos
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (steps, epochs * steps, 5 * steps)
    assert plan.peak_lr == pytest.approx(lr)
    assert plan.end_lr == pytest.approx(end)
    assert (c.data.batch_size, c.data.clips_per_video) == (videos * clips, clips)
    assert (c.optim.layer_decay, c.model.drop_path, c.head.dropout) == (decay, drop_path, dropout)
    assert (c.data.stride, c.evaluate.segments, c.evaluate.crops) == (stride, *views)
    assert (c.optim.betas, c.optim.weight_decay, c.optim.clip_norm) == ((0.9, 0.999), 0.05, 0)
    assert (c.augment.policy, c.augment.erasing) == ("rand-m7-n4-mstd0.5-inc1", 0.25)
    assert (c.augment.mixup, c.augment.cutmix, c.loss.smoothing, c.head.scale) == (0.8, 1.0, 0.1, 0.001)
    assert c.augment.flip == (not data.startswith("ssv2"))


# Fact sheets 4.5, 8.1: clips of a step, effective lr, min lr, warm-up, epochs, clip norm, decoder, predicted
PRETRAINING_V2 = {
    "base": (4096, 4e-3, 4e-5, 20, 200, 0.0, (384, 4, 6, 1536), 784),
    "large": (6144, 6e-3, 6e-5, 30, 300, 0.0, (512, 4, 8, 2048), 784),
    "huge": (8192, 8e-3, 8e-5, 30, 300, 0.0, (512, 4, 8, 2048), 784),
    "giant": (8192, 4.8e-3, 8e-5, 30, 300, 0.02, (512, 4, 8, 2234), 1024),
}


def decoder_of(c):
    return [c.model.decoder[name] for name in ("width", "depth", "num_heads", "mlp_dim")]


@pytest.mark.parametrize("size", PRETRAINING_V2)
def test_published_v2_pretraining(size):
    batch, lr, min_lr, warmup, epochs, clip_norm, decoder, predicted = PRETRAINING_V2[size]
    c = load_config("pretrain_v2", f"size={size}")
    plan = settings.make_schedule(c, num_videos=1_348_000)
    assert (c.data.batch_size, c.optim.warmup, c.optim.duration) == (batch, warmup, epochs)
    assert (plan.peak_lr, plan.end_lr) == pytest.approx((lr, min_lr))
    assert (c.optim.clip_norm, tuple(decoder_of(c))) == (clip_norm, decoder)
    assert (c.mask.kind, c.mask.ratio, c.mask.decoder, c.data.clips_per_video) == (
        "tube",
        0.9,
        "running_cell",
        4,
    )
    assert task_of(c)._counts()[1] == predicted


# Fact sheet 5.8: videos, effective lr, layer decay, drop path, dropout, weight decay, epochs, segments
FINETUNING_V2 = {
    ("base", "k400"): (512, 1.4e-3, 0.75, 0.1, 0.0, 0.05, 90, 5),
    ("base", "k710"): (512, 1.4e-3, 0.75, 0.1, 0.0, 0.05, 90, 5),
    ("base", "ssv2"): (256, 2e-3, 0.65, 0.1, 0.0, 0.05, 25, 2),
    ("large", "k400"): (192, 1.5e-3, 0.75, 0.2, 0.0, 0.05, 35, 5),
    ("large", "ssv2"): (192, 3.75e-4, 0.75, 0.2, 0.0, 0.05, 20, 2),
    ("huge", "k400"): (128, 5e-4, 0.8, 0.2, 0.5, 0.05, 40, 5),
    ("huge", "ssv2"): (128, 2.5e-4, 0.8, 0.2, 0.0, 0.05, 20, 2),
    ("giant", "k710"): (96, 3.75e-4, 0.9, 0.3, 0.0, 0.1, 35, 5),
    ("giant", "k400"): (192, 7.5e-4, 0.9, 0.2, 0.0, 0.1, 30, 5),
    ("giant", "k400,start=k710"): (96, 3.75e-6, 0.9, 0.25, 0.0, 0.1, 3, 5),
    ("giant", "ssv2"): (96, 1.125e-4, 0.9, 0.25, 0.0, 0.05, 20, 2),
    ("giant", "k600,start=k710"): (96, 3.75e-6, 0.9, 0.25, 0.0, 0.1, 3, 5),
    ("giant", "ucf101,start=k710"): (24, 9.375e-5, 0.9, 0.35, 0.5, 0.05, 50, 5),
    ("giant", "hmdb51,start=k710"): (24, 4.6875e-5, 0.9, 0.35, 0.5, 0.05, 15, 5),
}


@pytest.mark.parametrize(("size", "data"), FINETUNING_V2)
def test_published_v2_finetuning(size, data):
    videos, lr, decay, drop_path, dropout, weight_decay, epochs, segments = FINETUNING_V2[size, data]
    c = load_config("finetune", f"recipe=v2,size={size},data={data}")
    assert settings.make_schedule(c, num_videos=240_000).peak_lr == pytest.approx(lr)
    assert (c.data.batch_size, c.data.clips_per_video) == (2 * videos, 2)
    assert (c.optim.layer_decay, c.model.drop_path, c.head.dropout) == (decay, drop_path, dropout)
    assert (c.optim.weight_decay, c.optim.duration, c.evaluate.segments) == (weight_decay, epochs, segments)
    assert c.model.tubelet[1] == (14 if size == "giant" else 16)


def test_a_path_takes_the_kinetics_recipe():
    c = load_config("pretrain", "data=/my/videos")
    assert (c.data.path, c.data.stride, c.data.batch_size) == ("/my/videos", 4, 2048)


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        *(("pretrain", f"size={size},data={data}") for size, data in PUBLISHED),
        *(("small", f"scale={scale}") for scale in ("laptop", "gpu")),
        ("debug", ""),
        *(("finetune", f"size={size},data={data}") for size, data in FINETUNING),
        ("finetune", "size=tiny,data=moving_shapes"),
        ("detect", "size=tiny,data=moving_shapes"),
        *(("detect", f"size={size}") for size in ("small", "base", "large", "huge")),
        ("detect", "size=base,data=/my/boxes,recipe=mmaction,start=finetuned,normalise=official"),
        ("finetune", "size=base,data=/my/videos,preset=small_data"),
        ("debug", "task=finetune"),
        *(("study", f"stage={stage}") for stage in ("pretrain", "contrast", "finetune")),
        ("study", "stage=finetune,labels=10,steps=100,look=b"),
        ("moco", "size=base,data=k400"),
        ("moco", "size=tiny,data=moving_shapes"),
        ("moco", "data=hmdb51"),
        *(("pretrain_v2", f"size={size}") for size in PRETRAINING_V2),
        *(("finetune", f"recipe=v2,size={size},data={data}") for size, data in FINETUNING_V2),
    ],
)
def test_every_config_is_locked_and_its_step_traces(name, arg):
    assert_locked_and_traced(load_config(name, arg))


def assert_locked_and_traced(c):
    with pytest.raises(AttributeError, match='Did you mean "lr"'):
        c.optim.lrr = 1.0
    assert set(settings.flatten(c)) == set(settings.flatten(settings.defaults()))
    task = task_of(c)
    frames, height, width = task.model.clip_size
    batch = planned.batch_shapes(task, 8)
    assert batch["video"].shape == (8, frames, height, width, 3)
    params = jax.eval_shape(task.init, jax.random.key(0))
    others = jax.eval_shape(task.others, params)
    step = jax.ShapeDtypeStruct((), "int32")
    traced = functools.partial(task.terms, layout=WHOLE)
    terms = jax.eval_shape(traced, params, others, batch, jax.random.key(0), step)
    assert all((leaf.shape, leaf.dtype) == ((), "float32") for leaf in jax.tree.leaves(terms))
    transform = task.clip_transform
    assert (transform.frames, transform.size) == (frames, (height, width))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """(name, size) of a config -> an export that it may learn from: tiny models of its clips."""
    folder = tmp_path_factory.mktemp("teachers")
    tiny = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.25,) * 3, "encoder": vit.Stack(16, 1, 2, 32)}
    for size, clip_size, patch in (("tiny", (8, 48, 48), 8), ("base", (16, 224, 224), 16)):
        fields = tiny | {"clip_size": clip_size, "tubelet": (2, patch, patch)}
        encoder = VideoMAEConfig(**fields, decoder=None)
        vm.save(vm.VideoMAE(encoder, rngs=nnx.Rngs(0)), folder / f"latent_{size}")
        classifier = ClassifierConfig(**fields, classes=("a", "b"))
        vm.save(vm.VideoClassifier(classifier, rngs=nnx.Rngs(0)), folder / f"distill_{size}")
    return folder


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("latent", "size=tiny"),
        ("latent", "size=base"),
        ("latent", "size=base,recipe=mvd"),
        ("distill", "size=tiny"),
        ("distill", "size=base"),
    ],
)
def test_every_config_with_a_teacher_is_locked_and_its_step_traces(name, arg, teachers):
    size = arg.split(",")[0].removeprefix("size=")
    assert_locked_and_traced(load_config(name, f"{arg},data=d,teacher={teachers / f'{name}_{size}'}"))


@pytest.mark.parametrize("kind", ["knn", "linear", "attentive"])
def test_probe_configs(kind):
    for arg in (f"kind={kind}", f"kind={kind},size=tiny,data=moving_shapes"):
        c = settings.checked(load_config("probe", arg))
        assert (c.task, c.probe.kind) == ("probe", kind)
        compute.make_mesh(c)
    c = settings.checked(load_config("study", f"stage={kind},labels=5"))
    assert (c.task, c.probe.kind, c.data.max_videos_per_class) == ("probe", kind, 5)


def test_every_config_file_is_tested():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {
        *("pretrain", "pretrain_v2", "latent", "moco", "finetune", "distill", "detect", "probe", "small"),
        *("study", "debug"),
    }


@pytest.mark.parametrize(
    ("name", "arg", "text"),
    [
        ("small", "dta=x", "'dta=x' is not understood: use data=moving_shapes,scale=laptop"),
        ("small", "scale=pod", "scale=pod is unknown: use laptop or gpu"),
        ("study", "stage=predict", "stage=predict is unknown: use pretrain, contrast, latent"),
        ("study", "labels=few", "labels=few is no number"),
        ("pretrain", "size=giant", "size=giant is unknown: use small, base, large, huge"),
        ("debug", "x", "'x' is not understood"),
        ("finetune", "size=vast", "size=vast is unknown: use tiny, small"),
        ("detect", "size=vast", "size=vast is unknown: use tiny, small"),
        ("detect", "size=tiny,recipe=mmaction", "size=tiny has a recipe of its own"),
        ("detect", "recipe=ours", "recipe=ours is unknown: use published or mmaction"),
        ("finetune", "size=giant,recipe=v3", "recipe=v3 is unknown: use v1 or v2"),
        ("finetune", "size=tiny,data=moving_shapes,recipe=v2", "size=tiny has a recipe of its own"),
        ("probe", "kind=lin", "kind=lin is unknown: use linear, attentive, knn"),
        ("finetune", "recipe=v3", "recipe=v3 is unknown: use v1 or v2"),
        ("finetune", "recipe=v2,size=small", "recipe=v2 has no row for size=small"),
        ("finetune", "start=k710", "start=k710 is for size=giant"),
        ("finetune", "start=k710,size=giant,data=ssv2", "size=giant with data=k400, k600, ucf101, hmdb51"),
        ("finetune", "pretrained=1600", "pretrained=1600 is unknown: 800 is for size=base"),
        ("finetune", "pretrained=800,size=large", "800 is for size=base"),
        ("finetune", "pretrained=800,recipe=v2", "pretrained=800 is for recipe=v1"),
        ("finetune", "pretrained=800,size=tiny", "size=tiny has a recipe of its own"),
        ("pretrain", "epochs=400", "epochs=400 is unknown: 800 is for k400, ssv2"),
        ("pretrain_v2", "size=tiny", "size=tiny is unknown: use small, base"),
        ("finetune", "preset=big", "preset=big is unknown: use published, small_data"),
        ("probe", "size=huge", "size=huge is unknown: use tiny or base"),
    ],
)
def test_wrong_config_arguments(name, arg, text):
    with pytest.raises(settings.UserError, match=text):
        load_config(name, arg)


def test_arguments_may_hold_commas_and_equals_signs():
    assert settings.parse_arg("data=/a,b/c=d,scale=x", data="", scale="").data == "/a,b/c=d"


@pytest.mark.parametrize(
    ("changes", "videos", "text"),
    [
        ({"unit": "hours"}, 1000, "optim.unit='hours' is unknown"),
        ({"unit": "epochs"}, 100, "takes 256 videos .* an epoch has 100: set .*=100 or less"),
        ({"duration": 10}, 1000, "optim.warmup=40 and optim.duration=10 epochs"),
        ({"duration": 0, "warmup": 0}, 1000, "must be positive"),
        ({"duration": 2**30}, 1000, "pass the limit"),
        ({"every": 20, "keep_every": 30}, 1000, "every=20 must be positive and divide"),
        ({"every": 0}, 1000, "every=0 must be positive"),
    ],
)
def test_schedules_that_cannot_be(changes, videos, text):
    c = settings.defaults()
    for key, value in changes.items():
        (c.checkpoint if "every" in key else c.optim)[key] = value
    with pytest.raises(settings.UserError, match=text):
        settings.make_schedule(c, videos)


NUMBERS = [
    key
    for key, value in settings.flatten(settings.defaults()).items()
    if not isinstance(value, str | bool) and key != "model.pixel_mean"  # any finite numbers
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -2])
def test_every_number_has_an_interval_that_it_must_lie_in(untyped, key, wrong):
    c = settings.defaults()
    *sections, name = key.split(".")
    place = c
    for section in sections:
        place = place[section]
    before = place[name]
    with place.unlocked():
        del place[name]  # what a config file may do, and a command line where types agree
        place[name] = (*before[1:], wrong) if isinstance(before, tuple) else wrong
    with pytest.raises(settings.UserError, match=rf"{key}=.* is out of range: use finite numbers in [\[(]"):
        settings.checked(c)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("optim.lr", 0.0, r"optim.lr=0.0 is out of range: use finite numbers in \(0, inf\)"),
        ("evaluate.temperature", 0.0, "temperature=0.0 is out of range"),
        ("mask.ratio", 1.0, r"mask.ratio=1.0 is out of range: use finite numbers in \(0, 1\)"),
        ("log.steps", 0, r"log.steps=0 is out of range: use finite numbers in \[1, inf\)"),
        ("model.pixel_std", (0.2, 0.0, 0.2), "pixel_std"),
        ("data.size", (32,), r"data.size=\[32\] must be 2 numbers, such as \(224, 224\)"),
        ("model.tubelet", (2, 8), "must be 3 numbers"),
        ("augment.area", (1.0, 0.5), "the smaller share, then the larger"),
    ],
)
def test_numbers_out_of_range(untyped, key, value, text):
    c = load_config("debug", "task=finetune" if key.startswith("augment") else "")
    section, name = key.split(".")
    c[section][name] = value
    with pytest.raises(settings.UserError, match=text):
        settings.checked(c)


def test_differences_name_what_a_result_depends_on():
    old, new = settings.defaults(), settings.defaults()
    new.log.steps, new.data.workers, new.mesh.fsdp, new.model.unroll = 1, 4, 2, 12
    assert settings.differences(old.to_dict(), new.to_dict()) == []
    new.optim.lr = 1.0
    new.data.size = (112, 112)
    assert settings.differences(old.to_dict(), new.to_dict()) == [
        "data.size: [224, 224] -> [112, 112]",
        "optim.lr: 0.00015 -> 1.0",
    ]


@pytest.mark.parametrize(
    ("section", "change", "text"),
    [
        ("mask", {"ratio": 0.01}, "mask ratio 0.01 hides 0 of 16 places"),
        ("mask", {"ratio": 1.0}, "hides 16 of 16"),
        ("mask", {"kind": "cube"}, "unknown mask 'cube'"),
        ("data", {"size": (33, 32)}, r"\(8, 33, 32\) cannot be cut"),
        ("model", {"position_resize": "x"}, "unknown position_resize"),
        ("model", {"dtype": "float8"}, "unknown dtype 'float8'"),
        ("model", {"tubelet": (2, 8)}, "must be three positive sizes"),
        ("log", {"statistics": "visble"}, "log.statistics=visble is unknown"),
        ("loss", {"kind": "huber"}, "loss.kind='huber' is unknown"),
        ("loss", {"normalize_target": False}, "log.statistics=true is for normalised targets"),
        ("data", {"stride": 0}, "data.stride=0 .* is for finetuning"),
    ],
)
def test_settings_that_do_not_fit_together(untyped, section, change, text):
    c = load_config("debug")
    c[section].update(change)
    with pytest.raises(settings.UserError, match=text):
        table.make_task(compute.on_this_machine(c))


@pytest.mark.parametrize(
    ("section", "change", "text"),
    [
        ("head", {"kind": "sigmoid"}, "unknown head 'sigmoid'"),
        ("head", {"pooling": "max"}, "unknown pooling 'max'"),
        ("head", {"dropout": 1.0}, "head.dropout=1.0 is out of range"),
        ("head", {"kind": "regression"}, "mixup and cutmix mix classes"),
        ("model", {"drop_path": 1.5}, "drop_path=1.5 is out of range"),
        ("data", {"batch_size": 9}, "batch_size=9 is odd, and mixup pairs clips"),
        ("augment", {"policy": "auto"}, "'auto' is not understood"),
        ("augment", {"mix_switch": 2.0}, "augment.mix_switch=2.0 is out of range"),
        ("loss", {"class_weights": "some"}, "loss.class_weights='some' is unknown"),
        ("optim", {"freeze_blocks": 3}, "freeze_blocks=3 of 2 blocks"),
    ],
)
def test_finetuning_settings_that_do_not_fit_together(untyped, section, change, text):
    c = load_config("debug", "task=finetune")
    c[section].update(change)
    with pytest.raises(settings.UserError, match=text):
        task_of(c)


@pytest.mark.parametrize(
    ("task", "key", "value"),
    [
        ("pretrain", "augment.mixup", 0.5),
        ("pretrain", "optim.ema", 0.9),
        ("finetune", "mask.ratio", 0.5),
        ("finetune", "probe.lr", 0.5),
        ("probe", "optim.lr", 0.5),
        ("probe", "loss.smoothing", 0.5),
        ("probe", "head.pooling", "first"),
        ("detect", "data.root", "somewhere"),
        ("detect", "evaluate.split", "validation"),
    ],
)
def test_a_key_that_the_task_does_not_read_is_refused(task, key, value):
    c = load_config("debug", f"task={task}")
    section, name = key.split(".")
    c[section][name] = value
    with pytest.raises(settings.UserError, match=f"{key}={value} is set, but only .* would read it"):
        settings.checked(c)


@pytest.mark.parametrize(
    ("platform", "dtype", "kind"),
    [
        ("cpu", "float32", "blocks"),
        ("gpu", "float32", "queries"),
        ("gpu", "bfloat16", "cudnn"),
        ("tpu", "float32", "splash"),
        ("tpu", "bfloat16", "splash"),
    ],
)
def test_attention_of_each_device(platform, dtype, kind):
    c = load_config("debug", "task=pretrain")
    c.model.update(attention="auto", dtype=dtype)
    assert compute.settled(c, platform, None).model.attention == kind
    c.model.attention = "xla"
    assert compute.settled(c, platform, None).model.attention == "xla"
    c.model.attention = "cudnn" if platform == "tpu" else "splash"
    with pytest.raises(settings.UserError, match=r"does not work here with \w+ .it is for a [GT]PU"):
        compute.settled(c, platform, None)


def test_attention_falls_back_with_one_line_where_the_fused_kernel_fails(monkeypatch, capsys):
    """A machine that says it has a GPU, and cannot run its kernel."""
    c = load_config("debug", "task=pretrain")
    c.model.update(attention="auto", dtype="bfloat16")
    check = compute.try_kernels.__wrapped__  # without what was found before
    assert compute.settled(c, "gpu", check).model.attention == "queries"
    (line,) = capsys.readouterr().out.splitlines()
    assert "model.attention=auto: the fused kernel does not work here, using queries" in line
    c.model.attention = "cudnn"
    with pytest.raises(settings.UserError, match=r"model.attention=cudnn does not work here with bfloat16"):
        compute.settled(c, "gpu", check)
    tried = []
    monkeypatch.setattr(compute.attention, "attend", lambda q, k, v, kind: tried.append(kind) or q + k + v)
    assert compute.settled(c, "gpu", check).model.attention == "cudnn"
    assert set(tried) == {"cudnn"}


def test_a_small_data_set_has_many_steps_an_epoch():
    c = load_config("finetune", "size=base,data=/my/videos,preset=small_data")
    schedule = settings.make_schedule(c, 270)
    assert schedule.steps_per_epoch == 16
    assert schedule.peak_lr == pytest.approx(c.optim.lr * 16 / 256)


@pytest.mark.parametrize(
    ("size", "decoder", "batch", "epochs"),
    [
        ("small", (384, 6, 2), 1024, 400),
        ("base", (768, 12, 2), 1024, 400),
        ("large", (512, 8, 4), 512, 400),
        ("huge", (640, 8, 8), 512, 800),
    ],
)
def test_mvd_has_the_decoders_of_its_scripts(size, decoder, batch, epochs):
    c = load_config("latent", f"size={size},recipe=mvd")
    stack = c.model.decoder
    assert (stack.width, stack.num_heads, stack.depth) == decoder
    assert (c.data.batch_size, c.optim.duration) == (batch, epochs)


@pytest.mark.parametrize(("arg", "segments"), [("size=base", 10), ("size=giant", 5)])
def test_hmdb51_is_tested_as_each_paper_did(arg, segments):
    assert load_config("finetune", f"{arg},data=hmdb51").evaluate.segments == segments
