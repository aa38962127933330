"""What is particular to ``pallas_tpu``; ``test_log_gate_attention`` holds it to the contract, ``gates`` compiles it."""

import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.log_gate_attention.pallas_tpu import cannot_run
from pallas_kernels.log_gate_attention.pallas_tpu.layout import plan_call
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.target import Target
from tests.kernels import parity
from tests.kernels.parity import Shape

V5E = Target("tpu", "v5e")


@pytest.mark.parametrize(
    "shape",
    [Shape(2, 20, 4, 2, 2, 16, 16, chunk=16), Shape(1, 33, 8, 1, 8, 16, 16, chunk=16, act="exp", X=16)],
    ids=str,
)
def test_no_step_races_with_another(shape, monkeypatch):
    """In an interpreter that moves blocks as the hardware does: where chunks end, and heads' turns at a block."""
    monkeypatch.setitem(parity.STAND_INS, "pallas_tpu", V5E)
    parity._measured.cache_clear()
    values = parity.Draw(seed=1, gate="mixed", segment="packed", feature="positive", scale=3.0, absent=0.3, memory=True)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        errors = parity.errors("pallas_tpu", shape, values, "float32")
    parity._measured.cache_clear()
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found
    assert max(errors.values()) <= parity.TOLERANCE["float32"]


def problem(T: int, K: int, F: int, dtype="bfloat16", **kind) -> Problem:
    return Problem(1, T, 32, K, K, F, 128, jnp.dtype(dtype), **kind)


@pytest.mark.parametrize(
    ("asked", "hint", "chunk"),
    [
        (problem(2048, 8, 256), 64, 128),
        (problem(2048, 8, 256), 24, 32),
        (problem(100, 8, 256), 64, 112),
        (problem(2048, 1, 256, "float32"), 64, 64),
    ],
)
def test_a_chunk_fits_the_matrix_unit_the_sequence_and_vmem(asked, hint, chunk):
    plan = plan_call(asked, V5E, normalize=True, chunk=hint)
    assert plan is not None
    assert chunk == plan.C


@pytest.mark.parametrize(
    ("N", "K", "S", "chip", "together"),
    [
        (32, 8, 8, "v5e", 4),
        (32, 8, 32, "v5e", 4),
        (32, 4, 4, "v5e", 2),  # 16 query heads
        (24, 6, 6, "v5e", 3),
        (20, 5, 5, "v5e", 1),
        (8, 2, 2, "v5e", 2),
        (8, 2, 2, "v5p", 1),  # the other one is for its second core
    ],
)
def test_state_heads_take_steps_together_while_every_core_has_work(N, K, S, chip, together):
    asked = Problem(1, 2048, N, S, K, 128, 128, jnp.dtype("bfloat16"))
    plan = plan_call(asked, Target("tpu", chip), normalize=True, chunk=64)
    assert plan is not None
    assert together == plan.M
    assert plan.turns * plan.M == S // K * plan.kv_heads


def test_what_it_cannot_run_is_told_in_one_line():
    fits = problem(2048, 8, 256)
    assert cannot_run(fits, V5E) is None
    assert cannot_run(fits, Target("cpu")) == "pallas_tpu runs on TPUs; this process has cpu"
    assert cannot_run(problem(2048, 8, 24), V5E) == "F is 24; pallas_tpu needs multiples of 16"
    assert "float16" in str(cannot_run(problem(2048, 8, 256, "float16"), V5E))
    assert "VMEM" in str(cannot_run(problem(2048, 1, 2048, "float32"), V5E))
