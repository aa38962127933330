"""Kernels compiled for chips that are not here, and what each takes of its chip.

TPUs through libtpu, GPUs through JAX's CUDA plugin; neither needs the hardware, a driver, or another platform than the
one this process runs on. The ``test`` extra brings all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from pallas_kernels import target

if TYPE_CHECKING:
    from jaxtyping import PyTree

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA's GPU compiler asks about a card; ``shared`` is the most that one block can have, in bytes."""

    name: str
    cores: int
    shared_per_core: int
    shared: int
    memory: int
    bandwidth: int
    l2: int
    clock_ghz: float
    fp32_lanes: int
    capability: str


_GPUS = {
    "sm_80": _Gpu("NVIDIA A100-SXM4-80GB", 108, 167936, 166912, 80 << 30, 2039 * 10**9, 40 << 20, 1.41, 64,
                  "major: 8 minor: 0"),
    "sm_90": _Gpu("NVIDIA H100 80GB HBM3", 132, 233472, 232448, 80 << 30, 3352 * 10**9, 50 << 20, 1.98, 128,
                  "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES"),
}  # fmt: skip

CHIPS = (*TPUS, *_GPUS)


class CannotCompile(RuntimeError):
    """A compiler is not installed, or a kernel does not fit its chip; says which in one line."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled function.

    Attributes:
        memory: on-chip bytes. GPU: shared memory of a block, static and dynamic. TPU: the scoped VMEM that Mosaic
            reserves for one call: the kernel's scratch, the pipeline's buffers and the compiler's own.
        registers: of a thread; None on a TPU.
        spills: bytes that ptxas stores to and loads from local memory for want of registers; None on a TPU.
    """

    name: str
    memory: int
    registers: int | None = None
    spills: int | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A function compiled for a chip; ``kernels`` are ours, without what XLA itself generates around them."""

    chip: str
    kernels: tuple[Kernel, ...]
    executable: jax.stages.Compiled


def compile_for(chip: str, function: Callable, *arguments: PyTree[jax.ShapeDtypeStruct]) -> Compiled:
    """Compile ``function`` of ``arguments`` for one device of a kind.

    Args:
        chip: one of ``CHIPS``; ``function`` is traced with ``target.current()`` telling it.
        function: traceable by JAX; it may hold Pallas kernels (Mosaic TPU, Triton) and jax-triton ones.
        arguments: anything with shape and dtype, in any pytree.

    Raises:
        CannotCompile: the chip is unknown, its compiler is missing, or a kernel asks for more memory than a block has.
    """
    if chip not in CHIPS:
        raise CannotCompile(f"no compiler for {chip!r}; there are {', '.join(CHIPS)}")
    platform = "tpu" if chip in TPUS else "gpu"
    device = _tpu_device(chip) if platform == "tpu" else _gpu_device(chip)
    cores = getattr(device, "num_cores" if platform == "tpu" else "core_count", None)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device.device_kind, cores, platform))
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with target.override(target.Target(platform, chip)), jax.sharding.use_abstract_mesh(mesh), _chosen_knowingly():
        # A new function each time: jit would hand back what it traced for another target.
        traced = jax.jit(lambda *args: function(*args)).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("tpu" if platform == "tpu" else "cuda",))
    if platform == "tpu":
        executable = lowered.compile()
        return Compiled(chip, tuple(_mosaic_kernels(executable.as_text() or "")), executable)
    with tempfile.TemporaryDirectory() as dump:
        executable = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_emitter_re": ".*"})
        kernels = (*_jax_triton_kernels(chip, lowered), *_pallas_triton_kernels(lowered, Path(dump)))
    return Compiled(chip, kernels, executable)


@contextlib.contextmanager
def _chosen_knowingly() -> Iterator[None]:
    """Lower Pallas-Triton kernels without the warning that the backend is to go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


# --- the compilers ----------------------------------------------------------------------------------------------------


@functools.cache
def _tpu_device(chip: str) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise CannotCompile(f"compiling for {chip} needs libtpu, which is not installed")
    # Only while libtpu loads: it would look for a TPU and for its neighbours, and other processes read these too.
    with _environment(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_STDERR_LOG_LEVEL="3",
    ):
        return topologies.get_topology_desc(TPUS[chip], platform="tpu").devices[0]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _gpu_device(chip: str) -> Any:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise CannotCompile(f"compiling for {chip} needs jax-cuda13-plugin[with-cuda], which is not installed")
    gpu = _GPUS[chip]
    config = f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          cuda_compute_capability {{ {gpu.capability} }}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_core: {gpu.shared_per_core}
          shared_memory_per_block_optin: {gpu.shared}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.fp32_lanes}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {gpu.bandwidth}
          l2_cache_size: {gpu.l2}
          clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {gpu.memory}
        }}"""
    described = topologies.get_topology_desc("", platform="cuda", target_config=config, topology="1x1x1")
    return described.devices[0]


@functools.cache
def _ptxas() -> str:
    """The assembler of the CUDA wheels that JAX itself uses, or one on the path."""
    wheels = importlib.util.find_spec("nvidia")
    places = wheels.submodule_search_locations if wheels is not None else None
    for place in places or ():
        if (ptxas := Path(place) / "cu13" / "bin" / "ptxas").is_file():
            return str(ptxas)
    if (found := shutil.which("ptxas")) is None:
        raise CannotCompile("counting registers needs ptxas (nvidia-cuda-nvcc), which is not installed")
    return found


# --- what they say ----------------------------------------------------------------------------------------------------


def _mosaic_kernels(hlo: str) -> Iterator[Kernel]:
    """Of a compiled TPU module: each Mosaic call carries the scoped memory (space 1, VMEM) that it was given."""
    for call in re.findall(r'^.*custom_call_target="tpu_custom_call".*$', hlo, re.MULTILINE):
        [name] = re.findall(r"^\s*(?:ROOT )?%?([\w-]+?)(?:\.\d+)* = ", call)
        used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', call)
        sizes = re.findall(r'"memory_space":"1"[^}]*?"size":"(\d+)"', used[1]) if used else []
        yield Kernel(name, sum(map(int, sizes)))


def _custom_calls(lowered: jax.stages.Lowered, name: str) -> Iterator[Any]:
    """Backend configurations of the module's custom calls of a name, in any function and loop."""

    def walk(operation):
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    if inner.name == "stablehlo.custom_call" and inner.attributes["call_target_name"].value == name:
                        yield inner.attributes["mhlo.backend_config"]
                    yield from walk(inner.operation)

    yield from walk(lowered.compiler_ir("stablehlo").operation)  # pyright: ignore[reportOptionalMemberAccess]


def _jax_triton_kernels(chip: str, lowered: jax.stages.Lowered) -> Iterator[Kernel]:
    """Triton has compiled these to PTX already, which is part of the call; the GPU's own process assembles it."""
    for config in _custom_calls(lowered, "triton_kernel_call_ffi"):
        call = _fields(zlib.decompress(config["opaque"].value_bytes))
        kernel = _fields(_fields(call[1])[1])
        name, shared = kernel[1].decode(), kernel.get(3, 0)
        if shared > _GPUS[chip].shared:
            raise CannotCompile(f"{name} needs {shared} bytes of shared memory; a block of {chip} has at most "
                                f"{_GPUS[chip].shared}")  # fmt: skip
        yield _assembled(kernel[4].decode(), {name: shared})[name]


def _pallas_triton_kernels(lowered: jax.stages.Lowered, dump: Path) -> Iterator[Kernel]:
    """XLA compiles these, one PTX file a module; XLA's own fusions beside them are left out."""
    ours = {config["name"].value for config in _custom_calls(lowered, "__gpu$xla.gpu.triton")}
    launches = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    shared = {
        name: int(size)
        for name, size in re.findall(r"(\S+) grid: .*shared_memory: (\d+) bytes", launches)
        if name in ours or re.sub(r"_\d+$", "", name) in ours
    }
    if not shared:
        return
    for path in dump.glob("*.ptx"):
        yield from _assembled(path.read_text(), shared).values()


def _assembled(ptx: str, dynamic: dict[str, int]) -> dict[str, Kernel]:
    """What ptxas says of the entries named in ``dynamic``, whose values are their dynamic shared memory in bytes."""
    [architecture] = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx.rstrip("\0"))
        command = [_ptxas(), "-v", f"-arch={architecture}", str(source), "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise CannotCompile(f"ptxas: {told.stderr.strip().splitlines()[0]}")
    kernels = {}
    for part in told.stderr.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        if name in dynamic:
            static = re.search(r"(\d+) bytes smem", part)
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
            [registers] = re.findall(r"Used (\d+) registers", part)
            memory = dynamic[name] + (int(static[1]) if static else 0)
            kernels[name] = Kernel(name, memory, int(registers), spills)
    return kernels


def _fields(message: bytes) -> dict[int, Any]:
    """Fields of a protobuf message by number, the last of each: integers, or bytes of texts and inner messages."""
    at, fields = 0, {}

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        tag = integer()
        kind = tag & 7
        if kind == 0:
            fields[tag >> 3] = integer()
            continue
        length = {1: 8, 5: 4}.get(kind) or integer()
        fields[tag >> 3], at = message[at : at + length], at + length
    return fields
