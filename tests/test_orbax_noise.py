"""After an error of Orbax's nothing that only repeats it is told; everything else still is."""

import logging
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest

from lizard_jax import orbax_noise


@pytest.fixture
def told(monkeypatch):
    """What reached the hooks there were before, and asyncio's level put back."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(threading, "excepthook", told.append)
    level = logging.getLogger("asyncio").level
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield told
    logging.getLogger("asyncio").setLevel(level)


def test_echoes_of_a_failure_are_not_told(told):
    async def waits():
        pass

    with pytest.raises(OSError, match="no space left"), orbax_noise.failing_quietly():
        raise OSError("no space left")
    waiting = waits()
    sys.unraisablehook(SimpleNamespace(object=waiting, exc_value=RuntimeError("Lock is not acquired.")))
    waiting.close()
    waiting = waits()
    with warnings.catch_warnings(record=True) as warned:
        del waiting  # without having begun
    assert not warned
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed")))
    threading.excepthook(SimpleNamespace(exc_value=OSError("File too large")))
    assert told == []
    assert not logging.getLogger("asyncio").isEnabledFor(logging.ERROR)

    other = SimpleNamespace(object=None, exc_value=ValueError("another thing"))
    sys.unraisablehook(other)
    threading.excepthook(other)
    assert told == [other, other]


def test_without_a_failure_everything_is_as_it_was(told):
    before = sys.unraisablehook, threading.excepthook, logging.getLogger("asyncio").level
    with orbax_noise.failing_quietly():
        pass
    assert (sys.unraisablehook, threading.excepthook, logging.getLogger("asyncio").level) == before
