"""Our step through the compilers of TPUs and GPUs that are not there: fits, traffic, exchange.

Needs the extras `plan` and `cuda`; run with -m compile. Limits stand a few per cent above what was measured
(docs/performance.md): a change of one needs a word in its commit.
"""

import importlib.util

import numpy as np
import pytest
from conftest import load_config

from videomae_jax.tasks import table
from videomae_jax.training import ahead, planned, step, trainer

pytestmark = pytest.mark.compile
# Of one encoder and one decoder block and all else: temporaries, bytes per clip.
LIMIT_V5E_GIB, LIMIT_V5E_GB = 0.9, 0.35
LIMIT_H100_GIB, LIMIT_H100_GB = 1.9, 0.255


def topology(text: str) -> ahead.Topology:
    package = "libtpu" if text[0] == "v" else "jax_plugins.xla_cuda12"
    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here: EXTRAS=plan,cuda launch/local.sh test -m compile")
    ahead.without_devices()
    return ahead.topology(text)


def base(clips: int, mesh: tuple[int, int, int] = (-1, 1, 1)):
    """ViT-B pretraining with a block in each stack: slopes are checked by benchmarks/compiled.py."""
    config = load_config("pretrain", "size=base,data=k400")
    config.model.encoder.depth = config.model.decoder.depth = 1
    config.data.batch_size = clips
    config.mesh.update(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    return config


@pytest.mark.parametrize(
    ("mesh", "kinds"),
    [
        ((4, 1, 1), {("all-reduce", ("data",))}),
        ((1, 4, 1), {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)), ("all-reduce", ("fsdp",))}),
        ((2, 1, 2), {("all-reduce", ("data",)), ("all-reduce", ("tensor",))}),
    ],
    ids=["data", "fsdp", "tensor"],
)
def test_v5e(mesh, kinds):
    this = planned.prepare(base(64, mesh), table.make_task, topology("v5e:2x2"), 0, 400)
    assert this.config.model.attention == "splash"
    found = planned.compile_step(this)
    assert not found.trouble
    assert {(c.kind, c.axes) for c in found.collectives if c.bytes > 64} <= kinds
    assert found.fits(this.topology.chip)
    assert not found.talks_to_host
    if mesh == (4, 1, 1):
        assert found.temporaries / 2**30 < LIMIT_V5E_GIB
        assert found.traffic.memory / this.share / 1e9 < LIMIT_V5E_GB


def test_h100():
    this = planned.prepare(base(64), table.make_task, topology("h100:1"), 0, 400)
    assert this.config.model.attention == "cudnn"
    found = planned.compile_step(this)
    assert not found.trouble
    assert found.temporaries / 2**30 < LIMIT_H100_GIB
    assert found.traffic.memory / 64 / 1e9 < LIMIT_H100_GB
    assert not found.collectives
    assert not found.talks_to_host


def test_b200_has_the_fused_kernel_and_an_a100_in_float32_none():
    config = base(16)
    assert not planned.compile_step(
        planned.prepare(config, table.make_task, topology("b200:1"), 0, 400)
    ).trouble
    config.model.dtype = "float32"
    this = planned.prepare(config, table.make_task, topology("a100:1"), 0, 400)
    assert this.config.model.attention == "queries"
    assert not planned.compile_step(this).trouble


def test_a_pod_of_64_hosts_is_assembled_in_order():
    """Rows of a batch are those of each host in turn, and the state's parts those of the mesh."""
    pod = topology("v5e:16x16")
    config = base(2048, (32, 8, 1))
    this = planned.prepare(config, table.make_task, pod, 0, 400)
    state, shardings = step.abstract_state(trainer.recipe(this.config, this.task), this.mesh)
    assert len({device.process_index for device in pod.devices}) == 64
    from videomae_jax import sharding

    rows = sharding.batch_sharding(this.mesh)
    shape = (2048, 16, 224, 224, 3)
    assert rows.shard_shape(shape) == (8, 16, 224, 224, 3)
    for device, index in rows.devices_indices_map(shape).items():
        host = device.process_index
        assert host * 32 <= index[0].start < index[0].stop <= (host + 1) * 32
    kernel = state.params["encoder"]["blocks"]["fc1"]["kernel"]
    part = shardings.params["encoder"]["blocks"]["fc1"]["kernel"].shard_shape(kernel.shape)
    assert part == (1, 96, 3072)
    assert np.prod(part) * 8 == kernel.size


@pytest.mark.parametrize(
    ("text", "devices", "host", "memory"),
    [
        ("v5e:1x1", 1, 1, 15.75),
        ("v5p:2x2x1", 4, 4, 95.74),
        ("v4:2x2x2", 16, 8, 15.375),
        ("v6e:2x4", 8, 4, 31.25),
    ],
)
def test_slices(text, devices, host, memory):
    """A v4 chip is two devices, each with half of it."""
    found = topology(text)
    assert (len(found.devices), found.host) == (devices, host)
    assert found.chip.memory / 2**30 == memory
    assert max(d.process_index for d in found.devices) == devices // host - 1
