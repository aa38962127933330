"""Kernels compiled for chips that are not here, and what each takes of its chip.

TPUs through libtpu, GPUs through JAX's CUDA plugin; neither needs the hardware, a driver, or another platform than the
one this process runs on. The ``test`` group brings all of it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import math
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
from jax.extend.core import subjaxprs
from jax.sharding import SingleDeviceSharding

from lizard_jax.plan import absent
from lizard_jax.plan.absent import CannotCompile
from pallas_kernels import chips

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr
    from jaxtyping import PyTree

TPUS = ("v5e", "v5p", "v6e")
_GPUS = {chips.CHIPS[name].target: chips.CHIPS[name] for name in ("a100", "h100")}

CHIPS = (*TPUS, *_GPUS)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled function.

    Attributes:
        memory: on-chip bytes. GPU: shared memory of a block, static and dynamic. TPU: the scoped VMEM that Mosaic
            reserves for one call: the kernel's scratch, the pipeline's buffers and the compiler's own.
        registers: GPU: of a thread. TPU: vector registers alive at the tightest place before they are allotted; a core
            has 64.
        spills: bytes stored to and loaded from memory for want of registers, each instruction of the program counted
            once. GPU: what ptxas says, for a thread. TPU: spill slots in VMEM, 4 KiB for a vector register.
        steps: TPU: of the grid.
        bundles: TPU: instruction words of one step with all its branches, as many cycles where nothing is waited for.

    ``registers``, ``spills`` and ``bundles`` are None where something else loaded the TPU compiler before: it keeps its
    notes then.
    """

    name: str
    memory: int
    registers: int | None
    spills: int | None
    steps: int | None = None
    bundles: int | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A function compiled for a chip.

    ``kernels`` are ours, each once however often it is called, without what XLA itself generates around them.
    """

    chip: str
    kernels: tuple[Kernel, ...]
    executable: jax.stages.Compiled

    @property
    def traffic(self) -> float:
        """Bytes moved over compulsory bytes, from the shapes in the compiled module.

        Moved: every kernel and every operation that XLA left around them reads its operands once and writes its
        results once, wherever XLA puts them. What a kernel reads twice is not seen here. Compulsory: the function's
        arguments and results.
        """
        moved, compulsory = _bytes_moved(self.executable.as_text() or "")
        return moved / compulsory


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
    device = tpu_slice(chip)[0] if platform == "tpu" else absent.gpus(_GPUS[chip], 1)[0]
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with absent.compiling_for(platform, chip, device) as platforms:
        with _chosen_knowingly():
            # A new function each time: jit would hand back what it traced for another target.
            traced = jax.jit(lambda *args: function(*args)).trace(*arguments)
            lowered = traced.lower(lowering_platforms=platforms)
        if platform == "tpu":
            for note in (notes := _tpu_notes()).iterdir():
                note.unlink()
            executable = lowered.compile()
            kernels = _mosaic_kernels(executable.as_text() or "", notes, dict(_grids(traced.jaxpr.jaxpr)))
            return Compiled(chip, tuple(kernels), executable)
        with tempfile.TemporaryDirectory() as dump:
            executable = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_emitter_re": "^ptx$"})
            kernels = (*_jax_triton_kernels(chip, lowered), *_pallas_triton_kernels(lowered, Path(dump)))
    return Compiled(chip, tuple(dict.fromkeys(kernels)), executable)


@contextlib.contextmanager
def _chosen_knowingly() -> Iterator[None]:
    """Lower Pallas-Triton kernels without the warning that the backend is to go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


# --- the compilers ----------------------------------------------------------------------------------------------------


@functools.cache
def _tpu_notes() -> Path:
    """Where libtpu writes its notes on each program: a flag of the whole process, read once."""
    folder = Path(tempfile.mkdtemp(prefix="libtpu_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tpu_slice(chip: str) -> tuple[Any, ...]:
    """The four devices of a small slice of TPUs, to lay a mesh over and compile for."""
    flags = {
        "xla_jf_dump_to": _tpu_notes(),
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "final_bundles|register-pressure",
    }
    return absent.tpus(chips.CHIPS[chip], 4, flags=" ".join(f"--{name}={value}" for name, value in flags.items()))


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


def _grids(jaxpr: Jaxpr) -> Iterator[tuple[str, int]]:
    """Name and number of steps of each Pallas call, in any function and loop."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"], math.prod(equation.params["grid_mapping"].grid)
    for inner in subjaxprs(jaxpr):
        yield from _grids(inner)


def _mosaic_kernels(hlo: str, notes: Path, steps: dict[str, int]) -> Iterator[Kernel]:
    """Of a compiled TPU module: each Mosaic call carries the scoped memory (space 1, VMEM) that it was given.

    Calls of one program share it, and the compiler notes it under one of their names. ``steps`` are by name.
    """
    noted = any(notes.iterdir())
    for call in re.findall(r'^.*custom_call_target="tpu_custom_call".*$', hlo, re.MULTILINE):
        [(name, number)] = re.findall(r"^\s*(?:ROOT )?%?([\w-]+)((?:\.\w+)*) = ", call)
        used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', call)
        sizes = re.findall(r'"memory_space":"1"[^}]*?"size":"(\d+)"', used[1]) if used else []
        program = "".join(path.read_text() for path in notes.glob(f"*-{name}{number}-*-final_bundles.txt"))
        if noted and not program:
            continue
        pressure = "".join(path.read_text() for path in notes.glob(f"*-{name}{number}-*-register-pressure.txt"))
        wanted = re.search(r"Register pressure for vregs is (\d+)", pressure)
        vectors = len(re.findall(r"v(?:st|ld) \[vmem:\[#allocation\d+_spill", program))
        scalars = len(re.findall(r"s(?:st|ld) \[smem:\[#allocation\d+_spill", program))
        bundles = len(re.findall(r"^ *0x\w+ +(?:\w\w)?: +>", program, re.MULTILINE))  # marked as inside of a loop
        name = re.sub(r"^(?:transpose_)?jvp_(\w+?)_+$", r"\1", name)  # without the marks of the transformation
        yield Kernel(
            name,
            memory=sum(map(int, sizes)),
            registers=int(wanted[1]) if wanted else None,
            spills=4096 * vectors + 4 * scalars if noted else None,
            steps=steps[name],
            bundles=bundles if noted else None,
        )


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
        compiler = _GPUS[chip].compiler
        if compiler is not None and shared > compiler.shared:
            raise CannotCompile(f"{name} needs {shared} bytes of shared memory; a block of {chip} has at most "
                                f"{compiler.shared}")  # fmt: skip
        yield _assembled(kernel[4].decode(), {name: shared})[name]


def _pallas_triton_kernels(lowered: jax.stages.Lowered, dump: Path) -> Iterator[Kernel]:
    """XLA compiles these, one PTX file a module; XLA's own fusions beside them are left out."""
    ours = {config["name"].value for config in _custom_calls(lowered, "__gpu$xla.gpu.triton")}
    launches = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    shared = {
        name: int(size)
        for name, size in re.findall(r"(\S+) grid: .*shared_memory: (\d+) bytes", launches)
        if re.sub(r"__\d+$", "", name) in ours
    }
    for path in sorted(dump.glob("*.ptx")):
        ptx = path.read_text()
        if not shared.keys().isdisjoint(re.findall(r"\.entry (\w+)", ptx)):
            yield from _assembled(ptx, shared).values()


def _assembled(ptx: str, dynamic: dict[str, int]) -> dict[str, Kernel]:
    """What ptxas says of the entries named in ``dynamic``, whose values are their dynamic shared memory in bytes."""
    [architecture] = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx.rstrip("\0"))
        command = [_ptxas(), "-v", f"-arch={architecture}", str(source), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotCompile(f"ptxas: {done.stderr.strip().splitlines()[0]}")
    kernels = {}
    for part in done.stderr.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        if name in dynamic:
            static = re.search(r"(\d+) bytes smem", part)
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
            [registers] = re.findall(r"Used (\d+) registers", part)
            memory = dynamic[name] + (int(static[1]) if static else 0)
            kernels[name] = Kernel(name, memory, int(registers), spills)
    return kernels


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-start", "copy-done"}
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "f64": 64}


def _bytes_moved(hlo: str) -> tuple[int, int]:
    """Of the entry computation of a module: bytes of all operands and results, and of its arguments and results."""

    def size(kind: str) -> int:
        return sum(
            _BITS[name] // 8 * math.prod(int(n) for n in dims.split(",") if n)
            for name, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", kind)
        )

    sizes, moved, compulsory = {}, 0, 0
    for line in hlo[hlo.index("\nENTRY ") :].splitlines()[2:]:
        match = re.match(r"\s*(ROOT )?%?(\S+) = (.*?) ([a-z-]+)\((.*?)\)(?:,|$)", re.sub(r"/\*.*?\*/", "", line))
        if match is None:
            continue
        root, name, kind, operation, operands = match.groups()
        sizes[name] = size(kind)
        if operation not in _FREE:
            moved += sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([^\s,]+)", operands))
        compulsory += sizes[name] * ((operation == "parameter") + bool(root))
    return moved, compulsory


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
