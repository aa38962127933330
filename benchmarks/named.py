"""Students that a command line names as ``--students NAME=DIR``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import lizard_jax
from lizard_jax.errors import UserError
from lizard_jax.models import Llama


def students(texts: Sequence[str]) -> dict[str, Callable[[], Llama]]:
    """By name, what loads each: a stage directory, a Flax or an HF directory.

    Raises:
        UserError: one has no directory.
    """
    out: dict[str, Callable[[], Llama]] = {}
    for text in texts:
        name, _, directory = text.partition("=")
        if not directory:
            raise UserError(f"--students {text}: give NAME=DIR")
        out[name] = partial(lizard_jax.load, directory)
    return out
