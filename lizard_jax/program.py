"""What every command has in common: what it calls itself, what it need not load, and how it ends whatever happens."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from lizard_jax.accelerators import keep_compiled, startable
from lizard_jax.errors import UserError


def program(otherwise: str) -> str:
    """``lizard NAME`` where the command was called so, for its help and its errors."""
    return sys.argv[0] if sys.argv[0].startswith("lizard ") else otherwise


def ended(work: Callable[[], int], *, interrupted: str) -> int:
    """Does a command's work and returns its exit code; what goes wrong outside is one line on stderr.

    Args:
        work: returns the exit code; its output reaches stdout before this returns.
        interrupted: what to say after Ctrl-C.

    Returns:
        ``work``'s code; 2 after bad input, a file that cannot be read or written, or an output that was closed or is
        full; 130 after Ctrl-C.
    """
    keep_compiled()
    try:
        with _unswallowed(), startable():
            code = work()
        sys.stdout.flush()
    except UserError as error:
        return _failed(f"error: {' '.join(str(error).split())}", 2)
    except BrokenPipeError:
        _silence()
        return _failed("error: the output was closed before all of it was written", 2)
    except OSError as error:
        if error.filename is None:
            _silence()
        return _failed(f"error: {error.filename or 'the output cannot be written'}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        return _failed(interrupted, 130)
    except ImportError as error:
        # What Ctrl-C becomes while a module written in C++ is being loaded.
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        return _failed(interrupted, 130)
    return code


@contextlib.contextmanager
def hidden(package: str) -> Iterator[None]:
    """Imports inside find no such package, unless it is loaded already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextlib.contextmanager
def _unswallowed() -> Iterator[None]:
    """A Ctrl-C that meets a callback of Python's garbage collection, where nothing can be raised, comes again: JAX has
    such a callback, and while modules load every fifth would be lost."""

    def again(lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type is KeyboardInterrupt:
            # From here it would be lost once more. A signal, for it also ends what this thread waits in.
            here = threading.get_ident()
            threading.Timer(0.01, lambda: signal.pthread_kill(here, signal.SIGINT)).start()
        else:
            before(lost)

    before, sys.unraisablehook = sys.unraisablehook, again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _failed(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _silence() -> None:
    """What is left in stdout's buffer cannot be written either, and Python would say so once more at its end."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # no file: a test's stand-in
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
