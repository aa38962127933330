"""The one measure of an implementation of ``sliding_window``: its distance from the dense definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.sliding_window import sliding_window
from tests.kernels import parity


def implementations() -> list[str]:
    """What can be measured here."""
    return [name for name in parity.implementations() if name in IMPLEMENTATIONS]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one case; ``learned`` and ``prefix`` count meta tokens, ``own_prefix`` gives each query its own."""

    B: int
    T: int
    N: int
    K: int
    H: int
    W: int
    rope: bool = True
    sink: bool = True
    learned: int = 0
    prefix: int = 0
    own_prefix: bool = False


def segments(rng: np.random.Generator, kind: str, s: Shape) -> np.ndarray:
    """Documents of the past and of the queries, ``[B, W+T]``."""
    length = s.W + s.T
    if kind == "padding":
        return np.zeros((s.B, length), np.int32)
    if kind == "start":
        return np.broadcast_to(np.arange(length) >= s.W, (s.B, length)).astype(np.int32)
    ids = np.sort(rng.integers(1, 5, (s.B, length)), axis=1)
    if kind == "packed":
        ids[rng.random(ids.shape) < 0.1] = 0
        ids[:, length - rng.integers(0, 1 + s.T // 4) :] = 0
    return ids.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Draw:
    """What kind of values; ``scale`` is that of queries and sinks."""

    seed: int
    segment: str
    scale: float


def draw(rng: np.random.Generator) -> Draw:
    """A kind of values at random."""
    return Draw(
        seed=int(rng.integers(10**6)),
        segment=str(rng.choice(["one", "packed", "packed", "start", "padding"])),
        scale=float(rng.choice([0.3, 1.0, 3.0])),
    )


def inputs(s: Shape, values: Draw):
    """``(what gradients are taken of, the rest, weights of the scalar)`` in float64.

    Positions count from somewhere in a document.
    """
    rng, scale = np.random.default_rng(values.seed), values.scale
    arrays = {
        "q": scale * rng.normal(size=(s.B, s.T, s.N, s.H)),
        "k": rng.normal(size=(s.B, s.W + s.T, s.K, s.H)),
        "v": rng.normal(size=(s.B, s.W + s.T, s.K, s.H)),
    }
    if s.sink:
        arrays["sink"] = scale * rng.normal(size=s.N)
    if s.learned:
        arrays |= {f"learned_{x}": rng.normal(size=(s.learned, s.K, s.H)) for x in "kv"}
    if s.prefix:
        shape = (s.B, s.T if s.own_prefix else 1, s.prefix, s.K, s.H)
        arrays |= {f"prefix_{x}": rng.normal(size=shape) for x in "kv"}
    ids = segments(rng, values.segment, s)
    rest = {
        "q_segments": ids[:, s.W :],
        "k_segments": ids,
        "positions": np.arange(s.T) + rng.integers(0, s.W + s.prefix + 1, (s.B, 1)),
        "rope_frequencies": 10000.0 ** (-np.arange(s.H // 2) / (s.H // 2)) if s.rope else None,
    }
    # A random sign would let the sum over queries that is a sink's gradient cancel.
    weights = rng.normal(size=(s.B, s.T, s.N, s.H)), np.abs(rng.normal(size=(s.B, s.T, s.N)))
    return arrays, rest, weights


@functools.cache
def measured(implementation: str, window: int):
    """Jitted: output, normalizer, and the gradient of a random scalar of both."""

    def scalar(arrays, rest, weights):
        y, n = sliding_window(**arrays, **rest, window=window, implementation=implementation)
        told = jnp.sum(y.astype(n.dtype) * weights[0]) + jnp.sum(jnp.where(n > -1e29, n, 0.0) * weights[1])
        return told, {"y": y, "n": n}

    return jax.jit(jax.value_and_grad(scalar, has_aux=True))


def run(implementation: str, s: Shape, arrays, rest, weights) -> dict[str, np.ndarray]:
    with parity.scope(implementation):
        (_, out), grads = measured(implementation, s.W)(arrays, rest, weights)
    out = out | {f"d{name}": x for name, x in grads.items()}
    return parity.widened(out)


def errors(implementation: str, s: Shape, values: Draw, dtype: str) -> dict[str, float]:
    """Relative RMS error of output, normalizer and gradients; inf where one is not finite."""
    wide = "float64" if dtype == "float64" else "float32"
    arrays, rest, weights = inputs(s, values)
    with jax.enable_x64(True):
        narrow = {x: dtype if x in ("q", "k", "v", "prefix_k", "prefix_v") else wide for x in arrays}
        rounded = {name: x.astype(jnp.dtype(narrow[name])) for name, x in arrays.items()}
        if s.rope:
            rest["rope_frequencies"] = rest["rope_frequencies"].astype("float32")
        weights = weights[0].astype(jnp.dtype(dtype)).astype(wide), weights[1].astype(wide)
        exact = {name: x.astype(np.float64) for name, x in rounded.items()}
        expected = run("reference", s, exact, rest, tuple(x.astype(np.float64) for x in weights))
    with jax.enable_x64(dtype == "float64"):
        actual = run(implementation, s, rounded, rest, weights)
    return {name: parity.relative_rms(actual[name], value) for name, value in expected.items()}
