"""One trace for all modules of a kind: the layers of a model are alike, and what JAX does before it compiles is done
once.

Inside ``scope`` a ``shared`` method runs as a function of its own in the traced program, once for every kind of module
and shapes of arguments. Compilers put such functions in place of their calls, so the program that runs is the same.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate

import jax
from flax import nnx

_run: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar("shared_trace", default=None)


def _called(state: nnx.State, args: Any, kwargs: Any, *, method: Callable[..., Any], graph: Any) -> Any:
    return method(nnx.merge(graph, state), *args, **kwargs)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Share traces inside; also a decorator, ``@scope()``, of functions that are jitted.

    For what is traced as a whole: outside of jit every scope would compile anew. What a method reads beside its module
    and arguments (the mesh that kernels are split over, a chip to compile for) must not change inside.
    """
    if _run.get() is not None:
        yield
        return

    # A function of this scope alone: JAX keeps what it traced by the function, and elsewhere the mesh is another.
    own = jax.jit(lambda *args, **kinds: _called(*args, **kinds), static_argnames=("method", "graph"))
    token = _run.set(own)
    try:
        yield
    finally:
        _run.reset(token)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Trace every module for itself inside, whatever scopes there are: what sharing is compared with."""
    token = _run.set(_called)
    try:
        yield
    finally:
        _run.reset(token)


def shared[M: nnx.Module, **P, R](method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """A method of arrays (or pytrees of them) alone, which changes nothing of its module."""

    @functools.wraps(method)
    def call(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        run = _run.get()
        if run is None:
            return method(self, *args, **kwargs)
        graph, state = nnx.split(self)
        return run(state, args, kwargs, method=method, graph=graph)

    return call
