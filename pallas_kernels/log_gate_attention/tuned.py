"""Tile sizes found by measurement, where there are any: ``tuned.json``, written by ``benchmarks/kernels.py --tune``."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuned.json")
PASSES = ("forward+backward", "forward")  # the first that was measured counts


@functools.cache
def _rows(table: Path) -> list[dict[str, Any]]:
    return json.loads(table.read_text()) if table.is_file() else []


def choice(chip: str | None, F: int, H: int, G: int, table: Path | None = None) -> dict[str, Any] | None:
    """What was fastest on this chip for bf16 heads of these widths, ``G`` query heads a state; None if not measured."""
    wanted = {"op": "log_gate_attention", "chip": chip, "F": F, "H": H, "G": G}
    for which in PASSES:
        for row in _rows(table or TABLE):
            if row["pass"] == which and all(row[name] == value for name, value in wanted.items()):
                return row["choice"]
    return None
