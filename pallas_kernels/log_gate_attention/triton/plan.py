"""Sizes of the Triton kernels' tiles, for a problem on a chip."""

from __future__ import annotations

import dataclasses

from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.target import Target

_PROCESSORS = {"sm_80": 108, "sm_90": 132}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Of one kernel: columns of features and of values in a tile, query heads or keys in its rows, and how it
    is run."""

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
    """Defaults. A pass that carries the state gives no work to most of the chip where batch and heads are few."""
    wide = problem.dtype.itemsize > 2
    F, H = power(problem.F, 16), power(problem.H, 16)
    C = max(16, min(64, 1 << (chunk.bit_length() - 1), power(problem.T)))
    C = min(C, 32) if wide or F + H > 384 else C
    heads = power(problem.N // problem.S)
    in_rows = max(1, min(heads, (64 if wide else 128) // C))
    block = 32 if wide else 64
    fused_width = min(H, 32 if wide else 64)
    programs = problem.B * problem.S * (H // fused_width)
    fused = programs >= 2 * _PROCESSORS.get(target.chip or "", 132) and heads <= 4
    return Plan(
        chunk=C,
        fused=fused,
        forward=Launch(F, fused_width, in_rows, num_warps=8 if F > 128 else 4),
        states=Launch(min(F, block), min(H, block), num_stages=3),
        outputs=Launch(min(F, block), min(H, 128), in_rows, num_warps=8),
        cotangents=Launch(min(F, block), min(H, block), in_rows, num_warps=8),
        rows=Launch(min(F, block), min(H, block), 1, num_warps=8),
        keys=Launch(F, H, keys=min(C, 32), num_warps=8, num_stages=1),
    )
