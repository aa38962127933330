"""Where no accelerator is, JAX is told so: its plugins for them, if installed, complain at length when they find none.

The test extra installs those plugins on any machine, for the compilers that they carry.
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
    if not any(any(devices.glob(pattern)) for pattern in DEVICES):
        environment["JAX_PLATFORMS"] = "cpu"
