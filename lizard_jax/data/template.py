"""A tokenizer's chat template, run with a limit on its time: it is a program that came with somebody's files."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 20.0
"""Seconds that one conversation's rendering may take."""


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    """``tokenizer.apply_chat_template(messages, **options)``.

    Raises:
        TimeoutError: it takes longer than ``PATIENCE``.
        Exception: whatever a template raises for what it refuses, or where it is careless.
    """
    with _time_limit():
        return tokenizer.apply_chat_template(messages, **options)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Ends what loops without end; where there are no alarms, or in another thread, it may take its time."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"it takes longer than {PATIENCE:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
