"""In what order a TPU kernel's work is written down.

Mosaic's compiler runs a basic block roughly in the order of its source. One head after another, each a chain of
matmuls and what is made of their results, would leave the matrix units idle while one result is turned into the next
operand; a stage of each of several heads side by side does not. A write is never moved behind a later read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def staggered(count: int, first: Callable[[int], Any], *rest: Callable[[int, Any], Any]) -> None:
    """Take items ``0 … count-1`` through stages; each is given the item and what the stage before made of it.

    While an item is in one stage, the next item is in the stage before.
    """
    made: dict[int, Any] = {}
    for tick in range(count + len(rest)):
        if tick < count:
            made[tick] = first(tick)
        for behind, stage in enumerate(rest, 1):
            if 0 <= (item := tick - behind) < count:
                made[item] = stage(item, made[item])
