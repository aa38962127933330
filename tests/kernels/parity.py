"""The one measure of an implementation: its distance from the recurrence in float64, fed the same rounded inputs."""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import target
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.log_gate_attention import LinearState, log_gate_attention, mapped_log_gate_attention
from pallas_kernels.target import Target

TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-3}
EMPTY = -1e30
LEAST = float(np.finfo(np.float32).tiny) / TOLERANCE["float32"]
"""Where a result is smaller, fp32 has no numbers for the parts of it that the tolerance asks for."""
# Where each kernel is interpreted when the machine at hand is not one it runs on.
STAND_INS = {"pallas_tpu": Target("tpu", "v5e", True), "pallas_gpu": Target("gpu", "sm_90", True)}
STAND_INS["triton"] = Target("gpu", "sm_90", True, processors=16)  # a small card, which some of the shapes fill


def implementations() -> list[str]:
    """What can be measured here: on a CPU everything, kernels by interpreters; on a GPU or TPU what runs there."""
    platform = jax.default_backend()
    names = [name for name in IMPLEMENTATIONS if platform == "cpu" or name not in STAND_INS]
    if platform != "cpu":
        names += [name for name, place in STAND_INS.items() if place.platform == platform]
    toolchain = all(importlib.util.find_spec(module) for module in ("triton", "jax_triton"))
    return [name for name in names if name != "triton" or toolchain]


@contextlib.contextmanager
def scope(implementation: str) -> Iterator[None]:
    """Traced inside, a named implementation runs: on its hardware, or else in its interpreter."""
    place = STAND_INS.get(implementation)
    if place is None or place.platform == jax.default_backend():
        yield
    else:
        with target.override(place):
            yield


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one case; ``X`` and ``act`` ask for the feature map inside."""

    B: int
    T: int
    N: int
    K: int
    S: int
    F: int
    H: int
    chunk: int = 64
    vector: bool = False
    normalize: bool = True
    act: str | None = None
    X: int = 0


def gates(rng: np.random.Generator, kind: str, shape) -> np.ndarray:
    """Log gates: all forgetting, all keeping, or every size between beside one another and borders among them."""
    forget, keep = np.log(1e-30), np.log1p(-1e-7)
    if kind == "forget":
        return np.full(shape, forget)
    if kind == "keep":
        return np.full(shape, keep)
    between = np.log(np.clip(rng.random(shape), 1e-30, 1 - 1e-7))
    spread = -(10.0 ** rng.uniform(-7, 1.8, shape))
    kinds = [rng.random(shape) < p for p in (0.01, 0.1, 0.4, 0.6)]
    return np.select(kinds, [np.full(shape, EMPTY), forget, keep, between], spread)


def segments(rng: np.random.Generator, kind: str, B: int, T: int) -> np.ndarray:
    if kind == "one":
        return np.ones((B, T), np.int32)
    if kind == "padding":
        return np.zeros((B, T), np.int32)
    ids = 1 + np.cumsum(rng.random((B, T)) < 4 / T, 1) % 3
    ids[rng.random((B, T)) < 0.1] = 0
    ids[:, : rng.integers(0, 1 + T // 4)] = 0
    return ids.astype(np.int32)


def features(rng: np.random.Generator, kind: str, shape) -> np.ndarray:
    if kind == "positive":
        return np.abs(rng.normal(size=shape))
    scores = 4 * rng.normal(size=shape)
    return np.exp(scores - scores.max(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Draw:
    """What kind of values; the values themselves follow from ``seed``."""

    seed: int
    gate: str
    segment: str
    feature: str
    scale: float
    absent: float
    memory: bool

    def inputs(self, s: Shape):
        """``((q, k, v, g, c, state, maps), segment ids)`` in float64."""
        rng = np.random.default_rng(self.seed)
        if s.act is None:
            q, k = (features(rng, self.feature, (s.B, s.T, heads, s.F)) for heads in (s.N, s.S))
            maps = ()
        else:
            q, k = (rng.normal(size=(s.B, s.T, heads, s.X)) for heads in (s.N, s.K))
            maps = tuple(rng.normal(size=(heads, s.X, s.F // 2)) * 2 / s.X**0.5 for heads in (s.N, s.S))
        v = rng.normal(size=(s.B, s.T, s.K, s.H))
        g = gates(rng, self.gate, (s.B, s.T, s.S, s.F) if s.vector else (s.B, s.T, s.S))
        # Without the division the output itself is of size e^c.
        c = (self.scale if s.normalize else min(self.scale, 3.0)) * rng.uniform(-1, 1, (s.B, s.T, s.S))
        c = np.where(rng.random(c.shape) < self.absent, EMPTY, c)
        return (q, k, v, g, c, self.state(rng, s), maps), segments(rng, self.segment, s.B, s.T)

    def state(self, rng: np.random.Generator, s: Shape) -> LinearState:
        """The memory of a few tokens, so that what is read from it lies among their values; or an empty one."""
        tokens = int(rng.integers(1, 20)) * self.memory
        k = features(rng, self.feature, (s.B, tokens, s.S, s.F))
        v = np.repeat(rng.normal(size=(s.B, tokens, s.K, s.H)), s.S // s.K, axis=2)
        scales = (s.B, s.S, s.F) if s.vector else (s.B, s.S)
        m = rng.uniform(-3, 3, scales) if self.memory else np.full(scales, EMPTY)
        return LinearState(np.einsum("btsf,btsh->bsfh", k, v), k.sum(1), m)

    def weights(self, s: Shape):
        """Of the random scalar whose gradient is taken: output, normalizer, and the final state's two parts."""
        rng = np.random.default_rng(self.seed + 1)
        shapes = [(s.B, s.T, s.N, s.H), (s.B, s.T, s.N), (s.B, s.S, s.F, s.H), (s.B, s.S, s.F)]
        return tuple(rng.normal(size=shape) for shape in shapes)


def draw(rng: np.random.Generator) -> Draw:
    """A kind of values at random."""
    return Draw(
        seed=int(rng.integers(10**6)),
        gate=str(rng.choice(["mixed", "mixed", "forget", "keep"])),
        segment=str(rng.choice(["packed", "packed", "one", "padding"])),
        feature=str(rng.choice(["positive", "exp"])),
        scale=float(rng.choice([0.0, 3.0, 80.0])),
        absent=float(rng.choice([0.0, 0.3, 1.0])),
        memory=bool(rng.integers(2)),
    )


@functools.cache
def _measured(implementation: str, normalize: bool, chunk: int, act: str | None):
    """Jitted: everything the op returns and the gradient of a random scalar of it.

    A state's own scale is free, so it enters the scalar at a scale from outside, given as a sum of two numbers; or
    at its own (None).
    """

    def scalar(inputs, segment_ids, weights, scale):
        q, k, v, g, c, state, maps = inputs
        options = {
            "k_log_scale": c, "initial_state": state, "segment_ids": segment_ids, "return_log_normalizer": True,
            "return_final_state": True, "chunk": chunk, "implementation": implementation,
        }  # fmt: skip
        if act is None:
            y, n, final = log_gate_attention(q, k, v, g, normalize=normalize, **options)
        else:
            y, n, final = mapped_log_gate_attention(q, k, v, g, q_map=maps[0], k_map=maps[1], act=act, **options)
        held, beyond = (final.m, 0.0) if scale is None else scale
        factor = jnp.where(held > -1e29, jnp.exp((final.m - held) - beyond), 0.0)
        factor = jax.lax.stop_gradient(factor).reshape(*final.m.shape[:2], -1)
        told = (y.astype(n.dtype), jnp.where(n > -1e29, n, 0.0), final.kv * factor[..., None], final.z * factor)
        return sum(jnp.sum(x * w) for x, w in zip(told, weights, strict=True)), (y, n, final)

    return jax.jit(jax.value_and_grad(scalar, has_aux=True))


def _cast(inputs, dtype: str, wide: str):
    """Heads and maps in one dtype, gates, scales and memory in the accumulators'; numpy, which compiles nothing."""
    q, k, v, g, c, state, maps = inputs
    narrow = [x.astype(jnp.dtype(dtype)) for x in (q, k, v)]
    state = LinearState(*(x.astype(wide) for x in (state.kv, state.z, state.m)))
    return (*narrow, g.astype(wide), c.astype(wide), state, tuple(x.astype(jnp.dtype(dtype)) for x in maps))


def _run(implementation: str, s: Shape, inputs, segment_ids, weights, scale):
    measured = _measured(implementation, s.normalize, s.chunk, s.act)
    with scope(implementation):
        (_, (y, n, final)), grads = measured(inputs, segment_ids, weights, scale)
    *grads, dstate, dmaps = grads
    out = {"y": y, "n": n, "kv": final.kv, "z": final.z, "m": final.m}
    out |= dict(zip(("dq", "dk", "dv", "dg", "dc"), grads, strict=True)) | {"dkv0": dstate.kv, "dz0": dstate.z}
    out |= dict(zip(("dq_map", "dk_map"), dmaps, strict=False))
    return widened(out)


def widened(out: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Results in numpy, what is narrower than float32 in float32."""
    arrays = {name: np.asarray(x) for name, x in out.items()}
    return {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}


def relative_rms(actual: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the error over that of what was expected; inf where a value is not finite."""
    # -1e30 marks "nothing there": it must be met exactly, and would drown every other value.
    empty = expected <= -1e29
    if not np.isfinite(actual).all() or (actual[empty] != np.asarray(EMPTY, actual.dtype)).any():
        return float("inf")
    actual, expected = (np.where(empty, 0.0, x.astype(np.float64)) for x in (actual, expected))
    error, size = (np.sqrt(np.mean(x**2)) for x in (actual - expected, expected))
    return float(error / size) if size > LEAST else float(error)


def errors(implementation: str, s: Shape, values: Draw, dtype: str) -> dict[str, float]:
    """Relative RMS error of every result and gradient; inf where one is not finite."""
    inputs, segment_ids = values.inputs(s)
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(True):
        rounded = _cast(inputs, dtype, wide)
        weights = tuple(x.astype(jnp.dtype(dtype)).astype(wide) for x in values.weights(s))
        exact = jax.tree.map(lambda x: x.astype(np.float64), rounded)
        wide_weights = tuple(w.astype(np.float64) for w in weights)
        expected = _run("reference", s, exact, segment_ids, wide_weights, None)
    scale = expected.pop("m")
    with jax.enable_x64(dtype == "float64"):
        parts = scale.astype(wide), (scale - scale.astype(wide)).astype(wide)
        actual = _run(implementation, s, rounded, segment_ids, weights, parts)
    with np.errstate(over="ignore"):
        factor = np.where(scale > -1e29, np.exp(actual.pop("m").astype(np.float64) - scale), 0.0)
    factor = factor.reshape(*scale.shape[:2], -1)
    actual["kv"], actual["z"] = actual["kv"] * factor[..., None], actual["z"] * factor
    return {name: relative_rms(actual[name], value) for name, value in expected.items()}
