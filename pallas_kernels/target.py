"""What the kernels are built for: the platform of this process, or one that a test or a compile gate stands in for."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

GPUS = ("sm_80", "sm_90", "sm_100", "sm_103")
"""Whose shared memory the GPU kernels' tiles are sized for; others of their generations have less."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a kernel is to run.

    Attributes:
        platform: ``cpu``, ``gpu`` or ``tpu``.
        chip: ``sm_80``, ``sm_90``, …; ``v5e``, ``v5p``, ``v6e``, …; None where it is not known.
        interpret: kernels run in their interpreters, slowly, whatever the platform of this process.
        processors: multiprocessors of a GPU; None for as many as the chip is usually sold with.
    """

    platform: str
    chip: str | None = None
    interpret: bool = False
    processors: int | None = None


def unfit_gpu(device: Target) -> str | None:
    """Why the GPU kernels' tiles do not fit a chip, in one line; None where they do, or where it is not known."""
    if device.interpret or device.platform != "gpu" or device.chip is None or device.chip in GPUS:
        return None
    return f"its tiles are for {', '.join(GPUS)}; this is {device.chip}"


_override: contextvars.ContextVar[Target | None] = contextvars.ContextVar("kernel_target", default=None)


def current() -> Target:
    """The target that a kernel traced now is built for."""
    chosen = _override.get()
    if chosen is not None:
        return chosen
    platform = jax.default_backend()
    device = jax.local_devices()[0]
    if platform == "gpu":
        capability = str(getattr(device, "compute_capability", "") or "").replace(".", "")
        chip = f"sm_{capability}" if capability else None
        return Target("gpu", chip, processors=getattr(device, "core_count", None))
    if platform == "tpu":
        return Target("tpu", tpu_chip(device.device_kind))
    return Target(platform)


@contextlib.contextmanager
def override(target: Target) -> Iterator[None]:
    """Build for another target what is traced inside; jit does not see the difference, so trace a function anew."""
    token = _override.set(target)
    try:
        yield
    finally:
        _override.reset(token)


def tpu_chip(kind: str) -> str | None:
    """``v5e`` of a device kind such as ``TPU v5 lite``."""
    known = {
        "v5 lite": "v5e",
        "v5e": "v5e",
        "v5p": "v5p",
        "v5": "v5p",
        "v6 lite": "v6e",
        "v6e": "v6e",
        "v4": "v4",
        "7x": "tpu7x",
    }
    return next((chip for name, chip in known.items() if name in kind.lower()), None)
