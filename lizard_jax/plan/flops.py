"""FLOPs of a function's matmuls, counted in what JAX traces: exact, and the same for every chip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Two for each multiply-add of every ``dot_general``, a loop's as often as it runs.

    Args:
        function: traced as it is, on one device; a recomputation counts. What a kernel does is not seen, so trace for
            a target without kernels.
        arguments: arrays or shapes.

    Raises:
        ValueError: a matmul stands in a loop whose length the trace does not know.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif name == "scan":
            total += equation.params["length"] * _of(equation.params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_of(branch.jaxpr) for branch in equation.params["branches"])
        elif name == "while":
            if any(map(_of, _inside(equation))):
                raise ValueError("matmul_flops: a matmul in a loop of no fixed length cannot be counted")
        else:
            total += sum(_of(getattr(inner, "jaxpr", inner)) for inner in _inside(equation))
    return total


def _inside(equation: Any) -> list[Any]:
    """The functions that an operation calls, each once."""
    values = [*equation.params.values()]
    flat = [inner for value in values for inner in (value if isinstance(value, tuple | list) else [value])]
    return [inner for inner in flat if hasattr(inner, "eqns") or hasattr(getattr(inner, "jaxpr", None), "eqns")]
