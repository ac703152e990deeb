"""What benchmarks count, against what is compiled."""

import sys

import jax
import pytest
import test_sharding
from conftest import ROOT, mesh_of

from videomae_jax import sharding
from videomae_jax.training import optim
from videomae_jax.training.program import Program

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_collectives_of_the_compiled_step(sizes):
    """What a plan counts, loops included, is what data, fsdp and tensor parallelism must exchange."""
    task, mesh = test_sharding.PRETRAIN, mesh_of(*sizes)
    state, text = test_sharding.compiled(task, mesh, optim.adamw((0.9, 0.95), 1e-8, 0.05, 0.0))
    found = [c for c in Program(text).collectives(dict(mesh.shape)) if c.bytes > 64]
    parameters = jax.tree.leaves(state.params)
    if sizes == (8, 1, 1):
        assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("data",))}
        assert sum(c.bytes * c.times for c in found) == pytest.approx(
            4 * sum(x.size for x in parameters), rel=0.01
        )
        return
    rules = sharding.state_sharding(mesh, state).params
    cut = [
        (x.size, rule.spec)
        for x, rule in zip(parameters, jax.tree.leaves(rules), strict=True)
        if "fsdp" in rule.spec
    ]
    # Every part is put together forward and backward (outside of blocks once), its gradient cut once.
    whole = 4 * sum(size / (mesh.shape["tensor"] if "tensor" in spec else 1) for size, spec in cut)
    scattered = sum(c.bytes * c.times for c in found if c.kind == "reduce-scatter")
    gathered = sum(c.bytes * c.times for c in found if c.kind == "all-gather")
    assert scattered == pytest.approx(whole, rel=0.01)
    assert whole < gathered <= 2 * whole
    assert {c.axes for c in found if c.kind in ("reduce-scatter", "all-gather")} == {("fsdp",)}
    if mesh.shape["tensor"] > 1:
        assert sum(c.times for c in found if c.axes == ("tensor",)) >= 4 * 5  # four a block, five blocks


def test_flops_of_the_published_base_model():
    """212 GFLOP a clip, as design.md has it: forward and backward of the matmuls."""
    import step_time

    task = step_time.make_task(step_time.vit.SIZES["base"], "bfloat16", 1, "pretrain")
    assert task.flops_per_clip() == pytest.approx(212e9, rel=0.07)
