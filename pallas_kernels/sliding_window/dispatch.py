"""Which implementation computes a problem: the one named, or the best that fits the platform and the shape."""

from __future__ import annotations

import importlib

from pallas_kernels import target
from pallas_kernels.sliding_window.problem import Implementation, Problem

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "triton", "pallas_gpu")
KERNELS = {"tpu": ("pallas_tpu",), "gpu": ("triton", "pallas_gpu")}

FEWEST_QUERIES = 16
"""Kernels work in tiles of queries; for a step of generation XLA's fusion of a matrix-vector product is as good."""


def load(name: str) -> Implementation:
    """An implementation by name; its module is imported now, for kernels' toolchains are slow to import."""
    return importlib.import_module(f"pallas_kernels.sliding_window.{name}").IMPLEMENTATION


def choose(problem: Problem, name: str | None) -> Implementation:
    """The named implementation, or the first kernel of this platform that fits, or ``xla``.

    Raises:
        ValueError: an unknown name, or an implementation that cannot compute this problem here.
    """
    place = target.current()
    if name is None:
        for kernel in KERNELS.get(place.platform, ()) if problem.T >= FEWEST_QUERIES else ():
            chosen = load(kernel)
            if chosen.cannot_run(problem, place) is None:
                return chosen
        return load("xla")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r} of sliding_window; choose from {', '.join(IMPLEMENTATIONS)}")
    chosen = load(name)
    reason = chosen.cannot_run(problem, place)
    if reason is not None:
        raise ValueError(f"sliding_window cannot run {name}: {reason}")
    return chosen
