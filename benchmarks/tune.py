"""Tiles of the Triton kernels by measurement, on the GPU at hand.

    uv run --extra cuda python -m benchmarks.tune [--batch 16 1] [--kv-heads 32 8] [--maps none exp]

For each problem (bf16, T=2048, N=32, H=128, and every batch, K, F and map given) the search begins with the tiles that
``triton/plan.py`` takes by its rules and changes a few sizes of one kernel at a time, each to its half, itself or its
double, as long as something gets faster by more than a hundredth: first the forward pass, in one pass over the sequence
and with states first, then with the gradient. Tiles that do not compile, or give other numbers than the first ones, are
left out. Compilers run side by side on all cores, measurements one after another.

Prints a table, and writes a row to ``pallas_kernels/log_gate_attention/tuned.json`` as soon as it is found, in place of
what was there for the same problem on the same chip: its key, ``choice``, which is the fields of the kernels' ``Plan``,
and milliseconds of both passes with it and by the rules. From then on ``implementation="triton"`` takes these tiles.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.timing import PASSES, inputs, jax_passes, mapped_inputs, seconds_of
from lizard_jax.atomic import write_atomic
from pallas_kernels import target
from pallas_kernels.log_gate_attention import empty_state, tuned
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.log_gate_attention.triton.plan import Plan, by_rule, power

GAIN = 0.99  # of the time so far, that a change must get below
FARTHEST = 2e-2  # relative RMS of bf16 results by other tiles
CALLS = 10  # of one run, in a loop on the device: launching them one by one would take longer than a short pass
FEWEST_SECONDS = 0.02  # of one measurement

Measure = Callable[[Sequence[Plan]], list[float]]


class Knob(NamedTuple):
    """A size that may change: a field of one kernel's launch, or of the plan itself where ``kernel`` is None."""

    kernel: str | None
    field: str
    least: int
    most: int

    def of(self, how: Plan) -> int:
        return getattr(how if self.kernel is None else getattr(how, self.kernel), self.field)

    def turned(self, how: Plan, value: int) -> Plan:
        if self.kernel is None:
            return dataclasses.replace(how, **{self.field: value})
        launch = dataclasses.replace(getattr(how, self.kernel), **{self.field: value})
        return dataclasses.replace(how, **{self.kernel: launch})

    def values(self, how: Plan) -> list[int]:
        now = self.of(how)
        near = (now - 1, now, now + 1) if self.field == "num_stages" else (now // 2, now, now * 2)
        return [value for value in near if value == now or self.least <= value <= self.most]


Group = tuple[Knob, ...]


def forward_groups(problem: Problem, how: Plan) -> list[Group]:
    """Knobs that are turned together, of the kernels that the forward pass of such a plan runs."""
    of = _knobs(problem)
    if how.fused:
        return of("forward", "width", "heads", beside=Knob(None, "fused", 16, 128))
    states = [(Knob(None, "chunk", 16, 128),), *of("states", "width", "features")]
    return [*states, *of("outputs", "width", "features", "heads")]


def backward_groups(problem: Problem, how: Plan) -> list[Group]:
    """The same of the gradient; what the forward pass runs, too, stays as it is."""
    of = _knobs(problem)
    states = [(Knob(None, "chunk", 16, 128),), *of("states", "width", "features")] if how.fused else []
    rows = [*of("rows", "places", "heads"), *of("rows", *(("width",) if problem.act else ("width", "features")))[:1]]
    return [*states, *of("cotangents", "width", "features", "heads"), *rows, *of("keys", "places")]


def _knobs(problem: Problem) -> Callable[..., list[Group]]:
    """Groups of one kernel: its tile, how it is run, and the size that takes most memory together with its stages.

    Tiles are of one half of mapped features and of one query head, as such kernels are written.
    """
    features = power(problem.F // 2 if problem.act else problem.F, 16)
    heads = 1 if problem.act else power(problem.N // problem.S)
    most = {"features": features, "width": power(problem.H, 16), "heads": heads, "places": 128}

    def of(kernel: str, *fields: str, beside: Knob | None = None) -> list[Group]:
        tile = tuple(Knob(kernel, name, 1 if name == "heads" else 16, most[name]) for name in fields)
        warps, stages = Knob(kernel, "num_warps", 2, 8), Knob(kernel, "num_stages", 1, 4)
        return [tile if beside is None else (beside, *tile), (warps, stages), (tile[0], stages)]

    return of


def neighbours(how: Plan, group: Group) -> list[Plan]:
    """Plans with another value of one or several knobs."""
    plans = []
    for values in itertools.product(*(knob.values(how) for knob in group)):
        other = how
        for knob, value in zip(group, values, strict=True):
            other = knob.turned(other, value)
        plans.append(other)
    return [other for other in plans if other != how]


def search(start: Plan, groups: Sequence[Group], measure: Measure) -> tuple[Plan, float]:
    """The fastest plan found from ``start``, and its milliseconds.

    Args:
        measure: milliseconds of each of several plans, infinitely many for those that cannot be taken.
    """
    best = start
    taken = {start: measure([start])[0]}
    since = 0
    for group in itertools.cycle(groups):
        fresh = [how for how in neighbours(best, group) if how not in taken]
        taken |= dict(zip(fresh, measure(fresh), strict=True))
        fastest = min([best, *fresh], key=taken.__getitem__)
        since += 1
        if taken[fastest] < GAIN * taken[best]:
            best, since = fastest, 0
        if since == len(groups):
            break
    return best, taken[best]


class Bench:
    """One problem's passes, by any plan."""

    def __init__(self, problem: Problem, bar: tqdm) -> None:
        self.problem, self.bar = problem, bar
        self._first: dict[str, Any] = {}
        x, p = inputs(problem), problem
        self._dy, c = x.pop("dy"), jnp.zeros((p.B, p.T, p.S), jnp.float32)
        self._rest = c, empty_state(p.B, p.S, p.F, p.H)
        raw = mapped_inputs(p) if p.act else {}
        names = ("q", "k", "v", "g", *(("q_map", "k_map") if p.act else ()))
        self._arguments = tuple((x | raw)[name] for name in names)

    def measure(self, which: str, plans: Sequence[Plan]) -> list[float]:
        """Milliseconds of each plan in a pass; infinitely many if it does not run or gives other numbers."""
        context = contextvars.copy_context()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda how: context.copy().run(self._compiled, which, how), plans))
        return [self._time(which, run) for run in made]

    def _compiled(self, which: str, how: Plan) -> Callable[[], Any] | None:
        p, (c, state) = self.problem, self._rest

        def attend(q, k, v, g, *maps):
            if p.act:
                from pallas_kernels.log_gate_attention.triton.attend_mapped import attend_mapped_by

                return cast("Any", attend_mapped_by)(q, k, v, g, c, state, *maps, p.act, how)[0]
            from pallas_kernels.log_gate_attention.triton.attend import attend_by

            return cast("Any", attend_by)(q, k, v, g, c, state, True, how)[0]

        function, arguments = jax_passes(attend, self._arguments, self._dy)[which]
        try:
            return functools.partial(jax.jit(_again(function)).lower(*arguments).compile(), *arguments)
        except Exception:  # tiles that do not fit one another, or the chip; the compilers' own errors, of many kinds
            return None

    def _time(self, which: str, run: Callable[[], Any] | None) -> float:
        self.bar.update()
        if run is None:
            return math.inf
        try:
            result = jax.block_until_ready(run())
        except jax.errors.JaxRuntimeError:  # too much shared memory is found when it is launched
            return math.inf
        if max(jax.tree.leaves(_distances(self._first.setdefault(which, result), result))) > FARTHEST:
            return math.inf
        once = seconds_of(run, jax.block_until_ready, 1)
        times = max(1, round(FEWEST_SECONDS / once))
        return 1e3 / CALLS * min(seconds_of(run, jax.block_until_ready, times) for _ in range(3))


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


def tune(problem: Problem, bar: tqdm) -> dict[str, Any]:
    """A row of the table.

    Raises:
        SystemExit: nothing ran, not even what the rules say.
    """
    here, bench = target.current(), Bench(problem, bar)
    ruled = by_rule(problem, here, 64)
    before = [bench.measure(which, [ruled])[0] for which in PASSES]
    if math.inf in before:
        raise SystemExit(f"the tiles that the rules give for {problem} do not run here: {ruled}")
    starts = {ruled, dataclasses.replace(ruled, fused=0 if ruled.fused else 32)}
    forward, both = (functools.partial(bench.measure, which) for which in PASSES)
    found = [search(start, forward_groups(problem, start), forward) for start in starts]
    best, forward_ms = min(found, key=lambda pair: pair[1])
    best, both_ms = search(best, backward_groups(problem, best), both)
    measured = {"forward_ms": forward_ms, "both_ms": both_ms, "ruled_forward_ms": before[0], "ruled_both_ms": before[1]}
    key = tuned.key(here.chip, problem, ruled.fused > 0)
    return key | {"B": problem.B, "T": problem.T, "choice": dataclasses.asdict(best)} | measured


def keep(row: dict[str, Any], table: Path) -> None:
    """Put a row into the table, in place of one with its key."""
    wanted = {name: row[name] for name in ("op", "chip", "act", "F", "H", "X", "G", "full")}
    others = [other for other in tuned.rows(table) if not wanted.items() <= other.items()]
    write_atomic(table, "[\n " + ",\n ".join(json.dumps(one) for one in [*others, row]) + "\n]\n")


def problems(a: argparse.Namespace) -> list[Problem]:
    return [
        Problem(
            B, a.length, a.heads, K, K, F, a.width, jnp.dtype(jnp.bfloat16),
            act=None if act == "none" else act, width=None if act == "none" else a.width,
        )
        for B in a.batch for act in a.maps for F in a.features for K in a.kv_heads
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row per problem: milliseconds as tuned and of those by the rules."""
    lines = ["| chip | map | B | G | F | forward, ms | of the rules' | both, ms | of the rules' | one pass |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        told = [row["chip"], row["act"] or "", row["B"], row["G"], row["F"]]
        for which in ("forward", "both"):
            told += [f"{row[f'{which}_ms']:.3f}", f"{row[f'{which}_ms'] / row[f'ruled_{which}_ms']:.2f}"]
        told.append("yes" if row["choice"]["fused"] else "no")
        lines.append("| " + " | ".join(map(str, told)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1], metavar="B", help="(%(default)s)")
    parser.add_argument("--length", type=int, default=2048, metavar="T", help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="(%(default)s)")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8], metavar="K", help="(%(default)s)")
    parser.add_argument("--width", type=int, default=128, metavar="H", help="of heads (%(default)s)")
    parser.add_argument("--features", type=int, nargs="+", default=[128], metavar="F", help="(%(default)s)")
    parser.add_argument(
        "--maps", nargs="+", default=["none", "exp"], choices=["none", "exp", "softmax"],
        help="feature maps inside the kernel; none where features are given (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--table", type=Path, default=tuned.TABLE, metavar="FILE", help="to write to (tuned.json)")
    a = parser.parse_args()
    here = target.current()
    if here.platform != "gpu":
        print(f"error: tiles are measured on a GPU; this process has {here.platform}", file=sys.stderr)
        return 2
    rows = []
    for problem in problems(a):
        name = f"{problem.act or 'features'}, B={problem.B} K={problem.K} F={problem.F}"
        with tqdm(disable=None, unit=" plans", desc=name) as bar:
            rows.append(tune(problem, bar))
        keep(rows[-1], a.table)
    print(table(rows))
    print(f"\nwrote {a.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
