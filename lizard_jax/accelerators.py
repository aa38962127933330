"""What JAX is told of this machine before it looks.

Where no accelerator is, it is told so: its plugins for them, if installed, complain at length when they find none. The
test extra installs those plugins on any machine, for the compilers that they carry. Where a GPU is asked for, it is
told whose: JAX takes ``gpu`` for every maker's, and fails at the first whose plugin is not installed.
"""

import contextlib
import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from lizard_jax.errors import UserError

DEVICES = ("nvidia*", "dxg", "kfd", "accel*", "vfio", "dri")
"""What the kernel of Linux shows under ``/dev`` for GPUs and TPUs."""


def settle_platform(environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> None:
    """Before JAX is imported: sets ``JAX_PLATFORMS=cpu`` where it is unset and this Linux machine has no accelerator,
    and puts the installed plugins' names in place of ``gpu``.
    """
    if "jax" in sys.modules:
        return
    if "JAX_PLATFORMS" in environment:
        asked = environment["JAX_PLATFORMS"].split(",")
        if "gpu" in asked and (makers := _gpu_makers()):
            named = [name for one in asked for name in (makers if one == "gpu" else [one])]
            environment["JAX_PLATFORMS"] = ",".join(named)
    elif sys.platform == "linux" and not _any(devices):
        environment["JAX_PLATFORMS"] = "cpu"


def _gpu_makers() -> list[str]:
    """JAX's names of the GPUs that it has plugins for here, as ``cuda``."""
    plugins = [entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")]
    return [maker for maker in ("cuda", "rocm") if any(name.startswith(f"xla_{maker}") for name in plugins)]


@contextlib.contextmanager
def startable(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Inside, what ``JAX_PLATFORMS`` asks for and JAX cannot start is told in one line, without the logs around it.

    Raises:
        UserError: there is no such platform on this machine, or its plugin fails.
    """
    reasons: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR or "JAX_PLATFORMS" not in environment:
            return True
        reasons.append(str(record.exc_info[1] if record.exc_info else record.getMessage()))
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        platforms, frames = environment.get("JAX_PLATFORMS"), traceback.extract_tb(error.__traceback__)
        if not platforms or not frames[-1].filename.endswith("xla_bridge.py"):
            raise
        reason = (reasons or [str(error)])[0].strip().partition("\n")[0]
        raise UserError(
            f"JAX_PLATFORMS={platforms}: no such device on this machine ({reason}); without a device, JAX_PLATFORMS=cpu"
        ) from None
    finally:
        logger.removeFilter(keep)


def keep_compiled(environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> None:
    """Has JAX keep what it compiles for an accelerator, below ``$XDG_CACHE_HOME`` or ``~/.cache``: an 8B model's step
    takes minutes. ``JAX_COMPILATION_CACHE_DIR`` names another place, ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps none.

    Programs for a CPU are not kept: they may not run on another CPU that sees the same home.
    """
    if sys.platform != "linux" or "jax" in sys.modules or environment.get("JAX_PLATFORMS") == "cpu":
        return
    if "JAX_COMPILATION_CACHE_DIR" not in environment and _any(devices):
        home = environment.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        environment["JAX_COMPILATION_CACHE_DIR"] = str(Path(home) / "lizard-jax" / "compiled")


def _any(devices: Path) -> bool:
    return any(any(devices.glob(pattern)) for pattern in DEVICES)
