"""Every kernel compiles for every chip it is for and spills no more than it may: bytes on a GPU, time on a TPU."""

import dataclasses
import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.pallas import triton

from benchmarks.chips import compilers
from benchmarks.chips.compilers import TPUS, CannotCompile, Kernel, compile_for
from benchmarks.chips.gates import Gate, gates
from lizard_jax.plan import absent
from pallas_kernels import target
from pallas_kernels.target import Target

TOOLS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "triton", "jax_triton")}
# `benchmarks/compile.py` compiles all of them; here is what a model calls, on two of the TPUs with its gradient alone,
# and the bare op on one chip.
GATES = [
    gate
    for gate in gates()
    if (gate.F is None or (gate.F == 256 and (gate.act == "exp" or (gate.act is None and gate.chip == "v5e"))))
    and (gate.which == "backward" or gate.chip not in ("v5p", "v6e"))
]


@pytest.fixture(autouse=True)
def as_users_compile():
    """Kernels are compiled in earnest, whatever other tests can do without."""
    chosen = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", chosen)


def needs(platform: str):
    """The test extra has them all; a machine with JAX and pytest alone says what it leaves out."""
    missing = [tool for tool in TOOLS[platform] if importlib.util.find_spec(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def on_its_chip(gate: Gate):
    return pytest.param(gate, id=str(gate), marks=needs("tpu" if gate.chip in TPUS else "gpu"))


@pytest.mark.parametrize("gate", [on_its_chip(gate) for gate in GATES])
def test_a_kernel_compiles_for_its_chip(gate):
    compiled = gate.compile()
    assert compiled.kernels
    schedule = gate.over_roofline(compiled)
    assert schedule is None or 1.0 < schedule <= gate.most_over_roofline
    for kernel in compiled.kernels:
        assert kernel.registers is None or kernel.registers > 0
        if gate.most_spills is not None:
            assert kernel.spills is not None, kernel
            assert kernel.spills <= gate.most_spills, kernel


def compile_toy(chip: str, size: int, rounds: int, backend=None) -> Kernel:
    """A kernel in a loop that holds ``rounds`` products of its blocks at once."""

    def kernel(x, y, out):
        products = [jnp.dot(x[...], y[...] * i, preferred_element_type=jnp.float32) for i in range(1, 1 + rounds)]
        largest = functools.reduce(jnp.maximum, products)
        out[...] = sum(jnp.exp(product - largest) for product in products).astype(out.dtype)

    def function(x, y):
        block, whole = pl.BlockSpec((size, size), lambda i: (i, 0)), pl.BlockSpec((size, size), lambda i: (0, 0))
        call = pl.pallas_call(
            kernel, grid=(x.shape[0] // size,), in_specs=[block, whole], out_specs=block, out_shape=x,
            compiler_params=backend, name="toy",
        )  # fmt: skip
        return jax.lax.fori_loop(0, 3, lambda i, x: call(x, y), x)

    # Too large for XLA to keep in VMEM as a whole.
    arrays = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for rows in (1 << 20, size))
    [toy] = compile_for(chip, function, *arrays).kernels
    return toy


@needs("tpu")
def test_vmem_spills_and_bundles_of_a_tpu_kernel_grow_with_what_it_does():
    few, many = (compile_toy("v5e", 128, rounds) for rounds in (1, 8))
    assert few.name == "toy"
    assert few.memory >= 4 * 128 * 128 * 2  # two buffers for x and two for the result
    assert few.spills < 128 * 128 * 4 < many.spills
    assert many.registers > 64
    assert few.steps == many.steps == (1 << 20) // 128
    # A core multiplies four rows a cycle at most, and a product has 128.
    assert 32 <= few.bundles < many.bundles
    assert 8 * 32 <= many.bundles < 8 * few.bundles


@needs("gpu")
def test_spills_of_a_gpu_kernel_are_seen():
    few, many = (compile_toy("sm_80", 64, rounds, triton.CompilerParams(num_warps=4)) for rounds in (1, 16))
    assert few.memory == many.memory == 2 * 64 * 64 * 2
    assert few.registers < many.registers
    assert few.spills == 0 < many.spills


@needs("tpu")
def test_a_function_is_traced_for_its_chip_in_a_process_that_stays_as_it_was(monkeypatch):
    absent.tpus.cache_clear()
    seen, before, devices = [], dict(os.environ), jax.devices()

    def function(x):
        seen.append(target.current())
        return x + x

    for chip in ("v5e", "v6e", "v5e"):
        assert compile_for(chip, function, jax.ShapeDtypeStruct((8, 128), jnp.float32)).kernels == ()
    assert seen == [Target("tpu", "v5e"), Target("tpu", "v6e"), Target("tpu", "v5e")]
    assert (dict(os.environ), jax.devices()) == (before, devices)
    assert target.current().chip != "v5e"


@needs("tpu")
def test_what_is_compiled_for_an_absent_chip_is_not_kept(tmp_path):
    """JAX could not read it back, and would warn of it at the next try; what is for a device that is here it keeps."""
    changed = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in changed}
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    try:
        for name, value in changed.items():
            jax.config.update(name, value)
        for _ in range(2):
            compile_for("v5e", lambda x: x * 3, x)
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x * 3).lower(x).compile()
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


@needs("gpu")
def test_bytes_moved_are_counted_around_the_kernels():
    """A fusion reads and writes a matrix once; a product of matrices in between is written and read again."""
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    once = compile_for("sm_80", lambda x: x + 1, x)
    twice = compile_for("sm_80", lambda x: jnp.linalg.norm(jnp.flip(x + 1) @ x), x)
    assert once.traffic == 1.0
    assert twice.traffic > 3.0


@needs("gpu")
def test_a_triton_kernel_that_wants_more_shared_memory_than_a_block_has_fails(monkeypatch):
    chip = compilers._GPUS["sm_80"]
    assert chip.compiler is not None
    small = dataclasses.replace(chip, compiler=dataclasses.replace(chip.compiler, shared=1000))
    monkeypatch.setitem(compilers._GPUS, "sm_80", small)
    with pytest.raises(
        CannotCompile, match=r"^\w+ needs \d+ bytes of shared memory; a block of sm_80 has at most 1000$"
    ):
        Gate("sliding_window", "triton", "forward", "sm_80").compile()


@pytest.mark.parametrize(
    ("chip", "message"),
    [
        ("v5e", "compiling for v5e needs libtpu, which is not installed"),
        ("sm_90", "compiling for sm_90 needs jax-cuda13-plugin, which is not installed"),
        ("H100", "no compiler for 'H100'; there are v5e, v5p, v6e, sm_80, sm_90"),
    ],
)
def test_a_compiler_that_is_not_there_is_named_in_one_line(monkeypatch, chip, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    absent.tpus.cache_clear()
    absent.gpus.cache_clear()
    with pytest.raises(CannotCompile) as raised:
        compile_for(chip, jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert str(raised.value) == message
