"""Traffic and exchange read from compiled programs, against what they must be."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec

from videomae_jax.training.program import Bytes, Collective, Program

SIDE = 256
MATRIX = 4 * SIDE**2  # bytes


def compiled(function, *shapes) -> Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_product_reads_two_matrices_and_writes_one():
    program = compiled(jnp.matmul, (SIDE, SIDE), (SIDE, SIDE))
    assert program.bytes == Bytes(3 * MATRIX)


def test_scanned_and_unrolled_products_move_the_same():
    """A loop's body counts as often as it runs; of the stack of matrices one is read each time."""

    def scanned(x, stack):
        return jax.lax.scan(lambda x, matrix: (x @ matrix, None), x, stack)[0]

    def unrolled(x, stack):
        for matrix in stack:
            x = x @ matrix
        return x

    shapes = ((SIDE, SIDE), (7, SIDE, SIDE))
    once, again = (compiled(function, *shapes).bytes.memory for function in (scanned, unrolled))
    # A slice may be copied before it is read, and what a loop carries at its end.
    assert 7 * 3 * MATRIX <= again <= 7 * 5 * MATRIX
    assert 7 * 3 * MATRIX <= once <= 7 * 8 * MATRIX


def test_loops_within_loops():
    def inner(x, _):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ y), x), None

    program = compiled(lambda x: jax.lax.scan(inner, x, length=5)[0], (SIDE, SIDE))
    assert 15 * 2 * MATRIX <= program.bytes.memory <= 15 * 6 * MATRIX


def test_fusions_beside_others_count_as_fusions():
    """As a GPU's program of JAX 0.11 has them: of the stack one matrix is read."""
    program = Program("""HloModule jit_f

%fused (param_0: f32[12,256,256], param_1: s32[]) -> f32[1,256,256] {
  %param_0 = f32[12,256,256] parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,256,256] dynamic-slice(%param_0, %param_1, %zero, %zero)
}

ENTRY %main (stack: f32[12,256,256], place: s32[]) -> f32[1,256,256] {
  %stack = f32[12,256,256] parameter(0)
  %place = s32[] parameter(1)
  %start = ((f32[12,256,256], s32[]), f32[1,256,256], u32[]) fusion-start(%stack, %place), calls=%fused
  ROOT %done = f32[1,256,256] fusion-done(%start)
}
""")
    assert 2 * MATRIX <= program.bytes.memory <= 2 * MATRIX + 4


def test_what_a_loop_ends_by_itself_counts_once():
    def halve(x):
        return jax.lax.while_loop(lambda y: y.sum() > 1.0, lambda y: y * 0.5, x)

    assert compiled(halve, (SIDE, SIDE)).bytes.memory <= 8 * MATRIX


MESH_TEXT = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: bf16[2,8]) -> bf16[2,8] {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (bf16[2,8], bf16[4,8]) all-gather-start(%p), replica_groups=[4,2]<=[2,2,2]T(1,0,2), dimensions={0}
  %gathered = bf16[4,8]{1,0} all-gather-done(%start)
  %wide = f32[2,8]{1,0:T(8,128)S(1)} convert(%p)
  ROOT %all = bf16[2,8]{1,0} all-reduce(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""


def test_tiles_memories_and_groups():
    program = Program(MESH_TEXT)
    found = program.collectives({"data": 2, "fsdp": 2, "tensor": 2})
    tile = 8 * 128 * 2  # what bf16[2,8] takes
    assert found == [
        Collective("all-gather", ("tensor",), 2 * tile, 1),
        Collective("all-reduce", ("data",), tile, 1),
    ]
    assert program.bytes.on_chip == 8 * 128 * 4


def test_what_moves_most():
    def both(x, y):
        with jax.named_scope("large"):
            large = x @ x
        with jax.named_scope("small"):
            small = y @ y
        return large, small

    (first, most), (second, less) = compiled(both, (SIDE, SIDE), (SIDE // 2, SIDE // 2)).movers(2)
    assert "large" in first
    assert "small" in second
    assert most == 4 * less == 2 * MATRIX  # one operand, one result


def test_a_step_that_calls_back_talks_to_the_host():
    def quiet(x):
        return x + 1

    def loud(x):
        jax.debug.callback(lambda _: None, x)
        return x + 1

    assert not compiled(quiet, (SIDE,)).talks_to_host
    assert compiled(loud, (SIDE,)).talks_to_host


def test_collectives_of_a_mapped_program():
    mesh = mesh_of(2, 2, 2)
    whole, rows = PartitionSpec(), PartitionSpec(("data", "fsdp"))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=whole, check_vma=False)
    def total(x):
        sums = jax.lax.scan(lambda _, row: (_, jax.lax.psum(row, "tensor")), 0, x)[1]
        return jax.lax.psum(sums.sum(0), ("data", "fsdp"))

    text = jax.jit(total).lower(jax.ShapeDtypeStruct((12, SIDE), jnp.float32)).compile().as_text()
    found = Program(text).collectives(dict(mesh.shape))
    assert sorted(found) == [
        Collective("all-reduce", ("data", "fsdp"), 4 * SIDE, 1),
        Collective("all-reduce", ("tensor",), 4 * SIDE, 3),
    ]


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        Program("HloModule empty")
