"""The only mesh knowledge: axes, where each parameter lies, and how a batch is split.

Parameters are placed by a table of path patterns. Everything else follows from it: an optimizer moment ends in its
parameter's path, so the same row places it. XLA's partitioner does the rest (pjit semantics).
"""

import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lizard_jax.config import MeshConfig
from lizard_jax.errors import UserError
from pallas_kernels.partition import Partition

AXES = ("data", "fsdp", "tensor", "seq")
BATCH = PartitionSpec(("data", "fsdp"))
SILENCE = 30
"""Seconds after which a process that is not heard of counts as dead, and ends all others."""

# The first row whose pattern is found in the path decides. Kernels are [in, out]; an adapter's low-rank axis is whole.
# SPLIT is every axis that divides weights beside "tensor": devices that share a text hold a part of them each.
SPLIT = ("fsdp", "seq")
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(q|k|v|gate|up)_proj/lora_a$", PartitionSpec(SPLIT, None)),
    (r"(q|k|v|gate|up)_proj/lora_b$", PartitionSpec(None, "tensor")),
    (r"(o|down)_proj/lora_a$", PartitionSpec("tensor", None)),
    (r"(o|down)_proj/lora_b$", PartitionSpec(None, SPLIT)),
    (r"(q|k|v|gate|up)_proj/kernel$", PartitionSpec(SPLIT, "tensor")),
    (r"(o|down)_proj/kernel$", PartitionSpec("tensor", SPLIT)),
    (r"(q|k|v|gate|up)_proj/bias$", PartitionSpec("tensor")),
    (r"embed/embedding$", PartitionSpec("tensor", SPLIT)),
    (r"lm_head/kernel$", PartitionSpec(SPLIT, "tensor")),
    (r"mixer/(short/|more/\d+/)?phi_(q|k)/\w+$", PartitionSpec("tensor", "fsdp", None)),
)


def start_distributed() -> None:
    """Join the other processes of a multi-host launch; do nothing when there is only this one.

    A launch is multi-host where ``JAX_COORDINATOR_ADDRESS`` is set (with ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``), or where a step of Slurm (what ``srun`` starts), Open MPI or a TPU pod has more than one task.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env and "JAX_PROCESS_ID" in env:
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(env["JAX_NUM_PROCESSES"]),
            process_id=int(env["JAX_PROCESS_ID"]),
            heartbeat_timeout_seconds=SILENCE,
        )
        return
    tasks = int(env.get("OMPI_COMM_WORLD_SIZE", 1))
    if "SLURM_STEP_NODELIST" in env:
        tasks = max(tasks, int(env.get("SLURM_NTASKS", 1)))
    elif env.get("SLURM_NTASKS", "1") != "1":
        print(
            f"note: Slurm gives this job {env['SLURM_NTASKS']} tasks, and this is one process; start it with srun to "
            "use them all", file=sys.stderr, flush=True,
        )  # fmt: skip
    pod = "," in env.get("TPU_WORKER_HOSTNAMES", "")
    if "JAX_COORDINATOR_ADDRESS" in env or tasks > 1 or pod:
        jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """The sizes of the axes ``data, fsdp, tensor, seq`` on that many devices.

    Raises:
        UserError: more than one -1, a size below one, or a product that is not the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor, config.seq]
    named = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {named}: each axis is a positive number, and at most one is -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if int(np.prod(sizes)) != devices:
        raise UserError(f"mesh {named} does not cover the {devices} devices here; their product must be {devices}")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def make_mesh(config: MeshConfig, *, some: bool = False) -> Mesh:
    """A mesh over all devices of all processes, with ``AxisType.Auto`` axes ``data, fsdp, tensor, seq``.

    Args:
        some: over the first as many as the axes take, each of which is positive, where there may be more.

    Raises:
        UserError: the axes do not cover the devices, or there are not as many.
    """
    devices = jax.devices()
    if some:
        needed = config.data * config.fsdp * config.tensor * config.seq
        if needed > len(devices):
            raise UserError(f"a mesh of {needed} devices was asked for, and there are {len(devices)} here")
        devices = devices[:needed]
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as ``layers/0/self_attn/q_proj/kernel``, without the attribute nnx keeps the array under."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def partition_spec(name: str, shape: tuple[int, ...], axis_sizes: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of the array at that path; an axis that does not divide its dimension is left whole."""

    def place(axis: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        whole = (axis,) if isinstance(axis, str) else axis or ()
        names = [name for name in whole if name != "seq" or axis_sizes.get(name, 1) > 1]
        if not names or size % math.prod(axis_sizes[name] for name in names):
            return None
        return tuple(names) if len(names) > 1 else names[0]

    for pattern, spec in RULES:
        if re.search(pattern, name) and len(spec) == len(shape):
            return PartitionSpec(*map(place, spec, shape))
    return PartitionSpec()


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedShardings for a pytree of arrays or ShapeDtypeStructs (parameters, optimizer state), same structure."""
    sizes = dict(mesh.shape)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, sizes))

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over ``data`` and ``fsdp`` together; ``tensor`` and ``seq`` see every row."""
    return NamedSharding(mesh, BATCH)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of host arrays, its rows over the mesh."""
    return put(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))


def kernel_partition(mesh: Mesh) -> Partition:
    """How the kernels' arrays lie: rows like a batch's, heads over ``tensor``, a text's tokens over ``seq``."""
    return Partition(mesh, batch=("data", "fsdp"), heads=("tensor",), time=("seq",))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_devices(mesh: Mesh) -> int:
    """Among how many devices a batch's rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuse a batch whose rows do not divide over the mesh, in as many parts.

    Raises:
        UserError: ``batch_size`` is not a multiple of data x fsdp x accumulate.
    """
    devices = row_devices(mesh)
    if batch_size % (devices * accumulate):
        each = f" in {accumulate} parts (--accumulate)" if accumulate > 1 else ""
        raise UserError(
            f"batch size {batch_size} does not divide over data x fsdp = {devices} devices{each}; use a multiple of "
            f"{devices * accumulate}"
        )


def check_split(length: int, kv_heads: int, mesh: Mesh) -> None:
    """Refuse a mesh that texts of ``length`` tokens, or their key heads, cannot be split over.

    Raises:
        UserError: ``seq`` does not divide the length, or with ``tensor`` is more than there are key heads.
    """
    parts, together = mesh.shape["seq"], mesh.shape["seq"] * mesh.shape["tensor"]
    if length % parts:
        raise UserError(f"--mesh-seq={parts} does not divide --sequence-length={length}; give a multiple of {parts}")
    if parts > 1 and together > kv_heads:
        raise UserError(
            f"--mesh-seq={parts} x --mesh-tensor={mesh.shape['tensor']} devices share a text by its key heads, and the "
            f"model has {kv_heads}; split it over fewer, and rows over the others (--mesh-fsdp)"
        )


def put(tree: Any, shardings: Any) -> Any:
    """Place arrays that every process holds whole; those on the mesh already stay."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def on_host(tree: Any) -> Any:
    """The whole of every array as numpy's, in every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
