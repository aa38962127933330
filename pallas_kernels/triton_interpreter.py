"""Triton's own interpreter, run on NumPy arrays, for kernels that the same process also compiles.

``triton.jit`` decides once, by an environment variable, whether functions are compiled or interpreted, and for Triton's
standard library (``tl.sum``, ``tl.max``, …) when Triton is imported. Here a compiled function gets an interpreted twin:
the same code over a copy of its module's names in which every other such function is replaced by its own twin.

While it runs, ``triton.language`` is the interpreter's for the whole process: no other thread can compile a kernel.
Reductions are called as ``tl.sum(x)``; Triton's interpreter does not know the methods ``x.sum()``.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_lock = threading.RLock()  # the interpreter replaces parts of triton.language while it runs
_twins: dict[int, interpreter.InterpretedFunction] = {}
_scopes: dict[int, dict[str, Any]] = {}
_ELEMENTS = {
    kind: getattr(tl, kind) for kind in ("bfloat16", "float16", "float32", "float64", "int32", "int64", "uint32")
}


def _argument(value: np.ndarray | bool | int | float) -> tl.tensor:
    """A kernel's argument as the interpreter wants it: a pointer to an array's first element, or a scalar."""
    if isinstance(value, np.ndarray):
        kind = tl.pointer_type(_ELEMENTS[value.dtype.name])
        return tl.tensor(interpreter.TensorHandle(np.array([value.ctypes.data], np.uint64), kind), kind)
    kind = {bool: tl.int1, int: tl.int32, float: tl.float32}[type(value)]
    return tl.tensor(interpreter.TensorHandle(np.array([value], interpreter._get_np_dtype(kind)), kind), kind)


def _twin(function: JITFunction) -> interpreter.InterpretedFunction:
    if id(function) not in _twins:
        original = function.fn
        names = _scope(original.__globals__)
        copy = types.FunctionType(
            original.__code__, names, original.__name__, original.__defaults__, original.__closure__
        )
        copy.__annotations__, copy.__module__ = original.__annotations__, original.__module__
        _twins[id(function)] = interpreter.InterpretedFunction(copy)
    return _twins[id(function)]


def _scope(names: dict[str, Any]) -> dict[str, Any]:
    if id(names) not in _scopes:
        copy = _scopes[id(names)] = dict(names)
        for name, value in names.items():
            if isinstance(value, JITFunction):
                copy[name] = _twin(value)
    return _scopes[id(names)]


def _round(builder, source: interpreter.TensorHandle, kind) -> interpreter.TensorHandle:
    """A cast between floats, rounded to nearest as on hardware; the interpreter's own truncates to bf16."""
    data = source.data.view(ml_dtypes.bfloat16) if source.dtype.scalar == tl.bfloat16 else source.data
    if kind.scalar == tl.bfloat16:
        return interpreter.TensorHandle(data.astype(ml_dtypes.bfloat16).view(np.uint16), kind.scalar)
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(kind)), kind.scalar)


def _dot(builder, a, b, total, input_precision, max_num_imprecise_acc) -> interpreter.TensorHandle:
    """A product of matrices, summed in the accumulator's type; the interpreter's own takes bf16 for integers."""
    wide = total.data.dtype
    left, right = (
        (x.data.view(ml_dtypes.bfloat16) if x.dtype.scalar == tl.bfloat16 else x.data).astype(wide) for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(left, right) + total.data, total.dtype.scalar)


def _scan(scan: interpreter.ScanOps, inputs: Sequence[tl.tensor]) -> list[tl.tensor]:
    """A scan slice by slice; the interpreter's own goes number by number."""
    kinds = [x.dtype for x in inputs]
    slices = list(zip(*(np.moveaxis(x.handle.data, scan.axis, 0) for x in inputs), strict=True))
    done = slices[:1]
    for here in slices[1:]:
        before = [scan.to_tensor(x, kind) for x, kind in zip((*done[-1], *here), (*kinds, *kinds), strict=True)]
        combined = scan.combine_fn.fn(*before)
        combined = combined if isinstance(combined, (tuple, tl.tuple)) else (combined,)
        done.append(tuple(x.handle.data.reshape(y.shape) for x, y in zip(combined, here, strict=True)))
    return [
        scan.to_tensor(np.stack(column, scan.axis), kind)
        for column, kind in zip(zip(*done, strict=True), kinds, strict=True)
    ]


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    """Triton's language as the interpreter needs it, put back afterwards."""
    # Twins of the standard library patch both modules and leave them so; this scope, opened first, restores both.
    seen = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    changes = interpreter._patch_lang(seen)
    builder = interpreter.interpreter_builder
    try:
        for module in (tl.standard, tl):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    changes.set_attr(module, name, _twin(value))
        # On the class, which the scope can put back by name.
        for name, method in (("create_fp_trunc", _round), ("create_fp_ext", _round), ("create_dot", _dot)):
            changes.set_attr(type(builder), name, method)
        changes.set_attr(interpreter.ScanOps, "generic_scan", _scan)
        # The interpreter's own looks through the language for what to patch, at every call of every function.
        changes.set_attr(
            interpreter.InterpretedFunction, "__call__", lambda self, *args, **kw: self.rewrite()(*args, **kw)
        )
        yield
    finally:
        changes.restore()


def run(
    kernel: JITFunction, arrays: Sequence[np.ndarray], grid: tuple[int, int, int], parameters: Mapping[str, Any]
) -> None:
    """Run every program of ``grid`` in turn; the kernel reads and writes ``arrays``, its first parameters, in place."""
    given = dict(zip(kernel.arg_names, arrays, strict=False)) | dict(parameters)
    constants = {kernel.arg_names[i] for i in kernel.constexprs}
    with _lock, _interpreting(), np.errstate(all="ignore"):
        function = _twin(kernel).rewrite()
        arguments = {name: value if name in constants else _argument(value) for name, value in given.items()}
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for place in np.ndindex(*grid):
            interpreter.interpreter_builder.set_grid_idx(*place)
            function(**arguments)
