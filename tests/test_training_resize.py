"""Where a run's crops are resized: chosen, said, and the same clips either way."""

import dataclasses
import json
import pathlib
import time

import numpy as np
import pytest
from conftest import load_config, mesh_of, task_of

from videomae_jax import config as settings
from videomae_jax.apps import prepare
from videomae_jax.data import prepared
from videomae_jax.tasks import table
from videomae_jax.training import compute, trainer
from videomae_jax.training.splits import Splits
from videomae_jax.training.task import Run


def losses_of(workdir: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared_shapes(shapes, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("prepared") / "shapes"
    prepare.run(str(shapes), str(folder), prepare.Options(processes=1, codec="h264_intra"))
    return folder


def test_crops_resized_on_the_device_train_alike(prepared_shapes, tmp_path):
    """The same clips to a grey level, so the same losses to a little; both are said in config.json."""
    losses = {}
    for wanted, meant in (("auto", "host"), ("device", "device")):
        config = load_config("debug", f"data={prepared_shapes}")
        config.optim.duration = 4
        config.data.resize = wanted
        table.train(config, tmp_path / wanted, time.time())
        stored = json.loads((tmp_path / wanted / "config.json").read_text())
        assert stored["config"]["data"]["resize"] == meant
        losses[wanted] = losses_of(tmp_path / wanted)
    np.testing.assert_allclose(losses["device"], losses["auto"], rtol=2e-3)
    assert losses["device"] != losses["auto"]


def test_where_crops_are_resized(shapes, prepared_shapes, debug_config):
    train = prepared.open_source(str(prepared_shapes), "train")
    files = prepared.open_source(str(shapes), "train")
    assert (train.short_side, files.short_side) == (32, 0)
    for source, platform, meant in ((train, "gpu", "device"), (train, "cpu", "host"), (files, "tpu", "host")):
        assert compute.settled_resize(debug_config, source, platform).data.resize == meant
    assert debug_config.data.resize == "auto"
    large = dataclasses.replace(train, short_side=720)  # one large video of them is enough
    assert compute.settled_resize(debug_config, large, "gpu").data.resize == "host"
    debug_config.data.resize = "device"
    with pytest.raises(
        settings.UserError, match=r"data\.resize=device needs frames of a known size: prepare"
    ):
        compute.settled_resize(debug_config, files, "gpu")
    debug_config.data.resize = "cloud"
    with pytest.raises(
        settings.UserError, match=r"data\.resize=.cloud. is unknown: use host, device or auto"
    ):
        compute.settled_resize(debug_config, train, "gpu")


def test_the_loader_counts_the_squares_that_it_ships(debug_config, prepared_shapes):
    train = dataclasses.replace(prepared.open_source(str(prepared_shapes), "train"), short_side=40)
    for resize, side in (("host", 32), ("device", 40)):
        debug_config.data.resize = resize
        task = task_of(debug_config, train)
        schedule = settings.make_schedule(debug_config, len(train))
        run = Run(debug_config, pathlib.Path(), Splits(train, train, train), schedule, mesh_of(1))
        made = task.clip_transform.random_map((0, train[0]), np.random.default_rng(0))["video"]
        assert made.shape[2:4] == (side, side)
        assert trainer.host_batch_bytes(run, task) == debug_config.data.batch_size * made[0].nbytes


@pytest.mark.parametrize("task", ["pretrain", pytest.param("contrast", marks=pytest.mark.slow)])
def test_a_run_from_before_there_was_a_choice_goes_on(shapes, tmp_path, task):
    """Of a method that resizes on the device where it can, and of one that never does."""
    debug_config = load_config("debug", f"data={shapes},task={task}")
    debug_config.optim.update(duration=2, warmup=1)
    table.train(debug_config, tmp_path, time.time())
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["config"]["data"]["resize"]
    path.write_text(json.dumps(stored))
    assert table.train(debug_config, tmp_path, time.time())["step"] == 2
