"""Tile sizes found by measurement, where there are any: ``tuned.json``, written by ``benchmarks/tune.py``."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallas_kernels.log_gate_attention.problem import Problem

TABLE = Path(__file__).with_name("tuned.json")


def key(chip: str | None, problem: Problem, full: bool) -> dict[str, Any]:
    """What a row of the table is for: bf16 heads of these widths, ``G`` query heads a state, on this chip.

    Args:
        full: there are sequences and heads enough for one pass to fill the card.
    """
    sizes = {"F": problem.F, "H": problem.H, "X": problem.width, "G": problem.N // problem.S}
    return {"op": "log_gate_attention", "chip": chip, "act": problem.act} | sizes | {"full": full}


def rows(table: Path) -> list[dict[str, Any]]:
    """All of a table: keys, with ``choice``, the fields of a kernel's plan, and what was measured."""
    return json.loads(table.read_text()) if table.is_file() else []


_rows = functools.cache(rows)


def choice(wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What was fastest for a ``key``; None if nothing was measured."""
    return next((row["choice"] for row in _rows(TABLE) if wanted.items() <= row.items()), None)
