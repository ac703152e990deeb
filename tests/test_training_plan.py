"""`plan`: what it says of a step that this machine can compile, and of devices that it can not."""

import dataclasses
import json

import jax
import pytest
from conftest import load_config

from videomae_jax import hardware, storage
from videomae_jax.config import UserError
from videomae_jax.tasks import table
from videomae_jax.training import ahead, plan, planned, rehearse
from videomae_jax.training.program import Bytes, Collective


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "cache", lambda: tmp_path / "cache")


@pytest.fixture
def cpus() -> ahead.Topology:
    """Eight fake devices as those of two machines."""
    return ahead.Topology("cpu:8", "cpu", None, jax.devices(), 4)


def like(chip: str) -> ahead.Topology:
    """The same with a data sheet."""
    return ahead.Topology(f"{chip}:8", "cpu", hardware.CHIPS[chip], jax.devices(), 8)


@pytest.mark.parametrize("task", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_plan_without_data(task, cpus, capsys):
    config = load_config("debug", f"task={task}")
    config.data.path = "/nowhere"
    found = plan.run(config, table.make_task, cpus, classes=5)
    assert found["compiles"] is True
    assert found["fits"] is None  # no data sheet of this machine
    assert found["bytes_per_clip"] > 10 * 3 * 8 * 32 * 32
    assert found["clips_per_device"] == config.data.batch_size / 8
    assert {row["kind"] for row in found["collectives"]} >= {"all-reduce"}
    assert all(set(row["axes"]) <= {"data"} for row in found["collectives"])
    json.dumps(found)
    assert found["talks_to_host"] is False
    assert found["movers"][0]["bytes_per_clip"] < found["bytes_per_clip"]
    said = capsys.readouterr().out
    assert "GFLOP of matmuls" in said
    # The program is known now: nothing is compiled again.
    assert plan.run(config, table.make_task, cpus, classes=5) == found


def test_bounds_and_hours_by_a_data_sheet(capsys):
    config = load_config("debug", "task=pretrain")
    config.optim.update(unit="epochs", duration=3, warmup=0)
    found = plan.run(config, table.make_task, like("v5e"), videos=800)
    assert found["fits"] is True
    chip = hardware.CHIPS["v5e"]
    assert found["bounds"]["memory"] == pytest.approx(chip.bandwidth / found["bytes_per_clip"])
    assert found["bounds"]["matmuls"] == pytest.approx(chip.flops / found["flops_per_clip"])
    rate = found["bound_clips_per_second_per_device"]
    assert rate == min(found["bounds"].values()) == found["bounds"][found["bound_by"]]
    assert found["steps"] == 3 * (800 // config.data.batch_size)
    half = found["at"]["50% of the bound"]
    assert half["hours"] == pytest.approx(found["clips"] / (rate * 8) / 3600 / 0.5)
    assert "bound by" in capsys.readouterr().out


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_said_and_the_largest_found(capsys):
    config = load_config("debug", "task=pretrain")
    config.data.batch_size = 64
    topology = like("v5e")
    needs = planned.compile_step(planned.prepare(config, table.make_task, topology, 0, 2))
    limit = needs.arguments + needs.temporaries - 1  # one byte too few
    small = topology.chip.__class__(**vars(topology.chip) | {"memory": float(limit)})
    found = plan.run(config, table.make_task, topology._replace(chip=small), fit=True)
    assert found["fits"] is False
    assert 0 < found["largest_clips_per_device"] < 8
    assert "--config.optim.accumulate=2" in found["advice"][0]
    assert found["smallest_remat"] == "dots"
    assert "--config.model.remat=dots: the least that fits this batch" in found["advice"]
    assert "does NOT fit" in capsys.readouterr().out


def test_what_a_compiler_refuses_for_its_size_is_fitted(monkeypatch, capsys):
    """As a TPU's does: it is the batch or the remat that must change, not the attention kernel."""

    def compiled(this: planned.Planned) -> planned.Compiled:
        if this.config.model.remat == "none" and this.rows > 4:
            return planned.Compiled("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        return planned.Compiled("", 2**30, this.rows * 2**30, Bytes(1.0))

    monkeypatch.setattr(plan, "compile_step", compiled)
    config = load_config("debug", "task=pretrain")
    config.data.batch_size = 64
    found = plan.run(config, table.make_task, like("v5e"), fit=True)
    assert (found["fits"], found["compiles"], found["largest_clips_per_device"]) == (False, False, 4)
    assert "--config.model.remat=dots: the least that fits this batch" in found["advice"]
    assert not [line for line in found["advice"] if "attention=xla" in line]
    assert "does NOT fit: RESOURCE_EXHAUSTED" in capsys.readouterr().out


def test_time_on_links():
    chip, mesh = hardware.CHIPS["h100"], {"data": 2, "fsdp": 8, "tensor": 1}
    near = (Collective("all-gather", ("fsdp",), 8 * 10**9, 2),)
    far = (Collective("all-reduce", ("data",), 10**9, 1),)
    assert planned.link_seconds(near, mesh, chip, 8) == pytest.approx(2 * 7 / 8 * 8e9 / 450e9)
    assert planned.link_seconds(far, mesh, chip, 8) == pytest.approx(1e9 / 50e9)
    assert planned.link_seconds(far, mesh, chip, 16) == pytest.approx(1e9 / 450e9)
    # In several machines at once: each of its eight devices in a machine carries an eighth between them.
    wide = (Collective("all-reduce", ("data",), 4 * 10**8, 1),)
    within, between = 2 * 7 / 8 * 4e8 / 450e9, 2 * 3 / 4 * 4e8 / (8 * 50e9)
    assert planned.link_seconds(wide, {"data": 32}, chip, 8) == pytest.approx(max(within, between))


@pytest.mark.parametrize("rows", [8, 24, 48, 64, 128])
def test_the_largest_batch_is_found_where_a_compiler_only_refuses(rows):
    """However far beyond it the batch is that was asked for."""
    config = load_config("debug", "task=pretrain")
    config.data.batch_size = 8 * rows
    this = planned.prepare(config, table.make_task, like("v5e"), 0, 2)

    def again(clips):
        trouble = "RESOURCE_EXHAUSTED" if clips > 20 else ""
        return this, planned.Compiled(trouble, 2**28, clips * 2**29, Bytes(1.0))

    assert this.rows == rows
    assert plan.largest_batch(this, again) == 20


@pytest.mark.slow
def test_flags_of_the_compiler_make_another_program(cpus, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "cache", lambda: tmp_path)
    this = planned.prepare(load_config("debug", "task=pretrain"), table.make_task, cpus, 0, 2)
    for flags in ("", "", "--xla_cpu_enable_fast_math=false"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        planned.compile_step(this)
    assert len(list((tmp_path / "plans").glob("*.json"))) == 2


def test_a_chip_of_which_only_the_peak_is_known_has_one_bound(cpus):
    this = planned.prepare(load_config("debug", "task=pretrain"), table.make_task, cpus, 0, 2)
    this = dataclasses.replace(this, topology=this.topology._replace(chip=hardware.chip_of("NVIDIA L40S")))
    assert set(planned.bounds(this, planned.Compiled("", 1, 1, Bytes(1.0)))) == {"matmuls"}


def test_what_does_not_compile_is_a_result():
    broken = planned.Compiled(trouble="VMEM limit exceeded")
    assert broken.fits(hardware.CHIPS["v5e"]) is False
    assert planned.Compiled("", 2**30, 2**30, Bytes(1.0)).fits(hardware.CHIPS["v5e"]) is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "not understood"),
        ("v5e:4", "wired in 2 axes, as v5e:2x2"),
        ("v5p:4x4", "wired in 3 axes"),
        ("h100:2x2x2", "not understood"),
        ("h100:0", "not understood"),
        ("tpu:4x4", "not understood"),
        ("cpu:2x2", "not understood"),
    ],
)
def test_topologies_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        ahead.parse(text)


def test_settings_that_cannot_be_planned(cpus):
    config = load_config("debug", "task=pretrain")
    config.mesh.mapping = "pmap"
    with pytest.raises(UserError, match=r"plan compiles the step of mesh.mapping=jit"):
        planned.prepare(config, table.make_task, cpus, 0, 2)
    config.mesh.mapping = "jit"
    config.data.batch_size = 12
    with pytest.raises(UserError, match="does not divide over"):
        planned.prepare(config, table.make_task, cpus, 0, 2)
    config.model.attention = "splash"
    with pytest.raises(UserError, match=r"model.attention=splash does not work here"):
        planned.prepare(config, table.make_task, cpus, 0, 2)
    with pytest.raises(UserError, match="task=probe trains no model step by step"):
        planned.prepare(load_config("debug", "task=probe"), table.make_task, cpus, 0, 2)


@pytest.mark.parametrize("task", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_ten_steps_on_this_machine(task, monkeypatch):
    config = load_config("debug", f"task={task}")
    found = rehearse.run(config, table.make_task, 5)
    assert found["clips_per_second_per_device"] > 0
    assert found["bounds"] == {}  # no data sheet of this machine
    assert "1 clips per device on 8 x cpu" in found["text"]
    known = rehearse.here()._replace(chip=hardware.CHIPS["v5e"])
    monkeypatch.setattr(rehearse, "here", lambda: known)
    found = rehearse.run(config, table.make_task, 5)
    assert "of the bound by" in found["text"]
    assert found["row"].count("|") == 8
