"""The search for tiles: what it tries, what it keeps, and that whatever it tries computes the same."""

import dataclasses
import importlib.util
import math
import random
import sys

import jax
import jax.numpy as jnp
import pytest
from tqdm import tqdm

from benchmarks import tune
from pallas_kernels import target, tuned
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.log_gate_attention.triton import plan as linear
from pallas_kernels.sliding_window.problem import Problem as WindowProblem
from pallas_kernels.sliding_window.triton import attend as window
from pallas_kernels.target import Target

HOPPER = Target("gpu", "sm_90")
BF16 = jnp.dtype(jnp.bfloat16)
LARGE = Problem(16, 2048, 32, 8, 8, 128, 128, BF16)
needs_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")), reason="needs triton, jax_triton"
)


def test_search_goes_downhill_to_the_best_tiles_that_run():
    start = linear.by_rule(LARGE, HOPPER, 64)
    groups = tune._forward_groups(LARGE, start)
    asked = []

    def cost(how) -> float:
        launch = how.forward
        if launch.width > 64 and launch.num_stages > 2:  # shared memory is short
            return math.inf
        return 1 + abs(math.log2(how.fused / 128)) + 1.5 * abs(launch.num_stages - 4) + 128 / launch.width

    def measure(plans):
        asked.extend(plans)
        return [cost(how) for how in plans]

    best, ms = tune.search(start, groups, measure)
    assert (best.fused, best.forward.width, best.forward.num_stages) == (128, 64, 4)
    assert ms == 3.0
    assert len(asked) == len(set(asked)) < 150
    assert all(dataclasses.replace(how, fused=start.fused, forward=start.forward) == start for how in asked)


def test_search_ends_when_its_time_is_up():
    start = linear.by_rule(LARGE, HOPPER, 64)
    asked = []

    def measure(plans):
        asked.extend(plans)
        return [float(how.fused == start.fused) + 1 for how in plans]

    best, _ = tune.search(start, tune._forward_groups(LARGE, start), measure, seconds=0)
    assert best != start
    assert len(asked) <= 12


def test_search_takes_no_noise_for_an_improvement_and_gives_up_where_nothing_runs():
    start = linear.by_rule(LARGE, HOPPER, 64)
    noise = random.Random(0)
    groups = tune._backward_groups(LARGE, start)
    assert tune.search(start, groups, lambda plans: [1 + noise.uniform(0, 0.009) for _ in plans])[0] == start
    assert tune.search(start, groups, lambda plans: [math.inf for _ in plans]) == (start, math.inf)


@pytest.mark.parametrize("act", [None, "exp"])
@pytest.mark.parametrize("fused", [0, 32])
def test_only_kernels_that_a_pass_runs_are_changed(act, fused):
    problem = dataclasses.replace(LARGE, act=act, width=act and 128)
    how = dataclasses.replace(linear.by_rule(problem, HOPPER, 64), fused=fused)

    def kernels(groups):
        return {knob.kernel or knob.field for group in groups for knob in group}

    forward, backward = tune._forward_groups(problem, how), tune._backward_groups(problem, how)
    assert kernels(forward) == ({"fused", "forward"} if fused else {"chunk", "states", "outputs"})
    assert kernels(backward) == {"cotangents", "rows", "keys"} | ({"chunk", "states"} if fused else set())
    # Tiles that hold a state whole, and one query head with its map, stay so.
    for plan in (other for group in forward + backward for other in tune.neighbours(how, group)):
        assert (plan.keys.features, plan.keys.width) == (how.keys.features, how.keys.width)
        assert plan.forward.features == how.forward.features
        if act:
            assert plan.rows.features == how.rows.features
            assert {getattr(plan, name).heads for name in ("forward", "outputs", "rows", "cotangents")} == {1}


def small(kind: str) -> tune.Subject:
    if kind == "window":
        return tune.of_window(WindowProblem(1, 24, 2, 1, 32, 16, BF16, rope=True))
    act = None if kind == "features" else kind
    return tune.of_linear_branch(Problem(1, 24, 2, 1, 1, 32, 32, BF16, act=act, width=act and 32))


@needs_triton
@pytest.mark.parametrize("kind", ["features", "exp", "window"])
def test_whatever_is_tried_computes_the_same(kind, monkeypatch):
    monkeypatch.setattr(tune, "CALLS", 1)
    monkeypatch.setattr(tune, "FEWEST_SECONDS", 1e-9)
    with target.override(dataclasses.replace(HOPPER, interpret=True, processors=1)):
        subject = small(kind)
        bench, draw = tune.Bench(subject, tqdm(disable=True)), random.Random(1)
        how = subject.starts[0]
        for which, start, groups in (
            *(("forward", start, subject.forward(start)) for start in subject.starts),
            ("forward+backward", how, subject.backward(how)),
        ):
            tried = [other for group in groups[::3] for other in tune.neighbours(start, group)]
            assert all(0 < ms < math.inf for ms in bench.measure(which, [how, *draw.sample(tried, 2)]))
        # What does not compile, or gives other numbers, is never the fastest.
        broken = tune.Knob("forward", "keys" if kind == "window" else "width", 16, 128).turned(how, 24)
        assert bench.measure("forward", [broken]) == [math.inf]
        assert ": " in bench.refused
        bench._first["forward"] = jax.tree.map(lambda x: x + 1, bench._first["forward"])
        assert bench.measure("forward", [how]) == [math.inf]
        assert bench.refused.startswith("relative RMS")


def test_a_row_replaces_the_one_of_its_problem_and_no_other(tmp_path):
    table = tmp_path / "tuned.json"
    how = linear.by_rule(LARGE, HOPPER, 64)
    for chip, chunk in (("sm_80", 16), ("sm_90", 32), ("sm_90", 64)):
        choice = dataclasses.asdict(dataclasses.replace(how, chunk=chunk))
        key = linear.key(LARGE, Target("gpu", chip), full=True)
        tune.keep(key, key | {"B": 16, "choice": choice}, table)
    rows = tuned.rows(table)
    assert [(row["chip"], row["choice"]["chunk"]) for row in rows] == [("sm_80", 16), ("sm_90", 64)]
    assert linear.from_row(rows[1]["choice"]) == dataclasses.replace(how, chunk=64)


def test_the_window_takes_what_was_measured_for_it(tmp_path, monkeypatch):
    q, k = (jax.ShapeDtypeStruct(shape, BF16) for shape in ((1, 2048, 32, 128), (1, 2176, 8, 128)))
    ruled = window.tiles_of(128, BF16)
    best = dataclasses.replace(ruled, forward=window.Tile(64, 64, 4, 3))
    key = window.key(WindowProblem(16, 2048, 32, 8, 128, 128, BF16, rope=True), "sm_90")
    tune.keep(key, key | {"choice": dataclasses.asdict(best)}, tmp_path / "tuned.json")
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    with target.override(HOPPER):
        assert window.tiles(q, k, 128, rope=True) == best
        assert window.tiles(q, k, 64, rope=True) == window.tiles(q, k, 128, rope=False) == ruled
    with target.override(Target("gpu", "sm_80")):
        assert window.tiles(q, k, 128, rope=True) == ruled


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune"])
    with target.override(Target("cpu")):
        assert tune.main() == 2
    assert capsys.readouterr().err == "error: tiles are measured on a GPU; this process has cpu\n"


def test_tiles_that_the_rules_give_and_that_do_not_run_end_it_with_the_reason(monkeypatch):
    """As on a chip without enough memory; the table keeps what it has."""

    def refuse(self, which, plans):
        self.refused = "ValueError: no room"
        return [math.inf for _ in plans]

    monkeypatch.setattr(tune.Bench, "measure", refuse)
    with target.override(HOPPER), pytest.raises(SystemExit, match="do not run here: ValueError: no room"):
        tune.tune(small("window"), tqdm(disable=True))


@needs_triton
def test_the_whole_of_it_on_a_small_problem(tmp_path, monkeypatch, capsys):
    """With the clock replaced by one that knows what is fast."""
    monkeypatch.setattr(tune.Bench, "measure", lambda self, which, plans: [abs(h.forward.rows - 64) + 1 for h in plans])
    arguments = ["--kinds", "window", "--batch", "1", "--kv-heads", "1", "--heads", "2", "--length", "16"]
    arguments += ["--width", "16", "--window", "16", "--table", str(tmp_path / "tuned.json")]
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    with target.override(HOPPER):
        assert tune.main() == 0
    [row] = tuned.rows(tmp_path / "tuned.json")
    assert (row["op"], row["chip"], row["choice"]["forward"]["rows"]) == ("sliding_window", "sm_90", 64)
    assert "| window, B=1 K=1 W=16 | sm_90 | 1.000 | 0.02 | 1.000 | 0.02 |" in capsys.readouterr().out
