"""What the Pallas kernels for GPUs have beyond the suites of every implementation: padding, refusals, exact fp32."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.chips import compilers
from pallas_kernels import target
from pallas_kernels.dispatch import choose
from pallas_kernels.log_gate_attention import empty_state
from pallas_kernels.log_gate_attention.pallas_gpu import IMPLEMENTATION as ATTENTION
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.sliding_window.pallas_gpu import IMPLEMENTATION as WINDOW
from pallas_kernels.sliding_window.problem import Problem as WindowProblem
from pallas_kernels.sliding_window.reference import IMPLEMENTATION as WINDOW_REFERENCE
from pallas_kernels.target import Target
from tests.kernels import parity

HERE = parity.STAND_INS["pallas_gpu"]
SIZES = {"B": 1, "T": 64, "N": 8, "S": 2, "K": 2, "F": 64, "H": 64, "dtype": jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        # Axes that are no powers of two, a tail, state heads that share a key/value head.
        (parity.Shape(1, 37, 4, 2, 4, 48, 48), "bfloat16"),
        (parity.Shape(1, 20, 2, 1, 1, 80, 16, act="exp", X=48), "float32"),
        (parity.Shape(1, 20, 4, 1, 4, 48, 16, act="softmax", X=16), "bfloat16"),
    ],
    ids=str,
)
def test_padding_changes_nothing(shape, dtype):
    values = parity.Draw(seed=3, gate="mixed", segment="packed", feature="positive", scale=3.0, absent=0.3, memory=True)
    for name, error in parity.errors("pallas_gpu", shape, values, dtype).items():
        assert error <= parity.TOLERANCE[dtype], name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"F": 24}, "F is 24; pallas_gpu needs multiples of 16 up to 256"),
        ({"H": 512}, "H is 512; pallas_gpu needs multiples of 16 up to 256"),
        ({"act": "exp", "width": 20}, "X is 20; pallas_gpu needs multiples of 16 up to 256"),
        ({"vector_gates": True}, "gates are of one value per feature; pallas_gpu needs one per head"),
        ({"dtype": jnp.dtype("float64")}, "inputs are float64; pallas_gpu takes bfloat16 and float32"),
        ({}, None),
    ],
)
def test_attention_says_what_it_cannot_run(changes, reason):
    assert ATTENTION.cannot_run(Problem(**(SIZES | changes)), HERE) == reason


def test_it_runs_on_gpus_alone():
    window = WindowProblem(1, 64, 8, 2, 64, 32, jnp.dtype("bfloat16"), True)
    for place, reason in (
        (Target("gpu", "sm_80"), None),
        (Target("cpu"), "pallas_gpu runs on GPUs; this process has cpu"),
    ):
        assert ATTENTION.cannot_run(Problem(**SIZES), place) == reason
        assert WINDOW.cannot_run(window, place) == reason
    with target.override(Target("gpu", "sm_90")):
        assert choose("log_gate_attention", Problem(**SIZES), "pallas_gpu") is ATTENTION


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"H": 24}, "H is 24; pallas_gpu needs multiples of 16 up to 256"),
        ({"dtype": jnp.dtype("float16")}, "inputs are float16; pallas_gpu takes bfloat16 and float32"),
    ],
)
def test_the_window_says_what_it_cannot_run(changes, reason):
    sizes = {"B": 1, "T": 64, "N": 8, "K": 2, "H": 64, "W": 32, "dtype": jnp.dtype("bfloat16"), "rope": False}
    assert WINDOW.cannot_run(WindowProblem(**(sizes | changes)), HERE) == reason


@functools.cache
def _window(dtype: str, rope: bool):
    B, T, N, K, H, W = 2, 70, 4, 2, 48, 33
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((B, T, N, H), (B, W + T, K, H), (B, W + T, K, H), (N,), (B, T, N, H))]
    arrays = [np.asarray(jnp.asarray(x, dtype if x.ndim > 1 else "float32")) for x in arrays]
    ids = np.sort(rng.integers(0, 4, (B, W + T)), 1).astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = 0
    frequencies = 100.0 ** -(np.arange(H // 2) / (H // 2)) if rope else None

    def results(implementation, wide):
        q, k, v, sink, dy = (jnp.asarray(x.astype("float64"), wide if wide == "float64" else x.dtype) for x in arrays)
        turn = None if frequencies is None else jnp.asarray(frequencies.astype("float32"), wide)

        @jax.jit
        def run(q, k, v, sink, dy):
            def attend(q, k, v, sink):
                return implementation.attend(q, k, v, jnp.asarray(ids[:, W:]), jnp.asarray(ids), sink, turn, W)

            (y, n), pull = jax.vjp(attend, q, k, v, sink)
            dn = jnp.where(n > -1e29, jnp.cos(jnp.arange(n.size, dtype=n.dtype)).reshape(n.shape), 0.0)
            return y, n, *pull((dy, dn))

        return [np.asarray(x.astype(wide)) for x in run(q, k, v, sink, dy)]

    with target.override(HERE):
        actual = results(WINDOW, "float32")
    with jax.enable_x64(True):
        return actual, results(WINDOW_REFERENCE, "float64")


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_window_and_its_gradients(dtype, rope):
    for actual, expected in zip(*_window(dtype, rope), strict=True):
        empty = expected <= -1e29
        assert (actual[empty] == np.float32(-1e30)).all()
        error, size = (np.sqrt(np.mean(np.where(empty, 0.0, x) ** 2)) for x in (actual - expected, expected))
        assert error <= parity.TOLERANCE[dtype] * size


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax_cuda13_plugin")
def test_fp32_is_multiplied_as_fp32(monkeypatch):
    """Lanes multiply fp32; in bf16 the matrix units do."""
    sources = []
    assembled = compilers._assembled
    monkeypatch.setattr(compilers, "_assembled", lambda ptx, shared: sources.append(ptx) or assembled(ptx, shared))
    for dtype in (jnp.float32, jnp.bfloat16):
        q, k, v = (jax.ShapeDtypeStruct((1, 64, heads, 32), dtype) for heads in (2, 1, 1))
        gate, state = jax.ShapeDtypeStruct((1, 64, 1), jnp.float32), jax.eval_shape(lambda: empty_state(1, 1, 32, 32))
        attend = functools.partial(ATTENTION.attend, normalize=True, chunk=64)
        [kernel] = compilers.compile_for("sm_80", attend, q, k, v, gate, gate, state).kernels
        assert kernel.name == "forward_kernel"
    wide, narrow = sources
    assert "mma.sync" not in wide
    assert "mma.sync" in narrow
