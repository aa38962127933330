"""Tiles of the Triton kernels by measurement, on the GPU at hand.

    uv run --extra cuda python -m benchmarks.tune [--batch 16 1] [--kv-heads 32 8] [--kinds features exp window]

For each problem (bf16, T=2048, N=32, H=128, and every batch, K, F and kind given: the linear branch from features or
with its map inside, and the window) the search begins with the tiles that the rules give and changes a few sizes of one
kernel at a time, each to its half, itself or its double, as long as something gets faster by more than a hundredth:
first the forward pass, of the linear branch both in one pass over the sequence and with states first, then with the
gradient. Tiles that do not compile, or give other numbers than the first ones, are left out. Compilers run side by side
on all cores, measurements one after another.

Prints a table, and writes a row to ``pallas_kernels/tuned.json`` as soon as it is found, in place of what was there for
the same problem on the same chip: its key, ``choice``, which is the fields of the kernels' plan, and milliseconds of
both passes with it and by the rules. From then on the kernels take these tiles.
"""

from __future__ import annotations

import argparse
import contextvars
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.timing import FEWEST_SECONDS, PASSES, inputs, jax_passes, mapped_inputs, say, seconds_of, window_inputs
from lizard_jax.atomic import write_atomic
from pallas_kernels import target, tuned
from pallas_kernels.log_gate_attention import log_gate_attention, mapped_log_gate_attention
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.log_gate_attention.triton import plan as linear
from pallas_kernels.sliding_window import sliding_window
from pallas_kernels.sliding_window.problem import Problem as WindowProblem
from pallas_kernels.sliding_window.triton import attend as window

KINDS = ("features", "exp", "softmax", "window")
GAIN = 0.99  # of the time so far, that a change must get below
FARTHEST = 2e-2  # relative RMS of bf16 results by other tiles
CALLS = 10  # of one run, in a loop on the device: launching them one by one would take longer than a short pass

Plan = linear.Plan | window.Tiles
Measure = Callable[[Sequence[Any]], list[float]]


class Knob(NamedTuple):
    """A size that may change: a field of one kernel's launch, or of the plan itself where ``kernel`` is None."""

    kernel: str | None
    field: str
    least: int
    most: int

    def of(self, how: Any) -> int:
        return getattr(how if self.kernel is None else getattr(how, self.kernel), self.field)

    def turned(self, how: Any, value: int) -> Any:
        if self.kernel is None:
            return dataclasses.replace(how, **{self.field: value})
        launch = dataclasses.replace(getattr(how, self.kernel), **{self.field: value})
        return dataclasses.replace(how, **{self.kernel: launch})

    def values(self, how: Any) -> list[int]:
        now = self.of(how)
        near = (now - 1, now, now + 1) if "stages" in self.field else (now // 2, now, now * 2)
        return [value for value in near if value == now or self.least <= value <= self.most]


Group = tuple[Knob, ...]


class Subject(NamedTuple):
    """What is tuned: a problem, ready to be run.

    Attributes:
        key: of its row.
        starts: plans to begin with; the first is what the rules say.
        forward, backward: knobs that are turned together, of the kernels that a pass by such a plan runs; without
            those of the forward pass in the gradient.
        attend: output of ``arguments``, whose cotangent ``dy`` is like.
    """

    key: dict[str, Any]
    starts: tuple[Plan, ...]
    forward: Callable[[Any], list[Group]]
    backward: Callable[[Any], list[Group]]
    attend: Callable[..., jax.Array]
    arguments: tuple[jax.Array, ...]
    dy: jax.Array


def of_linear_branch(problem: Problem) -> Subject:
    """Features as they are, or mapped inside where ``problem.act`` says so."""
    p, here = problem, target.current()
    ruled = linear.by_rule(p, here, 64)
    other = dataclasses.replace(ruled, fused=0 if ruled.fused else 32)
    x, raw = inputs(p), mapped_inputs(p) if p.act else {}
    names = ("q", "k", "v", "g", *(("q_map", "k_map") if p.act else ()))

    def attend(q, k, v, g, *maps):
        if p.act is None:
            return log_gate_attention(q, k, v, g, implementation="triton")
        given = dict(zip(("q_map", "k_map"), maps, strict=True))
        return mapped_log_gate_attention(q, k, v, g, **given, act=p.act, implementation="triton")

    return Subject(
        key=linear.key(p, here, ruled.fused > 0),
        starts=(ruled, other),
        forward=functools.partial(_forward_groups, p),
        backward=functools.partial(_backward_groups, p),
        attend=attend,
        arguments=tuple((x | raw)[name] for name in names),
        dy=x["dy"],
    )


def _forward_groups(problem: Problem, how: linear.Plan) -> list[Group]:
    of = _linear_knobs(problem)
    if how.fused:
        return of("forward", "width", "heads", beside=Knob(None, "fused", 16, 128))
    states = [(Knob(None, "chunk", 16, 128),), *of("states", "width", "features")]
    return [*states, *of("outputs", "width", "features", "heads")]


def _backward_groups(problem: Problem, how: linear.Plan) -> list[Group]:
    of = _linear_knobs(problem)
    states = [(Knob(None, "chunk", 16, 128),), *of("states", "width", "features")] if how.fused else []
    rows = [*of("rows", "places", "heads"), *of("rows", *(("width",) if problem.act else ("width", "features")))[:1]]
    return [*states, *of("cotangents", "width", "features", "heads"), *rows, *of("keys", "places")]


def _linear_knobs(problem: Problem) -> Callable[..., list[Group]]:
    """Groups of one kernel: its tile, how it is run, and the size that takes most memory together with its stages.

    Tiles are of one half of mapped features and of one query head, as such kernels are written.
    """
    features = linear.power(problem.F // 2 if problem.act else problem.F, 16)
    heads = 1 if problem.act else linear.power(problem.N // problem.S)
    most = {"features": features, "width": linear.power(problem.H, 16), "heads": heads, "places": 128}

    def of(kernel: str, *fields: str, beside: Knob | None = None) -> list[Group]:
        tile = tuple(Knob(kernel, name, 1 if name == "heads" else 16, most[name]) for name in fields)
        warps, stages = Knob(kernel, "num_warps", 2, 8), Knob(kernel, "num_stages", 1, 4)
        return [tile if beside is None else (beside, *tile), (warps, stages), (tile[0], stages)]

    return of


def of_window(problem: WindowProblem) -> Subject:
    """With rotation and a sink."""
    p = problem
    q, k, v, sink, frequencies, dy = window_inputs(p).values()
    segments = jnp.ones((p.B, p.T), jnp.int32), jnp.ones((p.B, p.W + p.T), jnp.int32)

    def attend(q, k, v, sink):
        options = {"rope_frequencies": frequencies, "sink": sink, "implementation": "triton"}
        return sliding_window(q, k, v, *segments, window=p.W, **options)[0]

    def groups(*kernels: str) -> list[Group]:
        found: list[Group] = []
        for kernel in kernels:
            rows, keys = Knob(kernel, "rows", 16, 256), Knob(kernel, "keys", 16, 128)
            warps, stages = Knob(kernel, "warps", 2, 8), Knob(kernel, "stages", 1, 4)
            found += [(rows, keys), (warps, stages), (keys, stages)]
        return found

    return Subject(
        key=window.key(p, target.current().chip),
        starts=(window.tiles_of(p.H, p.dtype),),
        forward=lambda how: groups("forward"),
        backward=lambda how: groups("query_gradient", "key_gradient"),
        attend=attend,
        arguments=(q, k, v, sink),
        dy=dy,
    )


def neighbours(how: Any, group: Group) -> list[Any]:
    """Plans with another value of one or several knobs."""
    plans = []
    for values in itertools.product(*(knob.values(how) for knob in group)):
        other = how
        for knob, value in zip(group, values, strict=True):
            other = knob.turned(other, value)
        plans.append(other)
    return [other for other in plans if other != how]


def search(start: Any, groups: Sequence[Group], measure: Measure, seconds: float = math.inf) -> tuple[Any, float]:
    """The fastest plan found from ``start``, and its milliseconds.

    Args:
        measure: milliseconds of each of several plans, infinitely many for those that cannot be taken.
        seconds: after which no other group of knobs is tried.
    """
    best, end = start, time.monotonic() + seconds
    taken = {start: measure([start])[0]}
    since = 0
    for group in itertools.cycle(groups):
        fresh = [how for how in neighbours(best, group) if how not in taken]
        taken |= dict(zip(fresh, measure(fresh), strict=True))
        fastest = min([best, *fresh], key=taken.__getitem__)
        since += 1
        if taken[fastest] < GAIN * taken[best]:
            best, since = fastest, 0
        if since == len(groups) or time.monotonic() > end:
            break
    return best, taken[best]


class Bench:
    """Times one subject by any plan."""

    def __init__(self, subject: Subject, bar: tqdm) -> None:
        self._passes = jax_passes(subject.attend, subject.arguments, subject.dy)
        self._bar = bar
        self._first: dict[str, Any] = {}
        self.refused = ""  # why the last plan that could not be taken could not

    def measure(self, which: str, plans: Sequence[Any]) -> list[float]:
        """Milliseconds of each plan in a pass; infinitely many if it does not run or gives other numbers."""
        context = contextvars.copy_context()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda how: context.copy().run(self._compiled, which, how), plans))
        return [self._time(which, run) for run in made]

    def _compiled(self, which: str, how: Plan) -> Callable[[], Any] | None:
        function, arguments = self._passes[which]
        try:
            with tuned.using(dataclasses.asdict(how)):
                lowered = jax.jit(_again(function)).lower(*arguments)
            return functools.partial(lowered.compile(), *arguments)
        except Exception as error:  # tiles that do not fit one another, or the chip; compilers' errors, of many kinds
            self.refused = _first_line(error)
            return None

    def _time(self, which: str, run: Callable[[], Any] | None) -> float:
        self._bar.update()
        if run is None:
            return math.inf
        try:
            result = jax.block_until_ready(run())
        except jax.errors.JaxRuntimeError as error:  # too much shared memory is found when it is launched
            self.refused = _first_line(error)
            return math.inf
        far = max(jax.tree.leaves(_distances(self._first.setdefault(which, result), result)))
        if far > FARTHEST:
            self.refused = f"relative RMS {far:.1e} from the first tiles' numbers"
            return math.inf
        once = seconds_of(run, jax.block_until_ready, 1)
        times = max(1, round(FEWEST_SECONDS / once))
        return 1e3 / CALLS * min(seconds_of(run, jax.block_until_ready, times) for _ in range(3))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` called ``CALLS`` times, one after another; the last result."""

    def run(*arguments):
        def call(_, held):
            given, _ = jax.lax.optimization_barrier(held)
            return given, function(*given)

        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))
        return jax.lax.fori_loop(0, CALLS, call, (arguments, empty))[1]

    return run


@jax.jit
def _distances(truth: Any, other: Any) -> Any:
    """Relative RMS of each array."""

    def one(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        far = jnp.sqrt(jnp.mean((x - y) ** 2) / jnp.maximum(jnp.mean(x**2), 1e-30))
        return jnp.where(jnp.isfinite(far), far, jnp.inf)

    return jax.tree.map(one, truth, other)


def tune(subject: Subject, bar: tqdm, seconds: float = math.inf) -> dict[str, Any]:
    """A row of the table.

    Args:
        seconds: to search for, in equal parts from each start and for the gradient.

    Raises:
        SystemExit: nothing ran, not even what the rules say.
    """
    bench, ruled = Bench(subject, bar), subject.starts[0]
    before = [bench.measure(which, [ruled])[0] for which in PASSES]
    if math.inf in before:
        raise SystemExit(
            f"error: the tiles that the rules give do not run here: {bench.refused} ({subject.key}, {ruled})"
        )
    forward, both = (functools.partial(bench.measure, which) for which in PASSES)
    part = seconds / (len(subject.starts) + 1)
    found = [search(start, subject.forward(start), forward, part) for start in subject.starts]
    best, forward_ms = min(found, key=lambda pair: pair[1])
    best, both_ms = search(best, subject.backward(best), both, part)
    measured = {"forward_ms": forward_ms, "both_ms": both_ms, "ruled_forward_ms": before[0], "ruled_both_ms": before[1]}
    B, T = subject.dy.shape[:2]
    return subject.key | {"B": B, "T": T, "choice": dataclasses.asdict(best)} | measured


def keep(key: dict[str, Any], row: dict[str, Any], table: Path) -> None:
    """Put a row into the table, in place of one with its key."""
    others = [other for other in tuned.rows(table) if not key.items() <= other.items()]
    write_atomic(table, "[\n " + ",\n ".join(json.dumps(one) for one in [*others, row]) + "\n]\n")


def subjects(a: argparse.Namespace) -> dict[str, Callable[[], Subject]]:
    """By name; each draws its arguments when it is called."""
    found, dtype = {}, jnp.dtype(jnp.bfloat16)
    for kind, B, K in itertools.product(a.kinds, a.batch, a.kv_heads):
        name = f"{kind}, B={B} K={K}"
        if kind == "window":
            of_window_here = WindowProblem(B, a.length, a.heads, K, a.width, a.window, dtype, rope=True)
            found[f"{name} W={a.window}"] = functools.partial(of_window, of_window_here)
            continue
        act, width = (None, None) if kind == "features" else (kind, a.width)
        for F in a.features:
            problem = Problem(B, a.length, a.heads, K, K, F, a.width, dtype, act=act, width=width)
            found[f"{name} F={F}"] = functools.partial(of_linear_branch, problem)
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row per problem: milliseconds as tuned, and what share of those by the rules that is."""
    lines = ["| problem | chip | forward, ms | of the rules' | both passes, ms | of the rules' |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [name, row["chip"]]
        for which in ("forward", "both"):
            cells += [f"{row[f'{which}_ms']:.3f}", f"{row[f'{which}_ms'] / row[f'ruled_{which}_ms']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1], metavar="B", help="(%(default)s)")
    parser.add_argument("--length", type=int, default=2048, metavar="T", help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="(%(default)s)")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8], metavar="K", help="(%(default)s)")
    parser.add_argument("--width", type=int, default=128, metavar="H", help="of heads (%(default)s)")
    parser.add_argument("--features", type=int, nargs="+", default=[128], metavar="F", help="(%(default)s)")
    parser.add_argument("--window", type=int, default=128, metavar="W", help="(%(default)s)")
    parser.add_argument(
        "--kinds", nargs="+", default=["features", "exp", "window"], choices=KINDS, metavar="KIND",
        help=f"of {', '.join(KINDS)} (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="S", help="of searching for a problem (until nothing helps)"
    )
    parser.add_argument("--table", type=Path, default=tuned.TABLE, metavar="FILE", help="to write to (tuned.json)")
    a = parser.parse_args()
    if odd := [K for K in a.kv_heads if a.heads % K]:
        parser.error(f"{a.heads} query heads cannot share {odd[0]} key heads; give a --kv-heads that divides --heads")
    here = target.current()
    if here.platform != "gpu":
        print(f"error: tiles are measured on a GPU; this process has {here.platform}", file=sys.stderr)
        return 2
    rows = {}
    for name, make in subjects(a).items():
        subject = make()
        with tqdm(disable=None, unit=" plans", desc=name) as bar:
            rows[name] = tune(subject, bar, a.seconds)
            say(f"{name}: {rows[name]['forward_ms']:.3f} ms, both passes {rows[name]['both_ms']:.3f}")
        keep(subject.key, rows[name], a.table)
    print(table(rows))
    print(f"\nwrote {a.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
