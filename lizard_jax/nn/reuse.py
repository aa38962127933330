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
from jax.core import Tracer

_run: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar("shared_trace", default=None)


@contextlib.contextmanager
def scope(*arrays: Any) -> Iterator[None]:
    """Share traces inside, where these arrays are traced; one computation after the other would compile anew each time.

    What a method reads beside its module and arguments (the mesh that kernels are split over, a chip to compile for)
    must not change inside.
    """
    if _run.get() is not None or not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arrays)):
        yield
        return

    def run(state: nnx.State, args: Any, kwargs: Any, *, method: Callable[..., Any], graph: Any) -> Any:
        return method(nnx.merge(graph, state), *args, **kwargs)

    token = _run.set(jax.jit(run, static_argnames=("method", "graph")))
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
