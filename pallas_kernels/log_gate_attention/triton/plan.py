"""Sizes of the Triton kernels' tiles, for a problem on a chip."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels import tuned
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.target import Target
from pallas_kernels.triton_launch import capability

_PROCESSORS = {"sm_80": 108, "sm_90": 132}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Of one kernel: columns of features and of values in a tile, query heads and places in its rows; how it is run."""

    features: int
    width: int
    heads: int = 1
    places: int = 64
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What may be tuned.

    Attributes:
        chunk: tokens of a chunk where states come first and outputs from them, and of the gradient: 16, 32, 64 or 128.
        fused: the same where one pass makes outputs and states; 0 where states come first.
        forward: of that pass.
    """

    chunk: int
    fused: int
    forward: Launch
    states: Launch
    outputs: Launch
    cotangents: Launch
    rows: Launch
    keys: Launch


def is_ampere(target: Target) -> bool:
    """Not so where the chip is not known: kernels are for A100 and later."""
    return (capability(target.chip) or 90) < 90


def _processors(target: Target) -> int:
    return target.processors or _PROCESSORS.get(target.chip or "", 132)


def power(x: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``x`` and ``least``."""
    return max(least, 1 << (x - 1).bit_length())


def plan(problem: Problem, target: Target, chunk: int) -> Plan:
    """What was measured to be fastest for such problems, else what the rules say."""
    ruled = by_rule(problem, target, chunk)
    measurable = problem.dtype.itemsize == 2 and problem.T >= 128
    measured = tuned.choice(key(problem, target, ruled.fused > 0) if measurable else None)
    return ruled if measured is None else from_row(measured)


def key(problem: Problem, target: Target, full: bool) -> dict[str, Any]:
    """What a measurement in bf16 is for.

    Args:
        full: there are sequences and heads enough for one pass to fill the card.
    """
    sizes = {"F": problem.F, "H": problem.H, "X": problem.width, "G": problem.N // problem.S}
    return {"op": "log_gate_attention", "chip": target.chip, "act": problem.act} | sizes | {"full": full}


def from_row(choice: dict[str, Any]) -> Plan:
    """A plan from its fields as a table has them."""
    sizes: dict[str, Any] = {name: Launch(**x) if isinstance(x, dict) else x for name, x in choice.items()}
    return Plan(**sizes)


def by_rule(problem: Problem, target: Target, chunk: int) -> Plan:
    """Tiles that take few instructions a token and spill little, by the code compiled for shapes of 7-8B models."""
    wide = problem.dtype.itemsize > 2
    ampere = is_ampere(target)
    F, H, group = power(problem.F, 16), power(problem.H, 16), problem.N // problem.S
    longest = max(16, min(1 << (chunk.bit_length() - 1), power(problem.T)))
    C = min(32 if wide else 64, longest)
    fused, forward = _one_pass(problem, target, longest)
    if problem.act:
        how = _mapped(problem, min(C, 64 if F <= 128 else 32), ampere)
        return dataclasses.replace(how, fused=fused, forward=forward)
    heads = min(power(group), max(1, (64 if wide else 128) // C))
    block, grouped = 32 if wide else 64, group > 1
    tile = (min(F, block), min(H, block))
    # A scan over chunks has a program for each state head and tile: large ones where that many fill the card.
    full = _processors(target) <= 2 * problem.B * problem.S
    scan = (min(F, 128), tile[1]) if full and not wide else tile
    keys_at_once = (64 if grouped else 32) if max(F, H) <= 128 else (32 if grouped and H <= 128 else 16)
    keys = Launch(F, H, places=keys_at_once, num_warps=8, num_stages=1 + (grouped and H <= 128))
    if wide:
        cotangents = Launch(*tile, 1 if ampere else heads, num_warps=8)
        rows = Launch(*tile, 1 if ampere else heads, num_warps=8)
        keys = Launch(F, H, places=16, num_warps=8, num_stages=2 if ampere and grouped and F <= 128 else 1)
    elif ampere:
        cotangents = Launch(scan[0], scan[1] if grouped else min(H, 32))
        rows = Launch(*tile, num_stages=1) if F <= 128 else Launch(*tile, num_warps=8)
    else:
        cotangents = Launch(*scan, num_stages=1 + grouped)
        whole = (F, min(H, 128)) if F <= 128 else tile
        rows = Launch(*whole, heads, num_warps=8, num_stages=1 + (grouped or F > 128))
    return Plan(
        chunk=C,
        fused=fused,
        forward=forward,
        states=Launch(*scan, num_stages=3),
        outputs=Launch(tile[0], tile[1] if ampere else min(H, 128), heads, num_warps=8),
        cotangents=cotangents,
        rows=rows,
        keys=keys,
    )


def _one_pass(problem: Problem, target: Target, longest: int) -> tuple[int, Launch]:
    """Chunk and tiles of the pass that makes outputs and states; the chunk is 0 where batch and heads are too few.

    It has a program for each state head and tile of values, which is to leave no more than an eighth of the card
    without one. Of the tiles that spill little or nothing, these take the fewest instructions a token by the compiled
    code, which bound it: more query heads at once make more of a chunk's decays, wider tiles of values more of its
    scores, longer chunks more of its state.
    """
    F, H, group = power(problem.F, 16), power(problem.H, 16), problem.N // problem.S
    wide, ampere = problem.dtype.itemsize > 2, is_ampere(target)
    if problem.act:
        F = power(problem.F // 2, 16)  # a tile for each half
        if wide:
            choices = [(16, 32, 1, 8, 1)]
        elif ampere:
            choices = [(32, 64, 1, 4, 1) if F <= 64 else (16, 64, 1, 8, 1)]
        else:
            choices = [(64, 128, 1, 8, 1), (64, 64, 1, 8, 1)] if F <= 64 else [(32, 64, 1, 8, 1)]
    elif wide:
        choices = [] if F > 128 else [(16, 16, 1, 8, 1) if group == 1 else (16, 32, 1, 4, 1)]
    elif ampere and F <= 128:
        choices = [[(64, 64, 1, 4, 1)], [(32, 64, 2, 4, 1)], [(16, 64, 4, 4, 1)]][min(group, 3) - 1]
    elif ampere:
        choices = [(64, 32, 1, 4, 1)] if group == 1 else [(32, 32, 4, 8, 1)]
    elif F <= 128:
        wider = [[], [(64, 128, 2, 8, 2)], [(32, 128, 4, 8, 2)]][min(group, 3) - 1]
        choices = [*wider, (64, 64, 1, 4, 2) if group == 1 else (32, 64, 2, 4, 2)]
    else:
        choices = [(64, 64, 1, 8, 2) if group == 1 else (32, 64, 4, 8, 2)]
    for chunk, width, heads, warps, stages in choices:
        launch = Launch(F, min(H, width), min(power(group), heads), num_warps=warps, num_stages=stages)
        programs = problem.B * problem.S * -(-problem.H // launch.width)
        if 8 * programs >= 7 * _processors(target):
            return min(chunk, longest), launch
    return 0, Launch(F, min(H, 32))


def _mapped(problem: Problem, C: int, ampere: bool) -> Plan:
    """Tiles of ``rows`` and ``keys`` hold a whole half of the features, for a softmax's gradient sums over it."""
    E, H, block = power(problem.F // 2, 16), power(problem.H, 16), 32 if problem.dtype.itemsize > 2 else 64
    tile, few = (min(E, block), min(H, block)), ampere and E <= 64
    return Plan(
        chunk=C,
        fused=0,
        forward=Launch(E, H),
        states=Launch(*tile),
        outputs=Launch(
            min(tile[0], 32) if E > 64 else tile[0], tile[1], num_warps=4 if ampere == (E > 64) else 8, num_stages=1
        ),
        cotangents=Launch(tile[0], min(H, 32) if ampere else tile[1], num_warps=8, num_stages=1),
        rows=Launch(E, min(H, 2 * block), places=max(16, C // 2) if ampere else C, num_warps=8, num_stages=1 + few),
        keys=Launch(E, H, places=16, num_warps=8, num_stages=1),
    )
