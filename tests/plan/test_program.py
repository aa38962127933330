"""What a program moves, counted in texts whose numbers are known, and in programs that XLA made here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lizard_jax.plan.flops import matmul_flops
from lizard_jax.plan.program import launches, moved, size
from tests.train.tiny import mesh_of

TEXT = """HloModule jit_step, is_scheduled=true

%cut (p0: f32[64,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[64,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %piece = f32[1,128]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,128}
}

%body (state: (s32[], f32[64,128], f32[1,128])) -> (s32[], f32[64,128], f32[1,128]) {
  %state = (s32[], f32[64,128]{1,0}, f32[1,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = f32[64,128]{1,0} get-tuple-element(%state), index=1
  %one = f32[1,128]{1,0} fusion(%all, %i), kind=kLoop, calls=%cut
  %gathered = f32[8,128]{1,0} all-gather(%one), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %next = (s32[], f32[64,128]{1,0}, f32[1,128]{1,0}) tuple(%i, %all, %one)
}

%condition (state: (s32[], f32[64,128], f32[1,128])) -> pred[] {
  %state = (s32[], f32[64,128]{1,0}, f32[1,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(64)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[64,128], w: bf16[128,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %w = bf16[128,128]{1,0} parameter(1)
  %near = bf16[128,128]{1,0:S(1)} copy(%w)
  %y = f32[64,128]{1,0} custom-call(%x, %near), frontend_attributes={kernel_metadata={
"note":"{\\"block\\": 512}"
}}, metadata={op_name="jit(step)/kernel"}
  %start = (s32[], f32[64,128]{1,0}, f32[1,128]{1,0}) tuple(%x, %x, %x)
  %loop = (s32[], f32[64,128]{1,0}, f32[1,128]{1,0}) while(%start), condition=%condition, body=%body
  %sum = f32[64,128]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %left = f32[64,128]{1,0} collective-permute(%sum), channel_id=3, source_target_pairs={{0,1}}
  ROOT %out = f32[64,128]{1,0} copy(%left)
}
"""


def test_a_text_by_hand():
    x, w, row = 64 * 128 * 4, 128 * 128 * 2, 128 * 4
    found = moved(TEXT, 8)
    gathers = 64 * 8 * row
    assert found.results == {"all-gather": gathers, "all-reduce": x, "collective-permute": x}
    assert found.links == {"all-gather": gathers * 7 / 8, "all-reduce": 2 * x * 3 / 4, "collective-permute": x}
    # The copy to VMEM reads w, the kernel x alone; each round cuts a row, writes it, and gathers eight.
    outside = w + 2 * x + 2 * x + 2 * x + 2 * x
    assert found.memory == outside + 64 * (2 * row + 4 + row + 8 * row)
    assert launches(TEXT) == 5 + 64 * 2  # the ends' copies, the kernel, two collectives; a fusion and a gather a round


def test_two_turns_in_one_and_a_gather_under_way_in_a_loop():
    """As a TPU's compiler has them: its counter goes by twos, and pieces of one gather lie in, before and after it."""
    piece = """%piece (p: f32[8,128], q: f32[64,128], r: f32[2,128]) -> (f32[8,128], f32[64,128], f32[2,128]) {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[64,128]{1,0} parameter(1)
  %r = f32[2,128]{1,0} parameter(2)
  %all-gather.NAME = f32[64,128]{1,0} all-gather(%p), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  %twice = f32[2,128]{1,0} add(%r, %r)
  ROOT %all = (f32[8,128]{1,0}, f32[64,128]{1,0}, f32[2,128]{1,0}) tuple(%p, %q, %twice)
}

"""
    pieces = "".join(piece.replace("%piece", f"%piece.{n}").replace("NAME", str(n)) for n in range(3))
    text = TEXT.replace("%cut (", f"{pieces}%cut (", 1)
    shapes = "(f32[8,128]{1,0}, f32[64,128]{1,0}, f32[2,128]{1,0})"
    text = text.replace(
        "  ROOT %next = (s32[], f32[64,128]{1,0}, f32[1,128]{1,0}) tuple(%i,",
        f"  %under_way = {shapes} fusion(%gathered, %all, %two_rows), kind=kOutput, calls=%piece.1\n"
        "  %two = s32[] constant(2)\n  %later = s32[] add(%i, %two)\n"
        "  ROOT %next = (s32[], f32[64,128]{1,0}, f32[1,128]{1,0}) tuple(%later,",
    )
    for name, number in (("start", 0), ("done", 2)):
        line = f"  %async-collective-{name} = {shapes} fusion(%x, %x), kind=kLoop, calls=%piece.{number}\n"
        text = text.replace("  %sum =", f"{line}  %sum =")
    assert moved(text, 8).results["all-gather"] == 64 * 128 * 4 + 32 * 8 * 128 * 4
    assert launches(text) == launches(TEXT) - 64 * 2 + 32 * 4 + 2  # an addition and a piece more a turn, and two pieces
    # Its memory counts once as well: what a fusion hands on is not read and written in every turn, what it adds up is.
    x, w, row = 64 * 128 * 4, 128 * 128 * 2, 128 * 4
    gather, addition, sums = 8 * row + x, 3 * 4, 2 * 2 * row
    assert moved(text, 8).memory == w + 8 * x + gather + 32 * (11 * row + 4 + addition + sums)
    told = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"},"init":{"n":"0"}}')
    assert moved(told, 8).results["all-gather"] == 64 * 128 * 4 + 7 * 8 * 128 * 4


def test_pieces_of_an_array_that_is_seen_in_another_shape():
    """A GPU's compiler cuts from a bitcast of what a fusion reads, and writes a bitcast of what it updates in place."""
    text = """HloModule jit_step, is_scheduled=true

%add_to_piece (p0: f32[64,128], p1: s32[], p2: f32[2,128]) -> f32[64,128] {
  %p0 = f32[64,128]{0,1} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[2,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %turned = f32[128,64]{1,0} bitcast(%p0)
  %piece = f32[128,2]{1,0} dynamic-slice(%turned, %zero, %p1), dynamic_slice_sizes={128,2}
  %new = f32[128,2]{1,0} transpose(%p2), dimensions={1,0}
  %sum = f32[128,2]{1,0} add(%piece, %new)
  %updated = f32[128,64]{1,0} dynamic-update-slice(%turned, %sum, %zero, %p1)
  ROOT %back = f32[64,128]{0,1} bitcast(%updated)
}

ENTRY %main (x: f32[64,128], i: s32[], y: f32[2,128]) -> f32[64,128] {
  %x = f32[64,128]{0,1} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[2,128]{1,0} parameter(2)
  ROOT %out = f32[64,128]{0,1} fusion(%x, %i, %y), kind=kLoop, calls=%add_to_piece
}
"""
    piece, whole = 2 * 128 * 4, 64 * 128 * 4
    assert moved(text, 1).memory == piece + 4 + piece + piece
    # What else reads it reads all of it.
    assert moved(text.replace("add(%piece, %new)", "add(%piece, %turned)"), 1).memory == whole + 4 + piece + piece


def test_sizes_of_shapes():
    assert size("bf16[3,5]{1,0}") == 30
    assert size("(f32[2]{0}, pred[7]{0:S(1)}, s32[])") == 12
    assert size("(f32[2]{0}, pred[7]{0:S(1)}, s32[])", everywhere=True) == 19
    assert size("token[]") == 0


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_program_of_eight_devices():
    """A weight split over devices is gathered for a batch that is split too, once a turn of a loop."""
    mesh = mesh_of(fsdp=8)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def run(x, many):
        def turn(x, w):
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, rows)), None

        return jax.lax.scan(turn, x, many)[0]

    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows)
    many = jax.ShapeDtypeStruct((5, 256, 256), jnp.float32, sharding=weights)
    text = jax.jit(run, out_shardings=rows).lower(x, many).compile().as_text()
    found = moved(text, 8)
    assert found.results == {"all-gather": 5 * 256 * 256 * 4}
    assert found.links["all-gather"] == 5 * 256 * 256 * 4 * 7 / 8
    assert found.memory > 5 * 256 * 256 * 4


def test_matmuls_by_hand():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    one = 2 * 3 * 5 * 7
    assert matmul_flops(jnp.matmul, a, b) == one
    assert matmul_flops(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)), a, b) == one
    assert matmul_flops(lambda a, b: jax.grad(lambda a: (a @ b).sum())(a), a, b) == 2 * one
    turns = jax.ShapeDtypeStruct((4, 5, 7), jnp.float32)
    assert matmul_flops(lambda a, bs: jax.lax.map(lambda b: a @ b, bs), a, turns) == 4 * one
    either = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 2 * (a @ b) + a @ b)  # noqa: E731
    assert matmul_flops(either, a, b) == 2 * one

    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def unknown(a, b, count):
        return jax.lax.fori_loop(0, count, lambda i, a: a @ b, a)

    with pytest.raises(ValueError, match="no fixed length"):
        matmul_flops(unknown, square, square, jax.ShapeDtypeStruct((), jnp.int32))
