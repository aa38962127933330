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
from pallas_kernels import target
from pallas_kernels.log_gate_attention import tuned
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.log_gate_attention.triton.plan import by_rule, from_row
from pallas_kernels.target import Target

HOPPER = Target("gpu", "sm_90")
LARGE = Problem(16, 2048, 32, 8, 8, 128, 128, jnp.dtype(jnp.bfloat16))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_search_goes_downhill_to_the_best_tiles_that_run():
    start = by_rule(LARGE, HOPPER, 64)
    groups = tune.forward_groups(LARGE, start)
    asked = []

    def measure(plans):
        asked.extend(plans)
        # Shared memory is short: a tile of 128 columns does not run with more than two stages.
        return [
            math.inf
            if how.forward.width > 64 and how.forward.num_stages > 2
            else 1 + abs(math.log2(how.fused / 128)) + 1.5 * abs(how.forward.num_stages - 4) + 128 / how.forward.width
            for how in plans
        ]

    best, ms = tune.search(start, groups, measure)
    assert (best.fused, best.forward.width, best.forward.num_stages) == (128, 64, 4)
    assert ms == 3.0
    assert len(asked) == len(set(asked)) < 150
    assert all(dataclasses.replace(how, fused=start.fused, forward=start.forward) == start for how in asked)


def test_search_takes_no_noise_for_an_improvement_and_gives_up_where_nothing_runs():
    start = by_rule(LARGE, HOPPER, 64)
    noise = random.Random(0)
    groups = tune.backward_groups(LARGE, start)
    assert tune.search(start, groups, lambda plans: [1 + noise.uniform(0, 0.009) for _ in plans])[0] == start
    assert tune.search(start, groups, lambda plans: [math.inf for _ in plans]) == (start, math.inf)


@pytest.mark.parametrize("act", [None, "exp"])
@pytest.mark.parametrize("fused", [0, 32])
def test_only_kernels_that_a_pass_runs_are_changed(act, fused):
    problem = dataclasses.replace(LARGE, act=act, width=act and 128)
    how = dataclasses.replace(by_rule(problem, HOPPER, 64), fused=fused)

    def kernels(groups):
        return {knob.kernel or knob.field for group in groups for knob in group}

    forward, backward = tune.forward_groups(problem, how), tune.backward_groups(problem, how)
    assert kernels(forward) == ({"fused", "forward"} if fused else {"chunk", "states", "outputs"})
    assert kernels(backward) == {"cotangents", "rows", "keys"} | ({"chunk", "states"} if fused else set())
    # Tiles that hold a state whole, and one query head with its map, stay so.
    for plan in (other for group in forward + backward for other in tune.neighbours(how, group)):
        assert (plan.keys.features, plan.keys.width) == (how.keys.features, how.keys.width)
        assert plan.forward.features == how.forward.features
        if act:
            assert plan.rows.features == how.rows.features
            assert {getattr(plan, name).heads for name in ("forward", "outputs", "rows", "cotangents")} == {1}


@needs_triton
@pytest.mark.parametrize("act", [None, "exp"])
def test_whatever_is_tried_computes_the_same(act, monkeypatch):
    monkeypatch.setattr(tune, "CALLS", 1)
    monkeypatch.setattr(tune, "FEWEST_SECONDS", 1e-9)
    problem = Problem(1, 24, 2, 1, 1, 32, 32, jnp.dtype(jnp.bfloat16), act=act, width=act and 32)
    with target.override(dataclasses.replace(HOPPER, interpret=True, processors=1)):
        how = by_rule(problem, target.current(), 16)
        assert how.fused
        bench = tune.Bench(problem, tqdm(disable=True))
        draw = random.Random(1)
        for which, groups in (
            ("forward", tune.forward_groups(problem, how)),
            ("forward", tune.forward_groups(problem, dataclasses.replace(how, fused=0))),
            ("forward+backward", tune.backward_groups(problem, how)),
        ):
            tried = [other for group in groups[::2] for other in tune.neighbours(how, group)]
            assert all(0 < ms < math.inf for ms in bench.measure(which, [how, *draw.sample(tried, 2)]))
        # What gives other numbers, or does not compile, is never the fastest.
        bench._first["forward"] = jax.tree.map(lambda x: x + 1, bench._first["forward"])
        broken = dataclasses.replace(how, fused=0, chunk=48)
        assert bench.measure("forward", [how, broken]) == [math.inf, math.inf]


def test_a_row_replaces_the_one_of_its_problem_and_no_other(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    how = by_rule(LARGE, HOPPER, 64)
    for chip, chunk in (("sm_80", 16), ("sm_90", 32), ("sm_90", 64)):
        choice = dataclasses.asdict(dataclasses.replace(how, chunk=chunk))
        tune.keep(tuned.key(chip, LARGE, True) | {"B": 16, "choice": choice}, table)
    rows = tuned.rows(table)
    assert [(row["chip"], row["choice"]["chunk"]) for row in rows] == [("sm_80", 16), ("sm_90", 64)]
    assert from_row(rows[1]["choice"]) == dataclasses.replace(how, chunk=64)


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune"])
    with target.override(Target("cpu")):
        assert tune.main() == 2
    assert capsys.readouterr().err == "error: tiles are measured on a GPU; this process has cpu\n"


def test_the_table_names_problems_and_gains():
    how = by_rule(LARGE, HOPPER, 64)
    row = tuned.key("sm_90", LARGE, True) | {"B": 16, "choice": dataclasses.asdict(how)}
    row |= {"forward_ms": 1.0, "ruled_forward_ms": 2.0, "both_ms": 3.0, "ruled_both_ms": 4.0}
    assert "| sm_90 |  | 16 | 4 | 128 | 1.000 | 0.50 | 3.000 | 0.75 | yes |" in tune.table([row])
