"""What Orbax says beside its exceptions, kept from the terminal: an error is told once, by who catches it."""

import contextlib
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from lizard_jax.errors import disk_full


def quiet() -> None:
    """Orbax logs every file it opens and a traceback for each error that it raises as well."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def failing_quietly() -> Iterator[None]:
    """Around a read or write by Orbax that may fail.

    When one array fails, those still under way fail too or find their event loop closed, each in a thread of its own
    and whenever it ends, which may be long after the failure was raised; asyncio logs some of them, and Python warns of
    those that had not begun. They say nothing new. So what ignores them stays after a failure; everything else goes on
    to the hooks there were.
    """
    usual = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = (_without_echoes(hook) for hook in usual)
    try:
        yield
    except BaseException:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
        raise
    sys.unraisablehook, threading.excepthook = usual


def _without_echoes(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def tell(event: Any) -> None:
        # What a coroutine raises while it is thrown away with its loop is as good as "loop is closed".
        thrown_away = inspect.iscoroutine(getattr(event, "object", None))
        if not thrown_away and "loop is closed" not in str(event.exc_value) and not disk_full(event.exc_value):
            hook(event)

    return tell
