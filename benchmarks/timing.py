"""What timings of the ops have in common: arguments drawn from one seed, passes, the clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.sliding_window.problem import Problem as WindowProblem

PASSES = ("forward", "forward+backward")
FEWEST_SECONDS = 0.02  # of one measurement: calls are repeated to fill it

Call = Callable[[], Any]
_BEGAN = time.monotonic()


def say(what: str) -> None:
    """Where no terminal shows a bar: a line to a log, with the seconds since the program began."""
    if not sys.stderr.isatty():
        print(f"[{time.monotonic() - _BEGAN:.0f} s] {what}", file=sys.stderr, flush=True)


def inputs(problem: Problem) -> dict[str, jax.Array]:
    """Positive features, values, gates near 1, and a cotangent: ``q, k, v, g, dy``."""
    p, keys = problem, jax.random.split(jax.random.key(0), 8)

    def normal(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(keys[i], shape, p.dtype)

    return {
        "q": jnp.abs(normal(0, p.B, p.T, p.N, p.F)),
        "k": jnp.abs(normal(1, p.B, p.T, p.S, p.F)),
        "v": normal(2, p.B, p.T, p.K, p.H),
        "g": jax.nn.log_sigmoid(jax.random.normal(keys[3], (p.B, p.T, p.S)) + 4),
        "dy": normal(4, p.B, p.T, p.N, p.H),
    }


def mapped_inputs(problem: Problem) -> dict[str, jax.Array]:
    """Raw queries and keys as wide as values, and maps: ``q, k, q_map, k_map``."""
    p, keys = problem, jax.random.split(jax.random.key(1), 4)
    return {
        "q": jax.random.normal(keys[0], (p.B, p.T, p.N, p.H), p.dtype),
        "k": jax.random.normal(keys[1], (p.B, p.T, p.K, p.H), p.dtype),
        "q_map": jax.random.normal(keys[2], (p.N, p.H, p.F // 2)) * p.H**-0.5,
        "k_map": jax.random.normal(keys[3], (p.S, p.H, p.F // 2)) * p.H**-0.5,
    }


def window_inputs(problem: WindowProblem) -> dict[str, jax.Array]:
    """``q, k, v, sink, frequencies, dy``."""
    p, keys = problem, jax.random.split(jax.random.key(2), 5)
    shapes = [(p.B, p.T, p.N, p.H), *[(p.B, p.W + p.T, p.K, p.H)] * 2, (p.B, p.T, p.N, p.H)]
    q, k, v, dy = (jax.random.normal(key, shape, p.dtype) for key, shape in zip(keys, shapes, strict=False))
    frequencies = 1e4 ** -jnp.linspace(0.0, 1.0, p.H // 2, endpoint=False)
    return {"q": q, "k": k, "v": v, "sink": jax.random.normal(keys[4], (p.N,)), "frequencies": frequencies, "dy": dy}


def jax_passes(attend: Callable, arguments: tuple, dy: jax.Array) -> dict[str, tuple[Callable, tuple]]:
    """Functions to jit, and their arguments: the output; the output and the cotangents of all arguments."""

    def both(arguments, dy):
        y, pull = jax.vjp(attend, *arguments)
        return y, pull(dy)

    return {"forward": (attend, arguments), "forward+backward": (both, (arguments, dy))}


def seconds_of(call: Call, wait: Callable[[Any], Any], times: int) -> float:
    """A call's share of ``times`` of them, queued one behind the other."""
    start = time.perf_counter()
    result = None
    for _ in range(times):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / times


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns, so that the machine's moods fall on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return times
