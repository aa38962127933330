"""What is particular to ``triton``: one pass or two, tiles of many heads and keys, its plans, and its interpreter."""

import dataclasses
import importlib
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target, tuned
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.log_gate_attention.triton import cannot_run
from pallas_kernels.log_gate_attention.triton.plan import Launch, Plan, by_rule, key, plan
from pallas_kernels.target import Target
from pallas_kernels.triton_launch import launch
from tests.kernels import parity
from tests.kernels.parity import Shape

needs_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")), reason="needs triton, jax_triton"
)
A100, H100 = Target("gpu", "sm_80"), Target("gpu", "sm_90")
VALUES = parity.Draw(seed=3, gate="mixed", segment="packed", feature="positive", scale=3.0, absent=0.3, memory=True)


def errors(monkeypatch, how: Plan, shape: Shape, dtype: str) -> dict[str, float]:
    for name in ("attend", "attend_mapped"):
        module = importlib.import_module(f"pallas_kernels.log_gate_attention.triton.{name}")
        monkeypatch.setattr(module, "plan", lambda problem, target, chunk: how)
    parity._measured.cache_clear()
    try:
        return parity.errors("triton", shape, VALUES, dtype)
    finally:
        parity._measured.cache_clear()


def small(**changes) -> Plan:
    """Tiles smaller than everything, so that each loop over blocks turns more than once."""
    tile = Launch(16, 16, heads=2, num_warps=1)
    how = Plan(16, 0, Launch(64, 16, heads=2), tile, tile, tile, tile, Launch(64, 32, places=16, num_warps=1))
    return dataclasses.replace(how, **changes)


@needs_triton
@pytest.mark.parametrize(
    ("fused", "normalize", "dtype"),
    [(16, True, "float32"), (32, False, "bfloat16"), (0, True, "bfloat16"), (0, False, "float32")],
)
def test_one_pass_and_two_agree_with_the_recurrence(monkeypatch, fused, normalize, dtype):
    """With several blocks of features, of values and of query heads, the last of them not full."""
    shape = Shape(1, 35, 3, 1, 1, 48, 32, normalize=normalize)
    assert max(errors(monkeypatch, small(fused=fused), shape, dtype).values()) <= parity.TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize(("act", "dtype"), [("softmax", "bfloat16"), ("exp", "float32")])
def test_one_pass_from_raw_queries_agrees_with_the_recurrence(monkeypatch, act, dtype):
    """With halves of features that do not fill their tile and several blocks of values, the last of them not full."""
    tiles = {"cotangents": Launch(16, 16), "rows": Launch(32, 16, places=16), "keys": Launch(32, 64, places=16)}
    how = small(chunk=32, fused=16, forward=Launch(32, 32), **tiles)  # a query head has a map of its own
    shape = Shape(2, 35, 4, 2, 2, 48, 48, act=act, X=80)
    assert max(errors(monkeypatch, how, shape, dtype).values()) <= parity.TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_chunk_of_several_tiles_of_queries(monkeypatch, dtype):
    how = small(chunk=32, rows=Launch(64, 32, heads=2, places=16))
    assert max(errors(monkeypatch, how, Shape(2, 70, 4, 1, 1, 48, 32), dtype).values()) <= parity.TOLERANCE[dtype]


@needs_triton
def test_a_chunk_of_several_tiles_of_keys(monkeypatch):
    shape = Shape(1, 70, 2, 1, 2, 16, 16)
    assert max(errors(monkeypatch, small(chunk=32), shape, "float32").values()) <= parity.TOLERANCE["float32"]


def problem(B: int, S: int, F: int, dtype="bfloat16", **kind) -> Problem:
    return Problem(B, 2048, 32, S, S, F, 128, jnp.dtype(dtype), **kind)


@pytest.mark.parametrize(
    ("asked", "chip", "fused"),
    [
        (problem(1, 8, 128), H100, 0),
        (problem(16, 32, 128), H100, 64),
        (problem(16, 32, 256), A100, 64),
        (problem(16, 8, 128), H100, 32),
        (problem(8, 8, 128), H100, 32),
        (problem(4, 8, 128), H100, 0),
        (problem(8, 8, 128), A100, 16),
    ],
)
def test_one_pass_where_batch_and_heads_fill_the_card(asked, chip, fused):
    assert plan(asked, chip, 64).fused == fused


@pytest.mark.parametrize("act", [None, "exp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_size_it_takes_has_tiles(dtype, act):
    for F in range(16, 257, 16):
        for chip in (A100, H100):
            how = plan(problem(16, 8, F, dtype, act=act, width=128 if act else None), chip, 64)
            launches = [x for x in dataclasses.astuple(how) if isinstance(x, tuple)]
            for sizes in (how.chunk, *(size for features, width, *_ in launches for size in (features, width))):
                # The matrix units' smallest operand is 16; tl.arange needs powers of two.
                assert sizes >= 16
                assert sizes & (sizes - 1) == 0
            assert how.chunk % min(how.chunk, how.keys.places) == 0


@pytest.mark.parametrize(
    ("hint", "T", "chunk"), [(64, 2048, 64), (50, 2048, 32), (1, 2048, 16), (64, 20, 32), (64, 1, 16)]
)
def test_a_chunk_is_a_power_of_two_within_the_hint_and_the_sequence(hint, T, chunk):
    assert plan(dataclasses.replace(problem(1, 8, 128), T=T), H100, hint).chunk == chunk


def test_what_it_cannot_run_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert cannot_run(problem(1, 8, 256), H100) is None
    assert cannot_run(problem(1, 8, 256), Target("cpu")) == "triton runs on GPUs; this process has cpu"
    assert cannot_run(problem(1, 8, 24), H100) == "F is 24; triton needs multiples of 16 up to 256"
    assert cannot_run(problem(1, 8, 64, act="exp", width=20), H100) == "X is 20; triton needs multiples of 16 up to 256"
    assert "float16" in str(cannot_run(problem(1, 8, 256, "float16"), H100))
    large = dataclasses.replace(problem(1, 8, 256), H=256)
    assert cannot_run(large, H100) is None
    told = "F is 256 and H is 256; triton's gradient then needs bfloat16 and the memory of an H100"
    assert cannot_run(large, A100) == told
    assert cannot_run(dataclasses.replace(large, dtype=jnp.dtype("float32")), H100) == told
    assert "per feature" in str(cannot_run(problem(1, 8, 64, vector_gates=True), H100))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cannot_run(problem(1, 8, 256), H100) == "triton needs triton and jax_triton, which this environment lacks"


@needs_triton
def test_the_interpreter_rounds_and_multiplies_as_hardware_does():
    """bf16 is rounded to nearest even and multiplied as numbers, and the library's own functions are interpreted."""
    from tests.kernels import triton_toy

    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for _ in range(2))
    out = (jax.ShapeDtypeStruct((2, 16, 16), jnp.bfloat16), jax.ShapeDtypeStruct((2, 16), jnp.float32))
    with target.override(dataclasses.replace(H100, interpret=True)):
        products, sums = jax.jit(
            lambda x, y: launch(triton_toy.kernel, x, y, out_shape=out, grid=(2, 1, 1), scale=3.0, C=16)
        )(x, y)
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (x, y)]
    for program in range(2):
        product = jnp.matmul(*rounded, precision="highest") + 3.0 * program
        np.testing.assert_array_equal(products[program], product.astype(jnp.bfloat16))
        np.testing.assert_allclose(sums[program], jnp.cumsum(jnp.max(x, 1)), rtol=1e-6)


@needs_triton
def test_the_same_kernel_compiles_in_the_process_that_interpreted_it():
    from tests.kernels import triton_toy

    x = jnp.zeros((16, 16))
    out = (jax.ShapeDtypeStruct((2, 16, 16), jnp.bfloat16), jax.ShapeDtypeStruct((2, 16), jnp.float32))

    def run(x):
        return launch(triton_toy.kernel, x, x, out_shape=out, grid=(2, 1, 1), scale=3.0, C=16)

    with target.override(dataclasses.replace(A100, interpret=True)):
        jax.block_until_ready(jax.jit(lambda x: run(x))(x))
    with target.override(A100):
        lowered = jax.jit(lambda x: run(x)).trace(x).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()


def test_measured_sizes_come_first(monkeypatch, tmp_path):
    hopper = Target("gpu", "sm_90")
    problem = Problem(16, 2048, 32, 32, 32, 128, 128, jnp.dtype("bfloat16"))
    few, mapped = dataclasses.replace(problem, B=1), dataclasses.replace(problem, act="exp", width=128)
    ruled = plan(problem, hopper, 64)
    best = dataclasses.replace(ruled, chunk=32, states=dataclasses.replace(ruled.states, num_warps=2))
    row = key(problem, hopper, full=True) | {"choice": dataclasses.asdict(best)}
    (tmp_path / "tuned.json").write_text(json.dumps([row]))
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    assert plan(problem, hopper, 64) == best
    for other in (few, mapped, dataclasses.replace(problem, S=8, K=8), dataclasses.replace(problem, F=256)):
        assert plan(other, hopper, 64) == by_rule(other, hopper, 64)
    assert plan(problem, Target("gpu", "sm_80"), 64) == by_rule(problem, Target("gpu", "sm_80"), 64)
