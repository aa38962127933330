"""What the window's Triton kernels have beyond the suite of every implementation: tiles, wide groups, refusals."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import load
from pallas_kernels.sliding_window import sliding_window
from pallas_kernels.sliding_window.problem import Problem
from pallas_kernels.sliding_window.triton.attend import MOST_GROUPED, tiles_of
from pallas_kernels.target import GPUS, Target
from tests.kernels import parity

needs_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")), reason="needs triton, jax_triton"
)


def problem(**changes) -> Problem:
    sizes = {"B": 1, "T": 64, "N": 8, "K": 2, "H": 64, "W": 32, "dtype": jnp.dtype("bfloat16"), "rope": True}
    return Problem(**(sizes | changes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_width_it_takes_has_tiles(dtype):
    for width in range(16, 257, 16):
        tiles = tiles_of(width, jnp.dtype(dtype))
        for tile in (tiles.forward, tiles.query_gradient, tiles.key_gradient):
            # The matrix units' smallest operand is 16 rows; tl.arange needs powers of two.
            assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.rows, tile.keys))


@needs_triton
def test_a_key_head_of_many_query_heads():
    """More query heads to a key head than a tile's rows: the tile grows to hold one token's."""
    T, N, W, H = 5, 40, 3, 16
    assert tiles_of(H, jnp.dtype("float32")).key_gradient.rows < N <= MOST_GROUPED
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(rng.normal(size=(1, *shape)), jnp.float32)
        for shape in ((T, N, H), (W + T, 1, H), (W + T, 1, H), (T, N, H))
    )
    segments = jnp.ones((1, W + T), jnp.int32)

    def gradients(implementation):
        def attend(q, k, v):
            return sliding_window(q, k, v, segments[:, W:], segments, window=W, implementation=implementation)

        with parity.scope(implementation):
            out, pullback = jax.vjp(attend, q, k, v)
            return *out, *pullback((dy, out[1]))

    for actual, expected in zip(gradients("triton"), gradients("xla"), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


@needs_triton
def test_it_says_what_it_cannot_run():
    cannot_run = load("sliding_window", "triton").cannot_run
    for chip in (*GPUS, None):
        assert cannot_run(problem(), Target("gpu", chip)) is None
    assert "this is sm_86" in cannot_run(problem(), Target("gpu", "sm_86"))
    assert "this process has tpu" in cannot_run(problem(), Target("tpu", "v5e"))
    assert "float64" in cannot_run(problem(dtype=jnp.dtype("float64")), Target("gpu", "sm_90"))
    assert "H is 272" in cannot_run(problem(H=272), Target("gpu", "sm_90"))
    assert "80 query heads" in cannot_run(problem(N=80, K=1), Target("gpu", "sm_90"))
