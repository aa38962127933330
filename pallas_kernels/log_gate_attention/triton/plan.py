"""Sizes of the Triton kernels' tiles, for a problem on a chip."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.log_gate_attention import tuned
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.target import Target
from pallas_kernels.triton_launch import capability

_PROCESSORS = {"sm_80": 108, "sm_90": 132}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Of one kernel: columns of features and of values in a tile, query heads or keys in its rows; how it is run."""

    features: int
    width: int
    heads: int = 1
    keys: int = 1
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What may be tuned.

    Attributes:
        chunk: tokens of a chunk: 16, 32, 64 or 128.
        fused: outputs and states in one pass, or chunk states first and outputs from them.
    """

    chunk: int
    fused: bool
    forward: Launch
    states: Launch
    outputs: Launch
    cotangents: Launch
    rows: Launch
    keys: Launch


def power(x: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``x`` and ``least``."""
    return max(least, 1 << (x - 1).bit_length())


def plan(problem: Problem, target: Target, chunk: int) -> Plan:
    """What was measured to be fastest, else the largest tiles that compile without spills at the shapes of 7-8B models.

    Outputs and states are computed in one pass where batch and heads fill the card once and a half; Ampere's registers
    allow it only where every query head has a state of its own.
    """
    wide = problem.dtype.itemsize > 2
    ampere = (capability(target.chip) or 90) < 90
    F, H, group = power(problem.F, 16), power(problem.H, 16), problem.N // problem.S
    C = max(16, min(32 if wide else 64, 1 << (chunk.bit_length() - 1), power(problem.T)))
    # Query heads have each a map of their own, so a tile of computed features is of one.
    heads = 1 if problem.act else min(power(group), max(1, (64 if wide else 128) // C))
    block = 32 if wide else 64
    width = min(H, 32 if wide or ampere or F > 128 else 64)
    room = F <= 128 or (group == 1 and not ampere)
    fills = 2 * problem.B * problem.S * (H // width) >= 3 * _PROCESSORS.get(target.chip or "", 132)
    tile = (min(F, block), min(H, block))
    small = group == 1 and F <= 128  # one query head's rows and a state of half the registers
    few = ampere and group > 1 and F <= 128
    if problem.act:
        return _mapped(problem, min(C, 16 if ampere and F > 128 else 32), ampere)
    measured = None if wide or problem.T < 128 else tuned.choice(target.chip, problem.F, problem.H, group)
    if measured is not None:
        sizes: dict[str, Any] = {name: Launch(**x) if isinstance(x, dict) else x for name, x in measured.items()}
        best = Plan(**sizes)
        return dataclasses.replace(best, fused=best.fused and fills)
    return Plan(
        chunk=C,
        fused=fills and room and (group == 1 or not ampere),
        forward=Launch(F, width, heads, num_warps=4 if small else 8, num_stages=1),
        states=Launch(*tile, num_stages=3),
        outputs=Launch(tile[0], tile[1] if ampere else min(H, 128), heads, num_warps=8),
        cotangents=Launch(tile[0], min(H, 32) if ampere else tile[1], 1 if ampere else heads, num_warps=8),
        rows=Launch(tile[0], min(H, 32) if ampere else tile[1], 1 if ampere else heads, num_warps=8),
        keys=Launch(F, H, keys=min(C, 16 if few or wide else 32), num_warps=8, num_stages=2 if few else 1),
    )


def _mapped(problem: Problem, C: int, ampere: bool) -> Plan:
    """Tiles of ``rows`` and ``keys`` hold a whole half of the features, for a softmax's gradient sums over it."""
    E, H, block = power(problem.F // 2, 16), power(problem.H, 16), 32 if problem.dtype.itemsize > 2 else 64
    tile = (min(E, block), min(H, block))
    return Plan(
        chunk=C,
        fused=False,
        forward=Launch(E, H),
        states=Launch(*tile, num_warps=8),
        outputs=Launch(min(tile[0], 32) if E > 64 else tile[0], tile[1], num_warps=8, num_stages=1),
        cotangents=Launch(tile[0], min(H, 32) if ampere else tile[1], num_warps=8, num_stages=1),
        rows=Launch(E, min(H, 2 * block), num_warps=8, num_stages=1),
        keys=Launch(E, H, keys=16, num_warps=8, num_stages=1),
    )
