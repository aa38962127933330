"""Axis letters and dtypes of signatures, checked at every call; what else an annotation says is for pyright.

jaxtyping's hook wraps every function of the packages that ``tests/__init__.py`` names. Within one call a letter is one
size.
"""

import builtins
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxtyping
from jaxtyping import AbstractArray

ROOT = Path(__file__).resolve().parents[1]

# The packages import these for type checkers alone; the hook looks annotations up where functions are defined.
for _name in ("Bool", "Float", "Int", "Key", "Num", "Shaped"):
    setattr(builtins, _name, getattr(jaxtyping, _name))
builtins.Array = jax.Array  # pyright: ignore[reportAttributeAccessIssue]


def watch(*packages: str) -> None:
    """Have what is imported from these packages from now on checked; not kernels in Triton, for it reads their text."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    files = [path for name in packages for path in (ROOT / name).rglob("*.py") if path.parent.name != "triton"]
    # A package's name would stand for all below it.
    files = [path for path in files if path.name != "__init__.py" or not any(path.parent.rglob("triton"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    jaxtyping.install_import_hook(names, "tests.axes.check")


def check(function: Callable) -> Callable:
    """``function``, with its arguments and its result held to the arrays that its annotations ask for."""
    signature = inspect.signature(function)
    result = signature.return_annotation
    # Of the two that the hook makes of a function, the one called when it has returned: it may have refused by itself.
    # What dataclasses hold is vmapped and stacked as pytrees are.
    if result in (Any, signature.empty) or function.__name__ == "__init__":
        return function
    asked = {name: p.annotation for name, p in signature.parameters.items() if _arrays(p.annotation)}
    asked = dict(sorted(asked.items(), key=lambda one: any(sign in str(one[1]) for sign in "+-*/")))  # letters first
    if not asked and not _arrays(result):
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        out = function(*args, **kwargs)
        for name, hint, value in [
            *((name, hint, bound.get(name)) for name, hint in asked.items()),
            ("the result", result, out),
        ]:
            if not _fits(value, hint):
                raise TypeError(f"{name} is {_told(value)}, not {hint}")
        return out

    return checked


def _arrays(hint: Any) -> bool:
    """Arrays are named in an annotation that can be checked."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return any(_arrays(part) for part in typing.get_args(hint))
    return False


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        try:
            return not isinstance(value, jax.Array) or isinstance(value, hint)
        except jaxtyping.AnnotationError:  # a sum of letters that nothing has given a size yet
            return True
    parts = typing.get_args(hint)
    if not _arrays(hint):
        return True
    if typing.get_origin(hint) is not tuple:
        options = [part for part in parts if _arrays(part)]
        return not isinstance(value, jax.Array) or any(_fits(value, part) for part in options)
    if not isinstance(value, tuple) or Ellipsis in parts:
        return True
    return len(value) == len(parts) and all(_fits(one, part) for one, part in zip(value, parts, strict=True))


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_told, value))})"
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
