"""What benchmarks count, against what is compiled."""

import importlib.util
import sys

import jax
import numpy as np
import pytest
import test_sharding
from conftest import ROOT, mesh_of

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sizes", [*map(test_sharding.slow, [(8, 1, 1), (1, 8, 1)]), (2, 2, 2)], ids=str)
def test_traced_collectives_are_those_of_the_compiled_step(scaling, sizes):
    """Bytes by kind; a loop's body stands once in the compiled text, so loops are cut open."""
    task = test_sharding.PRETRAIN
    traced = [c for c in scaling.traced(task, sizes, test_sharding.ROWS) if c.bytes > 4]
    mesh = mesh_of(*sizes)
    state, text = test_sharding.compiled(task, mesh, scaling.optim.adamw((0.9, 0.95), 1e-8, 0.05, 0.0))
    found = test_sharding.collectives(text)
    in_loops = {kind: 0 for kind in found}
    for kind, shapes in found.items():
        in_loops[kind] = sum(4 * int(np.prod(shape)) * count for shape, count in shapes.items())
        if kind == "reduce-scatter":  # the text has what is left
            in_loops[kind] *= sizes[1]
    once = {kind: sum(c.bytes for c in traced if c.kind == kind) for kind in {c.kind for c in traced}}
    assert once == in_loops
    # Per step the encoder's loop runs three times, the decoder's twice.
    assert {c.times for c in traced} <= {1, 2, 3}
    if sizes == (8, 1, 1):
        assert once == {"all-reduce": 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))}


def test_ring_time(scaling):
    cluster = scaling.Cluster(1e12, near=8, near_bandwidth=100.0, far_bandwidth=10.0)
    reduced = scaling.Collective("all-reduce", ("data", "fsdp"), 800, 2)
    assert scaling.seconds_of([reduced], (8, 1, 1), cluster) == pytest.approx(2 * 2 * 7 / 8 * 800 / 100)
    assert scaling.seconds_of([reduced], (16, 1, 1), cluster) == pytest.approx(2 * 2 * 15 / 16 * 800 / 10)
    gathered = scaling.Collective("all-gather", ("fsdp",), 800, 1)
    assert scaling.seconds_of([gathered], (16, 8, 1), cluster) == pytest.approx(7 / 8 * 800 / 100)
    assert scaling.seconds_of([gathered], (16, 1, 8), cluster) == 0


def test_flops_of_the_published_base_model():
    """212 GFLOP a clip, as design.md has it: forward and backward of the matmuls."""
    import step_time

    task = step_time.make_task(step_time.vit.SIZES["base"], "bfloat16", 1, "pretrain")
    assert task.flops_per_clip() == pytest.approx(212e9, rel=0.07)
