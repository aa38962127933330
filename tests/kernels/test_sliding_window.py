"""One suite for every implementation of ``sliding_window``, held to the dense definition in float64."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from pallas_kernels import partition, target
from pallas_kernels.dispatch import KERNELS, choose
from pallas_kernels.sliding_window import sliding_window
from pallas_kernels.sliding_window.problem import Problem
from pallas_kernels.target import Target
from tests.kernels import parity, parity_window
from tests.kernels.parity_window import Draw, Shape, inputs, measured, run

AVAILABLE = parity_window.implementations()
every = pytest.mark.parametrize("implementation", AVAILABLE)
others = pytest.mark.parametrize("implementation", [name for name in AVAILABLE if name != "reference"])
kernels = pytest.mark.parametrize("implementation", [name for name in AVAILABLE if name in parity.STAND_INS])
plain = pytest.mark.parametrize("implementation", [name for name in AVAILABLE if name not in parity.STAND_INS])


SHAPES = [
    Shape(1, 1, 1, 1, 16, 1),
    Shape(2, 7, 4, 4, 32, 3, rope=False, learned=3),
    Shape(1, 63, 8, 1, 16, 64, sink=False),
    Shape(1, 64, 6, 2, 48, 33, prefix=4),
    Shape(1, 129, 4, 2, 64, 128),
    Shape(1, 128, 2, 1, 128, 32, rope=False, learned=2, prefix=3, own_prefix=True),
    Shape(1, 300, 2, 2, 16, 130, sink=False, prefix=2, own_prefix=True),
    Shape(1, 530, 3, 1, 16, 20),
    Shape(2, 20, 1, 1, 256, 140),
]
# An interpreter takes seconds a case: on a CPU kernels skip the largest shapes, which ``benchmarks.parity`` draws.
INTERPRETED = (1, 3, 5) if jax.default_backend() == "cpu" else range(len(SHAPES))
# What only plain JAX takes: odd widths.
ODD = [Shape(2, 33, 6, 2, 10, 5, learned=2, prefix=3), Shape(1, 100, 2, 1, 6, 40, rope=False)]


def hold(implementation: str, s: Shape, dtype: str, kinds=("packed", "start"), scale: float = 1.0) -> None:
    seed = zlib.crc32(str((s, dtype)).encode())
    for kind in kinds:
        errors = parity_window.errors(implementation, s, Draw(seed, kind, scale), dtype)
        wrong = {name: error for name, error in errors.items() if not error <= parity.TOLERANCE[dtype]}
        assert not wrong, kind


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_fp32(shape):
    hold("xla", shape, "float32", scale=3.0)


@kernels
@pytest.mark.parametrize("shape", [SHAPES[i] for i in INTERPRETED], ids=str)
def test_parity_of_kernels_fp32(implementation, shape):
    hold(implementation, shape, "float32", kinds=("packed",), scale=3.0)


@others
@pytest.mark.parametrize("shape", [SHAPES[3]], ids=str)
def test_parity_bf16(implementation, shape):
    hold(implementation, shape, "bfloat16", kinds=("packed",))


@kernels
def test_gradients_meet_the_turned_keys_that_were_summed(implementation):
    """Turned queries and keys are rounded: turned by other angles in the backward pass, weights would not sum to 1."""
    s = Shape(2, 150, 4, 2, 16, 40)
    errors = parity_window.errors(implementation, s, Draw(0, "one", 3.0), "bfloat16")
    assert errors["dv"] <= parity.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_parity_of_odd_shapes(shape):
    hold("xla", shape, "float32")


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5], ODD[0]], ids=str)
def test_parity_fp64(shape):
    hold("xla", shape, "float64", kinds=("one", "packed", "start"))


@plain
@pytest.mark.parametrize("rope", [True, False])
def test_is_its_definition(implementation, rope):
    """Against lists of what each query meets, with angles from absolute positions."""
    s = Shape(2, 23, 4, 2, 6, 5, rope=rope, learned=3, prefix=2)
    arrays, rest, _ = inputs(s, Draw(0, "packed", 1.0))
    ids, frequencies = rest["k_segments"], 10000.0 ** (-np.arange(3) / 3)

    def turned(x, position):
        if not rope:
            return x
        pairs = (x[:3] + 1j * x[3:]) * np.exp(1j * position * frequencies)
        return np.concatenate([pairs.real, pairs.imag])

    y, n = np.zeros((s.B, s.T, s.N, s.H)), np.full((s.B, s.T, s.N), -1e30)
    for b, i, head in np.ndindex(s.B, s.T, s.N):
        query, group, at = arrays["q"][b, i, head], head // 2, rest["positions"][b, i]
        if ids[b, i + s.W] == 0:
            continue
        near = [j for j in range(i + 1, i + s.W + 1) if ids[b, j] == ids[b, i + s.W]]
        gone = [t for t in range(s.prefix) if t <= at - s.W]
        far = turned(query, min(at, s.W + s.prefix - 1))
        met = [(turned(query, i + s.W) @ turned(arrays["k"][b, j, group], j), arrays["v"][b, j, group]) for j in near]
        met += [(far @ turned(arrays["prefix_k"][b, 0, t, group], t), arrays["prefix_v"][b, 0, t, group]) for t in gone]
        met += [(query @ arrays["learned_k"][m, group], arrays["learned_v"][m, group]) for m in range(s.learned)]
        weights = np.exp([score / s.H**0.5 for score, _ in met])
        total = weights.sum() + np.exp(arrays["sink"][head])
        y[b, i, head], n[b, i, head] = weights @ np.stack([value for _, value in met]) / total, np.log(total)
    with jax.enable_x64(True):
        # Frequencies are fp32 at the door.
        frequencies = frequencies.astype(np.float32).astype(np.float64)
        actual = sliding_window(**jax.tree.map(jnp.asarray, arrays | rest), window=s.W, implementation=implementation)
    for got, wanted in zip(actual, (y, n), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6 if rope else 1e-10, atol=1e-6 if rope else 1e-12)


@every
@pytest.mark.parametrize("sink", [True, False])
def test_padding_meets_nothing(implementation, sink):
    """Output 0, normalizer -1e30 exactly, every gradient 0; so too a query that meets no key and has no sink."""
    s = Shape(1, 20, 2, 1, 16, 8, sink=sink)
    arrays, rest, weights = jax.tree.map(jnp.float32, inputs(s, Draw(0, "padding", 1.0)))
    rest |= {name: rest[name].astype(jnp.int32) for name in ("q_segments", "k_segments", "positions")}
    for ids in (rest["q_segments"], rest["q_segments"] + 7)[: 1 if sink else 2]:
        out = run(implementation, s, arrays, rest | {"q_segments": ids}, weights)
        np.testing.assert_array_equal(out.pop("n"), np.float32(-1e30))
        for value in out.values():
            np.testing.assert_array_equal(value, 0)


@every
def test_what_is_not_met_takes_no_part(implementation):
    """Keys of other documents, however large, change nothing and get no gradient."""
    s = Shape(1, 40, 2, 1, 16, 8)
    arrays, rest, weights = jax.tree.map(jnp.float32, inputs(s, Draw(0, "one", 1.0)))
    ids = jnp.asarray(np.arange(s.W + s.T)[None] // 12 % 2 * 3)
    rest |= {"k_segments": ids, "q_segments": ids[:, s.W :], "positions": rest["positions"].astype(jnp.int32)}
    other = (ids == 0)[..., None, None]
    huge = {name: jnp.where(other, 1e18, arrays[name]) for name in ("k", "v")}
    out, same = run(implementation, s, arrays, rest, weights), run(implementation, s, arrays | huge, rest, weights)
    for name, value in out.items():
        np.testing.assert_array_equal(same[name], value)
    for name in ("dk", "dv"):
        np.testing.assert_array_equal(out[name][np.broadcast_to(other, out[name].shape)], 0)


def test_never_all_pairs():
    """``xla`` takes memory in proportion to T, forward and backward."""

    def temporary(T: int) -> int:
        s = Shape(1, T, 2, 1, 16, 32)
        arrays, rest, weights = jax.tree.map(jnp.float32, inputs(s, Draw(0, "one", 1.0)))
        rest |= {name: rest[name].astype(jnp.int32) for name in ("q_segments", "k_segments", "positions")}
        compiled = measured("xla", s.W).lower(arrays, rest, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 4.4 * temporary(1024)


def arguments(B=4, T=16, N=4, K=2, H=16, W=4):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, W + T, K, H), (B, W + T, K, H)
    tokens = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    return (*tokens, jnp.ones((B, T), jnp.int32), jnp.ones((B, W + T), jnp.int32))


def test_default_fits_the_platform():
    problem = Problem(4, 2048, 32, 8, 128, 128, jnp.dtype(jnp.bfloat16), True)
    odd, step = dataclasses.replace(problem, H=20), dataclasses.replace(problem, T=1)
    for platform, names in {**KERNELS, "cpu": ()}.items():
        with target.override(Target(platform, {"tpu": "v5e", "gpu": "sm_90"}.get(platform))):
            assert choose("sliding_window", problem, None).kernel == bool(names)
            assert not choose("sliding_window", odd, None).kernel
            assert not choose("sliding_window", step, None).kernel


@pytest.mark.parametrize("name", [name for name in AVAILABLE if name in parity.STAND_INS])
def test_a_kernel_that_cannot_run_says_why(name):
    with target.override(Target("cpu")), pytest.raises(ValueError, match=rf"cannot run {name}: {name} runs on .*cpu"):
        sliding_window(*arguments(), window=4, implementation=name)
    with parity.scope(name), pytest.raises(ValueError, match=f"cannot run {name}: H is 20; {name} needs"):
        sliding_window(*arguments(H=20), window=4, implementation=name)


def test_bad_input_is_told_in_one_line():
    q, k, v, *ids = arguments()
    op = functools.partial(sliding_window, window=4)
    with pytest.raises(ValueError, match="unknown implementation 'fast' of sliding_window; choose from reference, xla"):
        op(q, k, v, *ids, implementation="fast")
    with pytest.raises(ValueError, match=r"k has shape \(4, 19, 2, 16\), expected \(4, 20, 2, 16\)"):
        op(q, k[:, 1:], v, *ids)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 key/value heads"):
        op(q, jnp.zeros((4, 20, 3, 16)), v, *ids)
    with pytest.raises(ValueError, match="window is 0"):
        sliding_window(q, k, v, *ids, window=0)
    with pytest.raises(ValueError, match="q, k and v are float32, bfloat16 and float32"):
        op(q, k.astype(jnp.bfloat16), v, *ids)
    with pytest.raises(ValueError, match="learned_k and learned_v come together"):
        op(q, k, v, *ids, learned_k=jnp.zeros((2, 2, 16)))
    with pytest.raises(ValueError, match="need the positions"):
        op(q, k, v, *ids, prefix_k=jnp.zeros((4, 1, 2, 2, 16)), prefix_v=jnp.zeros((4, 1, 2, 2, 16)))


def test_no_step_of_a_tpu_kernel_races_with_another():
    s = Shape(1, 530, 2, 2, 16, 130)
    arrays, rest, weights = jax.tree.map(jnp.float32, inputs(s, Draw(0, "packed", 1.0)))
    rest |= {name: rest[name].astype(jnp.int32) for name in ("q_segments", "k_segments", "positions")}
    run("pallas_tpu", s, arrays, rest, weights)
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_split_over_devices():
    """Each of 2 × 2 devices runs the kernel on its rows and heads."""
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, k, v, *ids = arguments()
    sink, frequencies = jnp.arange(4, dtype=jnp.float32), jnp.asarray([1.0, 0.1] * 4)

    def scalar(q, k, v, sink, implementation):
        y, n = sliding_window(
            q, k, v, *ids, window=4, sink=sink, rope_frequencies=frequencies, implementation=implementation
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(n), (y, n)

    grad = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True), static_argnums=4)
    expected = grad(q, k, v, sink, "xla")
    with partition.over(partition.Partition(mesh, ("data",), ("tensor",))), parity.scope("pallas_tpu"):
        actual = grad(q, k, v, sink, "pallas_tpu")
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-5), actual, expected)
