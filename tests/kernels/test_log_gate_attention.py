"""One suite for every implementation of ``log_gate_attention``; ``parity`` measures, this holds them to it."""

import functools
import importlib.util
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import partition, target
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose, load
from pallas_kernels.log_gate_attention import (
    empty_state,
    feature_map,
    log_gate_attention,
    log_gate_step,
    mapped_log_gate_attention,
)
from pallas_kernels.log_gate_attention.problem import Problem
from tests.kernels import parity
from tests.kernels.parity import Draw, Shape

AVAILABLE = parity.implementations()
every = pytest.mark.parametrize("implementation", AVAILABLE)
others = pytest.mark.parametrize("implementation", [name for name in AVAILABLE if name != "reference"])
plain = pytest.mark.parametrize("implementation", [name for name in AVAILABLE if name not in parity.STAND_INS])

kernels = pytest.mark.parametrize("implementation", [name for name in AVAILABLE if name in parity.STAND_INS])

long = [name for name in AVAILABLE if name == "xla" or (name in parity.STAND_INS and jax.default_backend() != "cpu")]

# (B, T, N, K, S, F, H): what every implementation takes.
SHAPES = [
    Shape(1, 1, 2, 1, 1, 16, 16),
    Shape(2, 5, 4, 4, 4, 16, 16, normalize=False),
    Shape(1, 17, 8, 1, 1, 32, 16, chunk=16),
    Shape(1, 65, 4, 2, 4, 16, 32),
    Shape(1, 130, 8, 2, 2, 64, 64),
    Shape(1, 70, 3, 1, 3, 48, 80),
    Shape(1, 129, 1, 1, 1, 256, 128),
    Shape(1, 1000, 2, 1, 1, 16, 16),
    Shape(1, 40, 4, 2, 2, 32, 16, act="exp", X=16),
    Shape(2, 70, 4, 2, 4, 32, 16, act="softmax", X=32),
    Shape(1, 130, 4, 1, 1, 64, 32, act="exp", X=48),
]
# Most of a case is compiling it. On a CPU plain JAX leaves out what differs in sizes alone, and kernels, which an
# interpreter takes seconds for, the largest; ``benchmarks.parity`` draws all of them.
ON_CPU = jax.default_backend() == "cpu"
COMPILED = (0, 1, 2, 3, 5, 7, 9, 10) if ON_CPU else range(len(SHAPES))
INTERPRETED = (1, 5, 9, 10) if ON_CPU else range(len(SHAPES))
# What only plain JAX takes: odd widths, gates of one value per feature.
ODD = [
    Shape(2, 33, 6, 2, 6, 24, 20, chunk=16, normalize=False),
    Shape(1, 20, 4, 2, 2, 6, 5, act="exp", X=7),
    Shape(1, 70, 4, 2, 4, 16, 16, chunk=32, vector=True),
    Shape(1, 20, 2, 1, 1, 16, 16, vector=True, normalize=False),
    Shape(1, 40, 4, 2, 4, 16, 16, chunk=32, vector=True, act="softmax", X=8),
]


def hold(implementation: str, shape: Shape, dtype: str, draws: int) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{shape} {dtype}".encode()))
    for _ in range(draws):
        values = parity.draw(rng)
        errors = parity.errors(implementation, shape, values, dtype)
        wrong = {name: error for name, error in errors.items() if not error <= parity.TOLERANCE[dtype]}
        assert not wrong, values


@pytest.mark.parametrize("shape", [SHAPES[i] for i in COMPILED], ids=str)
def test_parity_fp32(shape):
    hold("xla", shape, "float32", draws=4)


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (3, 9, 10)], ids=str)
def test_parity_bf16(shape):
    hold("xla", shape, "bfloat16", draws=3)


@kernels
@pytest.mark.parametrize("shape", [SHAPES[i] for i in INTERPRETED], ids=str)
def test_parity_of_kernels_fp32(implementation, shape):
    hold(implementation, shape, "float32", draws=2)


@kernels
def test_parity_of_kernels_bf16(implementation):
    hold(implementation, SHAPES[9], "bfloat16", draws=2)


@kernels
def test_gates_that_only_keep_a_memory_get_their_own_cotangents(implementation):
    """What comes back through ``kv`` and through ``z`` cancels but for ``dn``: in bf16, too, none of it is rounded."""
    values = Draw(seed=0, gate="keep", segment="one", feature="exp", scale=0.0, absent=1.0, memory=True)
    errors = parity.errors(implementation, Shape(2, 50, 2, 2, 2, 16, 128, chunk=16), values, "bfloat16")
    assert errors["dg"] <= 1e-4


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_parity_of_odd_shapes(shape):
    hold("xla", shape, "float32", draws=6)


@pytest.mark.parametrize("shape", [SHAPES[3], ODD[0], ODD[2]], ids=str)
def test_parity_fp64(shape):
    hold("xla", shape, "float64", draws=3)


@plain
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_is_its_definition(implementation, vector, normalize):
    """Against the double sum over queries and keys, with documents told apart by comparing runs of ids."""
    B, T, N, K, S, F, H = 2, 24, 4, 2, 4, 8, 4
    rng = np.random.default_rng(0)
    q, k, v = rng.random((B, T, N, F)), rng.random((B, T, S, F)), rng.normal(size=(B, T, K, H))
    g = -rng.random((B, T, S, F if vector else 1))
    c = rng.normal(size=(B, T, S))
    ids = np.array([[0, 0, 1, 1, 1, 0, 1, 2, 2, 2, 2, 0, 0, 3, 3, 2, 2, 2, 0, 2, 1, 1, 1, 0], [5] * 20 + [0] * 4])
    y, n = np.zeros((B, T, N, H)), np.full((B, T, N), -1e30)
    for b in range(B):
        place = np.flatnonzero(ids[b])
        run = np.zeros(T, int)
        run[place] = np.cumsum(np.diff(ids[b, place], prepend=ids[b, place[0]]) != 0)
        for i in place:
            seen = [j for j in place if j <= i and run[j] == run[i]]
            for head in range(S):
                since = [g[b, [t for t in seen if t > j], head].sum(0) for j in seen]
                w = np.exp(c[b, seen, head]) * np.sum(q[b, i, head] * k[b, seen, head] * np.exp(since), -1)
                y[b, i, head] = w @ v[b, seen, head // 2] / (w.sum() if normalize else 1)
                n[b, i, head] = np.log(w.sum())
    with jax.enable_x64(True):
        op = jax.jit(functools.partial(
            log_gate_attention, chunk=7, normalize=normalize, implementation=implementation, return_log_normalizer=True
        ))  # fmt: skip
        out = op(q, k, v, g if vector else g[..., 0], k_log_scale=c, segment_ids=ids)
    close(out, (y, n), 1e-10, 1e-12)


def close(actual, expected, rtol: float, atol: float) -> None:
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol, atol), actual, expected)


def example(s: Shape, dtype="float32", seed: int = 0):
    """Tame values in numpy, whose slices need no compiling: ``(q, k, v, g, c)``."""
    draw = Draw(seed, "mixed", "one", "positive", 3.0, 0.2, True)
    return [x.astype(dtype) for x in draw.inputs(s)[0][:5]]


everything = functools.partial(log_gate_attention, chunk=8, return_log_normalizer=True, return_final_state=True)


@pytest.mark.parametrize("vector", [False, True])
def test_goes_on_from_where_it_stopped(vector):
    """Any split of the sequence, and one token at a time, gives the whole; so does the gradient through the split."""
    s = Shape(1, 21, 4, 2, 2, 8, 8, vector=vector)
    with jax.enable_x64(True):
        inputs = example(s, "float64")
        op = functools.partial(everything, implementation="xla")

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
            close(got[:2], expected[:2], 1e-10, 1e-12)
            close(split_grads, grads, 1e-9, 1e-11)
            assert_same_memory(got[2], expected[2])

        step = jax.jit(lambda q, k, v, g, c, state: log_gate_step(q, k, v, g, k_log_scale=c, state=state))
        state = empty_state(s.B, s.S, s.F, s.H, jnp.float64, vector_gates=vector)
        for t in range(s.T):
            y, n, state = step(*(x[:, t] for x in inputs), state)
            close((y, n), (expected[0][:, t], expected[1][:, t]), 1e-10, 1e-12)
        assert_same_memory(state, expected[2])


def assert_same_memory(actual, expected) -> None:
    factor = np.exp(np.asarray(actual.m - expected.m)).reshape(*actual.m.shape[:2], -1)
    close((actual.kv * factor[..., None], actual.z * factor), (expected.kv, expected.z), 1e-9, 1e-11)


@every
def test_one_token_at_a_time(implementation):
    """A long call's state is what a single step goes on from, and the other way round."""
    s = Shape(1, 21, 4, 2, 2, 16, 16)
    q, k, v, g, c = example(s)
    step = jax.jit(log_gate_step)
    with parity.scope(implementation):
        op = jax.jit(functools.partial(everything, implementation=implementation))
        y, n, _ = op(q, k, v, g, k_log_scale=c)
        _, _, state = op(*(x[:, :20] for x in (q, k, v, g)), k_log_scale=c[:, :20])
        last = step(*(x[:, 20] for x in (q, k, v, g)), k_log_scale=c[:, 20], state=state)
        close(last[:2], (y[:, 20], n[:, 20]), 1e-5, 1e-5)
        _, _, state = step(*(x[:, 0] for x in (q, k, v, g)), k_log_scale=c[:, 0], state=empty_state(1, 2, 16, 16))
        rest = op(*(x[:, 1:] for x in (q, k, v, g)), k_log_scale=c[:, 1:], initial_state=state)
        close(rest[:2], (y[:, 1:], n[:, 1:]), 1e-5, 1e-5)


@every
@pytest.mark.parametrize("vector", [False, True])
def test_empty_memory(implementation, vector):
    """No key, or weights of 0: output 0, log normalizer -1e30 exactly, and every gradient 0."""
    if vector and implementation in parity.STAND_INS:
        return
    s = Shape(1, 10, 4, 2, 2, 16, 16, vector=vector)
    q, k, v, g, c = example(s)
    op = functools.partial(log_gate_attention, return_log_normalizer=True, implementation=implementation)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4), has_aux=True)
    def scalar(q, k, v, g, c):
        y, n = op(q, k, v, g, k_log_scale=c)
        return jnp.sum(y) + jnp.sum(n), (y, n)

    with parity.scope(implementation):
        for arguments in ((q, k, v, g, np.full_like(c, -1e30)), (q * 0, k, v, g, c)):
            (_, (y, n)), grads = scalar(*arguments)
            np.testing.assert_array_equal(y, 0)
            np.testing.assert_array_equal(n, jnp.float32(-1e30))
            close(grads, jax.tree.map(jnp.zeros_like, grads), 0, 0)

        # A key that is absent takes no part and no gradient, whatever it holds.
        c[:, 3] = -2e29
        (_, out), grads = scalar(q, k, v, g, c)
        k[:, 3], v[:, 3] = 1e3, -1e3
        (_, same), _ = scalar(q, k, v, g, c)
    close(out, same, 0, 0)
    for grad in (grads[1], grads[2], grads[4]):
        np.testing.assert_array_equal(grad[:, 3], 0)
        assert np.any(np.asarray(grad[:, 4:]) != 0)


@every
def test_padding_leaves_no_trace(implementation):
    s = Shape(1, 30, 4, 2, 2, 16, 16, act="exp", X=16)
    (q, k, v, g, c, _, maps), _ = jax.tree.map(
        lambda x: x.astype("float32"), Draw(0, "mixed", "one", "positive", 3.0, 0.2, True).inputs(s)
    )
    held = np.ones(s.T, bool)
    held[[0, 1, 7, 15, 16, 17, 29]] = False
    features = functools.partial(everything, implementation=implementation)
    raw = functools.partial(
        mapped_log_gate_attention, q_map=maps[0], k_map=maps[1], act="exp", implementation=implementation,
        return_log_normalizer=True, return_final_state=True,
    )  # fmt: skip
    mapped = jax.jit(functools.partial(feature_map, act="exp"))
    with parity.scope(implementation):
        for op, (a, b) in ((features, (mapped(q, maps[0])[0], mapped(k, maps[1])[0])), (raw, (q, k))):
            op, a, b = jax.jit(op), np.asarray(a), np.asarray(b)
            state = op(a, b, v, g)[-1]
            ids = held[None].astype(np.int32)
            y, n, final = op(a, b, v, g, k_log_scale=c, initial_state=state, segment_ids=ids)
            kept = [x[:, held] for x in (a, b, v, g, c)]
            expected = op(*kept[:4], k_log_scale=kept[4], initial_state=state)
            y, n = np.asarray(y), np.asarray(n)
            close((y[:, held], n[:, held], final), expected, 1e-5, 1e-5)
            np.testing.assert_array_equal(y[:, ~held], 0)
            np.testing.assert_array_equal(n[:, ~held], np.float32(-1e30))


@pytest.mark.parametrize("implementation", long)
@pytest.mark.parametrize("gate", [np.log(1e-30), -1e30, -1e-7, 0.0, None])
def test_thousands_of_steps_stay_finite(implementation, gate):
    s = Shape(1, 3000, 2, 1, 1, 16, 16)
    q, k, v, g, _ = example(s)
    c = np.random.default_rng(1).uniform(-80, 80, (s.B, s.T, s.S)).astype(np.float32)
    g = g if gate is None else np.full_like(g, gate)
    with parity.scope(implementation):
        values, grads = long_run(implementation)(q, k, v, g, c)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((values, grads)))
    if gate == -1e30:
        close(values[1][0], v[:, :, np.zeros(2, int)], 1e-5, 1e-5)


@functools.cache
def long_run(implementation: str):
    def scalar(q, k, v, g, c):
        y, n = log_gate_attention(q, k, v, g, k_log_scale=c, return_log_normalizer=True, implementation=implementation)
        return jnp.sum(y * y) + jnp.sum(n), (y, n)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3, 4), has_aux=True))


def test_memory_does_not_grow_with_length():
    """Beyond inputs and outputs, the forward pass needs the room of one chunk."""

    def temporary(T: int) -> int:
        inputs = jax.eval_shape(lambda: example(Shape(1, T, 4, 2, 2, 16, 16)))
        run = jax.jit(lambda q, k, v, g, c: log_gate_attention(q, k, v, g, implementation="xla"))
        return run.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 1.1 * temporary(1024)


@others
def test_many_devices_are_one(implementation):
    """Batch rows and heads over a mesh: outputs and gradients of one device, whatever the mesh does not divide."""
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = partition.Partition(mesh, ("data",), ("tensor",))

    def scalar(arrays, maps):
        q, k, v, g, c = arrays
        y, n, state = mapped_log_gate_attention(
            q, k, v, g, q_map=maps[0], k_map=maps[1], act="exp", k_log_scale=c, implementation=implementation,
            return_log_normalizer=True, return_final_state=True,
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.where(n > -1e29, n, 0)) + jnp.sum(state.z), y

    # What a mesh does not divide is settled before any implementation is called.
    for B, K in ((2, 2), (1, 2), (2, 1)) if implementation == "xla" else ((2, 2),):
        s = Shape(B, 20, 4, K, K, 16, 16, act="exp", X=16)
        (*arrays, _, maps), _ = jax.tree.map(
            lambda x: jnp.asarray(x, "float32"), Draw(0, "mixed", "one", "positive", 3.0, 0.2, True).inputs(s)
        )
        with parity.scope(implementation):
            expected = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(arrays, maps)
            with partition.over(split):
                actual = jax.jit(jax.value_and_grad(lambda *x: scalar(*x), argnums=(0, 1), has_aux=True))(arrays, maps)
        close(actual, expected, 1e-4, 1e-5)


def test_a_fitting_implementation_is_picked():
    fits = Problem(1, 64, 4, 2, 2, 32, 32, jnp.dtype("bfloat16"))
    odd = Problem(1, 64, 4, 2, 2, 24, 20, jnp.dtype("bfloat16"))

    def picked(problem, place):
        with target.override(place):
            return choose("log_gate_attention", problem, None).attend.__module__.split(".")[2]

    tpu, gpu, cpu = target.Target("tpu", "v5e"), target.Target("gpu", "sm_90"), target.Target("cpu")
    assert picked(fits, tpu) == "pallas_tpu"
    assert picked(fits, gpu) in ("triton", "pallas_gpu")
    assert picked(fits, cpu) == "xla"
    assert {picked(odd, place) for place in (tpu, gpu, cpu)} == {"xla"}


def test_bad_input_is_told_in_one_line():
    q, k, v, g, _ = map(jnp.asarray, example(Shape(1, 4, 4, 2, 2, 8, 8)))
    with pytest.raises(
        ValueError,
        match=f"unknown implementation 'fast' of log_gate_attention; choose from {', '.join(IMPLEMENTATIONS)}",
    ):
        log_gate_attention(q, k, v, g, implementation="fast")
    with pytest.raises(ValueError, match="log_gate_attention cannot run pallas_tpu: "):
        log_gate_attention(q, k, v, g, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"log_gate has shape \(1, 4, 3\), expected \(1, 4, 2\) or \(1, 4, 2, 8\)"):
        log_gate_attention(q, k, v, jnp.zeros((1, 4, 3)))
    with pytest.raises(ValueError, match="4 query heads, 3 state heads and 2 key/value heads do not fit"):
        log_gate_attention(q, jnp.zeros((1, 4, 3, 8)), v, g)
    with pytest.raises(ValueError, match="k_feat has shape"):
        log_gate_step(q[:, 0], k[:, 0, :, :4], v[:, 0], g[:, 0], state=empty_state(1, 2, 8, 8))
    with pytest.raises(ValueError, match="act is 'relu', must be 'exp' or 'softmax'"):
        mapped_log_gate_attention(q, k, v, g, q_map=jnp.zeros((4, 8, 4)), k_map=jnp.zeros((2, 8, 4)), act="relu")
    with pytest.raises(ValueError, match="q_map has shape"):
        mapped_log_gate_attention(q, k, v, g, q_map=jnp.zeros((2, 8, 4)), k_map=jnp.zeros((2, 8, 4)), act="exp")


@pytest.mark.parametrize("chip", ["sm_86", "sm_89", "sm_120"])
def test_gpus_of_less_shared_memory_are_left_to_xla(chip):
    """Tiles for an A100 or an H100 would not fit them; each kernel says so, and none is chosen."""
    from pallas_kernels.log_gate_attention.problem import Problem
    from pallas_kernels.sliding_window.problem import Problem as WindowProblem

    attention = Problem(2, 2048, 32, 8, 8, 128, 128, jnp.dtype("bfloat16"), act="exp", width=128)
    window = WindowProblem(2, 2048, 32, 8, 128, 128, jnp.dtype("bfloat16"), True)
    here = target.Target("gpu", chip)
    for op, problem in (("log_gate_attention", attention), ("sliding_window", window)):
        with target.override(here):
            assert choose(op, problem, None) is load(op, "xla")
        for name in ("triton", "pallas_gpu"):
            if importlib.util.find_spec("jax_triton") is not None or name == "pallas_gpu":
                assert load(op, name).cannot_run(problem, here).endswith(f"sm_103; this is {chip}")
