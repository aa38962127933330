"""What JAX is told of this machine before it looks.

Where no accelerator is, it is told so: its plugins for them, if installed, complain at length when they find none. The
test extra installs those plugins on any machine, for the compilers that they carry.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

DEVICES = ("nvidia*", "dxg", "kfd", "accel*", "vfio", "dri")
"""What the kernel of Linux shows under ``/dev`` for GPUs and TPUs."""


def settle_platform(environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> None:
    """Sets ``JAX_PLATFORMS=cpu`` where it is unset, JAX not yet imported, and this Linux machine has no accelerator."""
    if sys.platform != "linux" or "JAX_PLATFORMS" in environment or "jax" in sys.modules:
        return
    if not _any(devices):
        environment["JAX_PLATFORMS"] = "cpu"


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
