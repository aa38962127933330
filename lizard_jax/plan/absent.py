"""Devices of chips that are not here, to lay a mesh over and compile for.

TPUs through libtpu, GPUs through JAX's CUDA plugin; neither needs the hardware, a driver, or another platform than the
one this process runs on. The ``test`` group brings both.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import target
from pallas_kernels.chips import Chip

_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
TORUS = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBE, "tpu7x": _CUBE}
"""By TPU and number of chips, the slice."""


class CannotCompile(RuntimeError):
    """A compiler is not installed, or a kernel does not fit its chip; says which in one line."""


def counts(chip: Chip) -> tuple[int, ...] | None:
    """How many chips of a kind there can be together; None: any number up to a node, or whole nodes."""
    return tuple(TORUS[chip.target]) if chip.platform == "tpu" else None


@functools.cache
def tpus(chip: Chip, count: int, *, flags: str = "") -> tuple[Any, ...]:
    """The devices of that many TPU chips.

    Args:
        count: one of ``counts``.
        flags: for libtpu, which reads them once in a process: when the first devices are asked for.

    Raises:
        CannotCompile: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CannotCompile(f"compiling for {chip.target} needs libtpu, which is not installed")
    # Only while libtpu loads: it would look for a TPU and for its neighbours, and other processes read these too.
    with _environment(
        LIBTPU_INIT_ARGS=f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_STDERR_LOG_LEVEL="3",
    ):
        slice_ = f"{chip.target}:{TORUS[chip.target][count]}"
        return tuple(topologies.get_topology_desc(slice_, platform="tpu").devices)


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
def gpus(chip: Chip, count: int) -> tuple[Any, ...]:
    """The devices of that many GPUs, ``chip.node`` to a host.

    Raises:
        CannotCompile: JAX's CUDA plugin is not installed.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise CannotCompile(f"compiling for {chip.target} needs jax-cuda13-plugin, which is not installed")
    card = chip.compiler
    assert card is not None
    assert chip.node is not None
    config = f"""
        platform_name: "CUDA"
        device_description_str: "{card.name}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          cuda_compute_capability {{ {card.capability} }}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_core: {card.shared_per_core}
          shared_memory_per_block_optin: {card.shared}
          core_count: {card.cores}
          fpus_per_core: {card.fp32_lanes}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {int(chip.bandwidth)}
          l2_cache_size: {card.l2}
          clock_rate_ghz: {card.clock_ghz}
          device_memory_size: {chip.memory}
        }}"""
    hosts = max(1, count // chip.node)
    shape = f"1x{hosts}x{count // hosts}"
    return tuple(topologies.get_topology_desc("", platform="cuda", target_config=config, topology=shape).devices)


@contextlib.contextmanager
def compiling_for(platform: str, chip: str, device: Any) -> Iterator[tuple[str]]:
    """Inside, what is traced, lowered and compiled is for a device that is not here; gives what to lower with, as JAX's
    ``lowering_platforms``. JAX's cache of compiled programs is left alone: without the device none can be read back.

    Args:
        platform, chip: as a ``Target`` has them.
        device: one of ``tpus`` or ``gpus``.
    """
    cores = getattr(device, "num_cores" if platform == "tpu" else "core_count", None)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device.device_kind, cores, platform))
    with target.override(target.Target(platform, chip)), jax.sharding.use_abstract_mesh(mesh), _nothing_kept():
        yield ("tpu" if platform == "tpu" else "cuda",)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # else JAX goes by what it found when it compiled for the first time
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
