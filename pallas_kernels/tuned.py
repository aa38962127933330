"""Tile sizes found by measurement, where there are any: ``tuned.json``, written by ``benchmarks/tune.py``."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuned.json")

_forced: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("tiles", default=None)


def rows(table: Path) -> list[dict[str, Any]]:
    """All of a table: each row has the fields of a key, ``choice``, and what was measured."""
    return json.loads(table.read_text()) if table.is_file() else []


_rows = functools.cache(rows)


def choice(key: dict[str, Any] | None) -> dict[str, Any] | None:
    """The fields of the plan to take: what ``using`` says, else what was fastest for the key; None where neither does.

    Args:
        key: op, chip and sizes; None for a problem that no row may be for.
    """
    if (forced := _forced.get()) is not None or key is None:
        return forced
    return next((row["choice"] for row in _rows(TABLE) if key.items() <= row.items()), None)


@contextlib.contextmanager
def using(choice: dict[str, Any]) -> Iterator[None]:
    """Build what is traced inside by these tiles; jit does not see the difference, so trace a function anew."""
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)
