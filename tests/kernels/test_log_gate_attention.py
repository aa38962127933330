"""Every implementation of ``log_gate_attention`` against the recurrence in float64, fed the same rounded inputs."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.log_gate_attention import LinearState, empty_state, log_gate_attention, log_gate_step
from pallas_kernels.log_gate_attention.api import IMPLEMENTATIONS

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


@dataclasses.dataclass(frozen=True)
class Shape:
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


SHAPES = [
    Shape(1, 1, 2, 1, 1, 16, 16),
    Shape(2, 5, 4, 4, 4, 16, 16, normalize=False),
    Shape(1, 16, 8, 1, 1, 32, 16, chunk=16),
    Shape(1, 65, 4, 2, 4, 16, 16),
    Shape(2, 33, 6, 2, 6, 24, 20, chunk=16, normalize=False),
    Shape(1, 130, 8, 2, 2, 64, 64),
    Shape(1, 300, 4, 2, 2, 16, 32),
    Shape(1, 3, 4, 2, 2, 16, 16, vector=True),
    Shape(1, 40, 4, 2, 4, 16, 16, chunk=32, vector=True),
    Shape(1, 20, 2, 1, 1, 16, 16, vector=True, normalize=False),
]


def gates(rng: np.random.Generator, kind: str, shape) -> np.ndarray:
    """Log gates: all forgetting, all keeping, or every size between beside one another."""
    forget, keep = np.log(1e-30), np.log1p(-1e-7)
    if kind == "forget":
        return np.full(shape, forget)
    if kind == "keep":
        return np.full(shape, keep)
    between = np.log(np.clip(rng.random(shape), 1e-30, 1 - 1e-7))
    spread = -(10.0 ** rng.uniform(-7, 1.8, shape))
    return np.select([rng.random(shape) < p for p in (0.1, 0.4, 0.6)], [forget, keep, between], spread)


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
        rng = np.random.default_rng(self.seed)
        q, k = (features(rng, self.feature, (s.B, s.T, heads, s.F)) for heads in (s.N, s.S))
        v = rng.normal(size=(s.B, s.T, s.K, s.H))
        g = gates(rng, self.gate, (s.B, s.T, s.S, s.F) if s.vector else (s.B, s.T, s.S))
        # Without the division the output itself is of size e^c.
        c = (self.scale if s.normalize else min(self.scale, 3.0)) * rng.uniform(-1, 1, (s.B, s.T, s.S))
        c = np.where(rng.random(c.shape) < self.absent, -1e30, c)
        scales = (s.B, s.S, s.F) if s.vector else (s.B, s.S)
        memory = (
            rng.normal(size=(s.B, s.S, s.F, s.H)) * self.memory,
            rng.random((s.B, s.S, s.F)) * self.memory,
            rng.uniform(-3, 3, scales) if self.memory else np.full(scales, -1e30),
        )
        return (q, k, v, g, c, LinearState(*memory)), segments(rng, self.segment, s.B, s.T)

    def weights(self, s: Shape):
        """Of the random scalar whose gradient is taken: output, normalizer, and the final state's two parts."""
        rng = np.random.default_rng(self.seed + 1)
        shapes = [(s.B, s.T, s.N, s.H), (s.B, s.T, s.N), (s.B, s.S, s.F, s.H), (s.B, s.S, s.F)]
        return tuple(rng.normal(size=shape) for shape in shapes)


draws = st.builds(
    Draw,
    seed=st.integers(0, 10**6),
    gate=st.sampled_from(["mixed", "mixed", "forget", "keep"]),
    segment=st.sampled_from(["packed", "packed", "one", "padding"]),
    feature=st.sampled_from(["positive", "exp"]),
    scale=st.sampled_from([0.0, 3.0, 80.0]),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
    memory=st.booleans(),
)


@functools.cache
def measured(implementation: str, normalize: bool, chunk: int):
    """Jitted: everything the op returns and the gradient of a random scalar of it.

    A state is told at a scale from outside (the oracle's), since its own ``m`` is free to differ.
    """

    def scalar(inputs, segment_ids, weights, scale):
        q, k, v, g, c, state = inputs
        y, n, final = log_gate_attention(
            q, k, v, g, k_log_scale=c, initial_state=state, segment_ids=segment_ids, normalize=normalize,
            return_log_normalizer=True, return_final_state=True, chunk=chunk, implementation=implementation,
        )  # fmt: skip
        kv, z, m = (x.astype(jnp.float64) for x in (final.kv, final.z, final.m))
        factor = jax.lax.stop_gradient(jnp.exp(m - (m if scale is None else scale))).reshape(*m.shape[:2], -1)
        out = {"y": y, "n": n, "kv": kv * factor[..., None], "z": z * factor}
        told = (jnp.where(x > -1e29, x, 0).astype(jnp.float64) for x in out.values())
        return sum(jnp.sum(x * w) for x, w in zip(told, weights, strict=True)), (out, m)

    return jax.jit(jax.value_and_grad(scalar, has_aux=True))


def run(implementation, s: Shape, inputs, segment_ids, weights, scale=None):
    (_, (out, m)), grads = measured(implementation, s.normalize, s.chunk)(inputs, segment_ids, weights, scale)
    *grads, state = grads
    names = ("dq", "dk", "dv", "dg", "dc")
    return out | dict(zip(names, grads, strict=True)) | {f"d{x}0": getattr(state, x) for x in ("kv", "z", "m")}, m


def relative_rms(actual, expected, size=None) -> float:
    # -1e30 marks "nothing there": it must be met exactly, and would drown every other value.
    empty = np.asarray(expected) <= -1e29
    np.testing.assert_array_equal(np.asarray(actual)[empty], np.asarray(-1e30, np.asarray(actual).dtype))
    actual, expected = (np.where(empty, 0.0, np.asarray(x, np.float64)) for x in (actual, expected))
    rms = [np.sqrt(np.mean(x**2)) for x in (actual - expected, expected)]
    size = rms[1] if size is None else size
    return float(rms[0] / size) if size > 1e-35 else float(rms[0])


def assert_agrees(actual: dict, expected: dict, tolerance: float, state: LinearState, scale) -> None:
    for name, value in actual.items():
        assert np.isfinite(value).all(), f"{name} is not finite"
    # The gradient in m sums over a whole state: its error is measured by the terms, which may cancel.
    terms = np.sum(np.abs(state.kv * expected["dkv0"]), -1) + np.abs(state.z * expected["dz0"])
    terms = terms if state.m.ndim == 3 else np.sum(terms, -1)
    errors = {
        name: relative_rms(actual[name], value, np.mean(terms) if name == "dm0" else None)
        for name, value in expected.items()
    }
    # What is left of a memory after forgetting by e^-1000 is known to eps·1000 of itself, for its logarithm is.
    decayed = np.max(np.where(scale > -1e29, np.abs(scale), 0.0))
    wrong = {name: error for name, error in errors.items() if not error <= tolerance * max(1.0, decayed / 50)}
    assert not wrong


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def compare(implementation: str, s: Shape, draw: Draw, dtype: str) -> None:
    with jax.enable_x64(True):
        inputs, segment_ids = draw.inputs(s)
        rounded, weights = cast(inputs, dtype), cast(cast(draw.weights(s), dtype), "float64")
        expected, scale = run("reference", s, cast(rounded, "float64"), segment_ids, weights)
        actual, _ = run(implementation, s, rounded, segment_ids, weights, scale)
        assert_agrees(actual, expected, TOLERANCE[dtype], inputs[-1], scale)


others = pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
every = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))


@others
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(draw=draws)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_parity_fp32(implementation, shape, draw):
    compare(implementation, shape, draw, "float32")


@others
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[7]], ids=str)
@given(draw=draws)
@settings(max_examples=5, deadline=None, derandomize=True, database=None)
def test_parity_fp64(implementation, shape, draw):
    compare(implementation, shape, draw, "float64")


@every
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_is_its_definition(implementation, vector, normalize):
    """Against the double sum over queries and keys, with documents told apart by comparing runs of ids."""
    s = Shape(2, 24, 4, 2, 4, 8, 4)
    rng = np.random.default_rng(0)
    q, k, v = rng.random((s.B, s.T, s.N, s.F)), rng.random((s.B, s.T, s.S, s.F)), rng.normal(size=(s.B, s.T, s.K, s.H))
    g = -rng.random((s.B, s.T, s.S, s.F if vector else 1))
    c = rng.normal(size=(s.B, s.T, s.S))
    ids = np.array([[0, 0, 1, 1, 1, 0, 1, 2, 2, 2, 2, 0, 0, 3, 3, 2, 2, 2, 0, 2, 1, 1, 1, 0], [5] * 20 + [0] * 4])
    y, n = np.zeros((s.B, s.T, s.N, s.H)), np.full((s.B, s.T, s.N), -1e30)
    for b in range(s.B):
        place = np.flatnonzero(ids[b])
        run = np.zeros(s.T, int)
        run[place] = np.cumsum(np.diff(ids[b, place], prepend=ids[b, place[0]]) != 0)
        for i in place:
            seen = [j for j in place if j <= i and run[j] == run[i]]
            for head in range(s.N):
                since = [g[b, [t for t in seen if t > j], head].sum(0) for j in seen]
                w = np.exp(c[b, seen, head]) * np.sum(q[b, i, head] * k[b, seen, head] * np.exp(since), -1)
                y[b, i, head] = w @ v[b, seen, head // 2] / (w.sum() if normalize else 1)
                n[b, i, head] = np.log(w.sum())
    with jax.enable_x64(True):
        out = log_gate_attention(
            *(jnp.asarray(x) for x in (q, k, v, g if vector else g[..., 0])), k_log_scale=jnp.asarray(c), chunk=7,
            segment_ids=jnp.asarray(ids), normalize=normalize, implementation=implementation,
            return_log_normalizer=True,
        )  # fmt: skip
    chex.assert_trees_all_close(out, (y, n), rtol=1e-10, atol=1e-12)


def example(s: Shape, dtype="float32", seed: int = 0):
    """Tame values: ``(q, k, v, g, c)``."""
    draw = Draw(seed, "mixed", "one", "positive", 3.0, 0.2, True)
    return cast(draw.inputs(s)[0][:5], dtype)


everything = functools.partial(log_gate_attention, chunk=8, return_log_normalizer=True, return_final_state=True)


@others
@pytest.mark.parametrize("vector", [False, True])
def test_goes_on_from_where_it_stopped(implementation, vector):
    """Any split of the sequence, and one token at a time, gives the whole; so does the gradient through the split."""
    s = Shape(1, 21, 4, 2, 2, 8, 8, vector=vector)
    with jax.enable_x64(True):
        inputs = example(s, "float64")
        op = functools.partial(everything, implementation=implementation)

        def whole(inputs):
            q, k, v, g, c = inputs
            y, n, state = op(q, k, v, g, k_log_scale=c)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.where(n > -1e29, n, 0)) + jnp.sum(state.z), (y, n, state)

        def split(inputs, at):
            outs, state = [], None
            for part in (slice(0, at), slice(at, None)):
                q, k, v, g, c = (x[:, part] for x in inputs)
                y, n, state = op(q, k, v, g, k_log_scale=c, initial_state=state)
                outs.append((y, n))
            y, n = (jnp.concatenate(parts, 1) for parts in zip(*outs, strict=True))
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.where(n > -1e29, n, 0)) + jnp.sum(state.z), (y, n, state)

        (_, expected), grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(inputs)
        for at in (1, 13):
            (_, got), split_grads = jax.jit(jax.value_and_grad(lambda x, at=at: split(x, at), has_aux=True))(inputs)
            chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-12)
            chex.assert_trees_all_close(split_grads, grads, rtol=1e-9, atol=1e-11)

        step = jax.jit(lambda q, k, v, g, c, state: log_gate_step(q, k, v, g, k_log_scale=c, state=state))
        state = empty_state(s.B, s.S, s.F, s.H, jnp.float64, vector_gates=vector)
        for t in range(s.T):
            y, n, state = step(*(x[:, t] for x in inputs), state)
            chex.assert_trees_all_close((y, n), (expected[0][:, t], expected[1][:, t]), rtol=1e-10, atol=1e-12)
        chex.assert_trees_all_close(state, expected[2], rtol=1e-10, atol=1e-12)


@every
@pytest.mark.parametrize("vector", [False, True])
def test_empty_memory(implementation, vector):
    """No key, or weights of 0: output 0, log normalizer -1e30 exactly, and every gradient 0."""
    s = Shape(1, 10, 4, 2, 2, 8, 8, vector=vector)
    q, k, v, g, c = example(s)
    op = functools.partial(log_gate_attention, return_log_normalizer=True, implementation=implementation)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4), has_aux=True)
    def scalar(q, k, v, g, c):
        y, n = op(q, k, v, g, k_log_scale=c)
        return jnp.sum(y) + jnp.sum(n), (y, n)

    for arguments in ((q, k, v, g, jnp.full_like(c, -1e30)), (q * 0, k, v, g, c)):
        (_, (y, n)), grads = scalar(*arguments)
        np.testing.assert_array_equal(y, 0)
        np.testing.assert_array_equal(n, jnp.float32(-1e30))
        chex.assert_trees_all_close(grads, jax.tree.map(jnp.zeros_like, grads), atol=0, rtol=0)

    # A key that is absent takes no part and no gradient, whatever it holds.
    c = c.at[:, 3].set(-2e29)
    (_, out), grads = scalar(q, k, v, g, c)
    (_, same), _ = scalar(q, k.at[:, 3].set(1e3), v.at[:, 3].set(-1e3), g, c)
    chex.assert_trees_all_equal(out, same)
    for grad in (grads[1], grads[2], grads[4]):
        np.testing.assert_array_equal(grad[:, 3], 0)
        assert np.any(np.asarray(grad[:, 4:]) != 0)


@every
def test_padding_leaves_no_trace(implementation):
    s = Shape(1, 30, 4, 2, 2, 8, 8)
    q, k, v, g, c = example(s)
    held = np.ones(s.T, bool)
    held[[0, 1, 7, 15, 16, 17, 29]] = False
    op = jax.jit(functools.partial(everything, implementation=implementation))
    state = op(q, k, v, g)[-1]
    y, n, final = op(q, k, v, g, k_log_scale=c, initial_state=state, segment_ids=jnp.asarray(held[None], jnp.int32))
    kept = (x[:, held] for x in (q, k, v, g, c))
    expected = op(*(parts := list(kept))[:4], k_log_scale=parts[4], initial_state=state)
    chex.assert_trees_all_close((y[:, held], n[:, held], final), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y[:, ~held], 0)
    np.testing.assert_array_equal(n[:, ~held], jnp.float32(-1e30))


@others
@pytest.mark.parametrize("gate", [np.log(1e-30), -1e30, -1e-7, 0.0, None])
def test_thousands_of_steps_stay_finite(implementation, gate):
    s = Shape(1, 3000, 2, 1, 1, 16, 16)
    q, k, v, g, _ = example(s)
    c = jnp.asarray(np.random.default_rng(1).uniform(-80, 80, (s.B, s.T, s.S)), jnp.float32)
    g = g if gate is None else jnp.full_like(g, gate)
    values, grads = long_run(implementation)(q, k, v, g, c)
    chex.assert_tree_all_finite((values, grads))
    if gate == -1e30:
        chex.assert_trees_all_close(values[1][0], v[:, :, jnp.zeros(2, int)], rtol=1e-5, atol=1e-5)


@functools.cache
def long_run(implementation: str):
    def scalar(q, k, v, g, c):
        y, n = log_gate_attention(q, k, v, g, k_log_scale=c, return_log_normalizer=True, implementation=implementation)
        return jnp.sum(y * y) + jnp.sum(n), (y, n)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3, 4), has_aux=True))


@others
def test_bfloat16(implementation):
    s = Shape(1, 64, 4, 2, 2, 32, 16)
    q, k, v, g, c = example(s)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]

    def scalar(q, k, v, g, c, implementation):
        y = log_gate_attention(q, k, v, g, k_log_scale=c, implementation=implementation)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    run = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True), static_argnums=5)
    (_, y), grads = run(*half, g, c, implementation)
    (_, expected), expected_grads = run(*(x.astype(jnp.float32) for x in half), g, c, "reference")
    assert y.dtype == jnp.bfloat16
    for actual, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert relative_rms(actual.astype(jnp.float32), wanted) <= 5e-3


@others
def test_memory_does_not_grow_with_length(implementation):
    """Beyond inputs and outputs, the forward pass needs the room of one chunk."""

    def temporary(T: int) -> int:
        inputs = jax.eval_shape(lambda: example(Shape(1, T, 4, 2, 2, 16, 16)))
        run = jax.jit(lambda q, k, v, g, c: log_gate_attention(q, k, v, g, implementation=implementation))
        return run.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 1.1 * temporary(1024)


def test_default_runs_everywhere():
    q, k, v, g, _ = example(Shape(1, 4, 4, 2, 2, 8, 8))
    chex.assert_trees_all_equal(log_gate_attention(q, k, v, g), log_gate_attention(q, k, v, g, implementation="xla"))


def test_bad_input_is_told_in_one_line():
    q, k, v, g, _ = example(Shape(1, 4, 4, 2, 2, 8, 8))
    with pytest.raises(
        ValueError, match="unknown implementation 'fast' of log_gate_attention; choose from reference, xla"
    ):
        log_gate_attention(q, k, v, g, implementation="fast")
    with pytest.raises(ValueError, match=r"log_gate has shape \(1, 4, 3\), expected \(1, 4, 2\) or \(1, 4, 2, 8\)"):
        log_gate_attention(q, k, v, jnp.zeros((1, 4, 3)))
    with pytest.raises(ValueError, match="4 query heads, 3 state heads and 2 key/value heads do not fit"):
        log_gate_attention(q, jnp.zeros((1, 4, 3, 8)), v, g)
    with pytest.raises(ValueError, match="k_feat has shape"):
        log_gate_step(q[:, 0], k[:, 0, :, :4], v[:, 0], g[:, 0], state=empty_state(1, 2, 8, 8))
