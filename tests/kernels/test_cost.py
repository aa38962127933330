"""The cost model against counts by hand, and against the shapes that the ops really take and give."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks.chips import cost
from pallas_kernels.log_gate_attention import log_gate_attention, mapped_log_gate_attention
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.sliding_window import sliding_window
from pallas_kernels.sliding_window.problem import Problem as WindowProblem

BF16 = jnp.dtype(jnp.bfloat16)
SMALL = Problem(B=1, T=4, N=2, S=1, K=1, F=16, H=32, dtype=BF16)


def test_forward_by_hand():
    """Two chunks of 2, two query heads on one state head."""
    scores, values, read, write = 2 * 2 * 16 * 2, 2 * 2 * 2 * 32, 2 * 2 * 16 * 32, 2 * 2 * 16 * 32
    flops = 2 * (2 * (scores + values + read) + write)
    queries, keys, values, outputs = 4 * 2 * 16 * 2, 4 * 16 * 2, 4 * 32 * 2, 4 * 2 * 32 * 2
    gates, scales, normalizers = 4 * 4, 4 * 4, 4 * 2 * 4
    compulsory = queries + keys + values + outputs + gates + scales + normalizers
    assert cost.forward(SMALL, 2) == cost.Cost(flops, compulsory, compulsory)
    states = 2 * 16 * 32 * 4
    assert cost.forward(SMALL, 2, split=True).moved == compulsory + keys + values + gates + scales + 2 * states


def test_backward_by_hand():
    """A chunk of C rows: scores, dq, dk over F; dy·v and dv over H; the state four times, and once to find it again."""
    C, F, H = 2, 16, 32
    tile_f, tile_h, state = 2 * C * C * F, 2 * C * C * H, 2 * C * F * H
    per_chunk = 2 * (3 * tile_f + 2 * tile_h + 2 * state) + 2 * state + state
    assert cost.backward(SMALL, C).flops == 2 * per_chunk
    both, forward, backward = (f(SMALL, C) for f in (cost.forward_backward, cost.forward, cost.backward))
    assert (both.flops, both.moved) == (forward.flops + backward.flops, forward.moved + backward.moved)


def test_maps_by_hand():
    """A map costs width × F a head and token; the backward pass computes it again and has two matmuls of its own."""
    mapped = dataclasses.replace(SMALL, act="exp", width=24)
    one = 4 * 24 * 16
    assert cost.forward(mapped, 2).flops == cost.forward(SMALL, 2).flops + 3 * one
    assert cost.backward(mapped, 2).flops == cost.backward(SMALL, 2).flops + (3 * 3 + 1) * one
    features, raw, maps = 4 * 3 * 16 * 2, 4 * 3 * 24 * 2, 3 * 24 * 8 * 4
    assert cost.forward(mapped, 2).compulsory == cost.forward(SMALL, 2).compulsory - features + raw + maps


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def both_ways(function, *arguments) -> tuple[int, int]:
    """Bytes of arguments and results, and of arguments, cotangents of the results and gradients."""
    results = jax.eval_shape(function, *arguments)
    return size(arguments) + size(results), 2 * size(arguments) + size(results)


def arrays(*shapes, dtype=BF16):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


@pytest.mark.parametrize("act", [None, "exp"])
@pytest.mark.parametrize(("K", "S"), [(2, 2), (2, 4), (4, 4)])
def test_compulsory_bytes_are_those_of_the_arguments_and_results(K, S, act):
    B, T, N, F, H, X = 2, 33, 4, 32, 16, 48
    scalars = arrays((B, T, S), (B, T, S), dtype=jnp.float32)
    if act is None:
        problem = Problem(B, T, N, S, K, F, H, BF16)
        arguments = (*arrays((B, T, N, F), (B, T, S, F), (B, T, K, H)), *scalars)

        def attend(q, k, v, g, c):
            return log_gate_attention(q, k, v, g, k_log_scale=c, return_log_normalizer=True)
    else:
        problem = Problem(B, T, N, S, K, F, H, BF16, act=act, width=X)
        maps = arrays((N, X, F // 2), (S, X, F // 2), dtype=jnp.float32)
        arguments = (*arrays((B, T, N, X), (B, T, K, X), (B, T, K, H)), *scalars, *maps)

        def attend(q, k, v, g, c, q_map, k_map):
            return mapped_log_gate_attention(
                q, k, v, g, k_log_scale=c, q_map=q_map, k_map=k_map, act=act, return_log_normalizer=True
            )

    there, back = both_ways(attend, *arguments)
    assert cost.forward(problem, 16).compulsory == there
    assert cost.backward(problem, 16).compulsory == back


def test_compulsory_bytes_of_a_window_are_those_of_the_arguments_and_results():
    B, T, N, K, H, W = 2, 40, 4, 2, 16, 8
    segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, W + T), jnp.int32)
    there, back = both_ways(
        lambda q, k, v: sliding_window(q, k, v, *segments, window=W),
        *arrays((B, T, N, H), (B, W + T, K, H), (B, W + T, K, H)),
    )
    problem = WindowProblem(B, T, N, K, H, W, BF16, True)
    assert cost.window_forward(problem, 16).compulsory == there
    assert cost.window_backward(problem, 16).compulsory == back


def test_window_by_hand():
    """Three blocks of 16 and 8 queries, each with 8 keys before it: two matmuls there and five back."""
    problem = WindowProblem(1, 40, 2, 1, 16, 8, BF16, False)
    tile = 2 * 40 * (8 + 16) * 16
    assert cost.window_forward(problem, 16).flops == 2 * 2 * tile
    assert cost.window_backward(problem, 16).flops == 2 * 5 * tile
    forward = cost.window_forward(problem, 16)
    assert forward.moved - forward.compulsory == 2 * (2 * 8) * 16 * 2


def test_roofline_is_the_slower_of_arithmetic_and_memory():
    chip = dataclasses.replace(cost.CHIPS["v5e"], flops=100.0, bandwidth=10.0)
    assert cost.Cost(flops=1000, compulsory=10, moved=20).roofline(chip) == 10.0
    assert cost.Cost(flops=1000, compulsory=200, moved=400).roofline(chip) == 20.0
    assert cost.Cost(flops=1000, compulsory=200, moved=400).ratio == 2.0


def test_issue_shape_is_bound_by_the_memory_of_an_h200():
    problem = Problem(16, 2048, 32, 32, 32, 128, 128, BF16)
    there = cost.forward(problem, 64)
    seconds = there.roofline(cost.CHIPS["H200"])
    assert seconds == there.compulsory / 4.8e12
    assert seconds == pytest.approx(0.226e-3, rel=0.01)


def test_the_table_names_every_chip():
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.chips.cost", "--features", "64", "--kv-heads", "8"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stderr == ""
    assert all(f"{chip} ms" in told.stdout for chip in cost.CHIPS)
    assert "F=64" in told.stdout
