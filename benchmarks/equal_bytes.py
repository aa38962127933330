"""Students of one teacher whose states take as many bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lizard_jax.config import LizardConfig, preset
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import model_config
from lizard_jax.select import budgets
from lizard_jax.select.budgets import Curves, Size, spend

LONGEST = 8192
"""Tokens at which growing caches count."""


def students(
    window: int, teacher: Path, heads: tuple[str, ...] = (), curves: Curves | None = None
) -> dict[str, LizardConfig]:
    """By name, the attention of each row."""
    ours = dataclasses.replace(preset("lizard"), window=window)
    shape = model_config(read_json(teacher / "config.json"))
    half = ours.feature_half or shape.head_dim

    def worth(half: int) -> int:
        """A state head's F (H + 1) fp32 numbers, in tokens of one key head's k and v in bf16."""
        return 2 * half * (shape.head_dim + 1) * 4 // (2 * shape.head_dim * 2)

    wider, quarter = window + worth(half), half // 4
    narrow = dataclasses.replace(ours, feature_half=quarter, window=wider - worth(quarter))
    count = pairs_worth(wider - worth(quarter), window, shape.head_dim)
    pairs = dataclasses.replace(ours, feature_half=quarter, kept=count)
    alone = dataclasses.replace(ours, memory="none", kept=pairs_worth(wider, window, shape.head_dim))
    out = {
        "lizard": ours,
        "lizard, a quarter of the features": narrow,
        "lizard, kept pairs": pairs,
        "window and kept pairs": alone,
        "window": dataclasses.replace(ours, memory="none"),
        "window, equal bytes": dataclasses.replace(ours, memory="none", window=wider),
    }
    if curves is not None:
        # The same bytes once more, in as many pairs for each key head as it needs.
        limit = Size(state_bytes(teacher, out["window, equal bytes"], LONGEST), LONGEST)
        for name, switches in (("lizard, pairs by head", pairs), ("window, pairs by head", alone)):
            out[name] = spend(curves, limit, shape, switches).switches
    if heads:
        out["lizard, kept pairs, exact heads"] = dataclasses.replace(pairs, softmax_heads=heads)
        out["window, exact heads"] = dataclasses.replace(ours, memory="none", softmax_heads=heads)
    return out


def pairs_worth(tokens: int, window: int, head_dim: int) -> int:
    """Kept pairs that cost as much as ``tokens`` of a window, beside a window of ``window``: keys and values in bf16,
    and the numbers that decide about them."""
    pair = 2 * head_dim * 2
    return (tokens * pair - window * (pair + 4)) // (pair + 8)


def state_bytes(teacher: Path, attention: LizardConfig | None, length: int) -> int:
    """Bytes of one sequence's decode state with bf16 keys and values, after ``length`` tokens."""
    return budgets.state_bytes(model_config(read_json(teacher / "config.json"), attention=attention), length)
