"""Which implementation computes a problem: the one named, or the best that fits the platform and the shape."""

from __future__ import annotations

import importlib
from typing import Any, Literal, Protocol

from pallas_kernels import target

Op = Literal["log_gate_attention", "sliding_window"]

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "triton", "pallas_gpu")
KERNELS = {"tpu": ("pallas_tpu",), "gpu": ("triton", "pallas_gpu")}


class Problem(Protocol):
    """Of either op."""

    @property
    def kernels_pay(self) -> bool:
        """There is enough to do for a kernel to be chosen unasked."""
        ...


def load(op: Op, name: str) -> Any:
    """An op's implementation by name; its module is imported now, for kernels' toolchains are slow to import."""
    return importlib.import_module(f"pallas_kernels.{op}.{name}").IMPLEMENTATION


def choose(op: Op, problem: Problem, name: str | None) -> Any:
    """The named implementation of an op, or the first kernel of this platform that fits, or ``xla``.

    Raises:
        ValueError: an unknown name, or an implementation that cannot compute this problem here.
    """
    device = target.current()
    if name is None:
        for kernel in KERNELS.get(device.platform, ()) if problem.kernels_pay else ():
            chosen = load(op, kernel)
            if chosen.cannot_run(problem, device) is None:
                return chosen
        return load(op, "xla")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r} of {op}; choose from {', '.join(IMPLEMENTATIONS)}")
    chosen = load(op, name)
    reason = chosen.cannot_run(problem, device)
    if reason is not None:
        raise ValueError(f"{op} cannot run {name}: {reason}")
    return chosen
