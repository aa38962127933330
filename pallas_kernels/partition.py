"""Kernels on many devices: each device runs the kernel on its own batch rows and heads, inside ``shard_map``.

XLA cannot split a kernel by itself. Whoever traces a sharded computation says how its arrays lie (``over``), and the
ops split themselves accordingly; without it they see one device.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# How an argument's axes lie, in roles; ``spread`` puts the mesh's axes in their place.
TOKENS = PartitionSpec("batch", None, "heads")
MEMORY = PartitionSpec("batch", "heads")
BATCH = PartitionSpec("batch")
HEADS = PartitionSpec("heads")
WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh axes that batch rows and heads are split over."""

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]


_current: contextvars.ContextVar[Partition | None] = contextvars.ContextVar("kernel_partition", default=None)


@contextlib.contextmanager
def over(partition: Partition | None) -> Iterator[None]:
    """Split the kernels that are traced inside."""
    token = _current.set(partition)
    try:
        yield
    finally:
        _current.reset(token)


def mesh() -> Mesh | None:
    """The mesh of ``over``; None without it."""
    partition = _current.get()
    return None if partition is None else partition.mesh


def row_parts(rows: int) -> int:
    """Over how many parts so many batch rows are split: 1 without ``over``, or where the mesh does not divide them."""
    partition = _current.get()
    return 1 if partition is None else _parts(partition.mesh, partition.batch, rows)


def head_parts(heads: int) -> int:
    """The same of so many key heads."""
    partition = _current.get()
    return 1 if partition is None else _parts(partition.mesh, partition.heads, heads)


def _parts(mesh: Mesh, names: tuple[str, ...], count: int) -> int:
    parts = math.prod(mesh.shape[name] for name in names)
    return 1 if count % parts else parts


def by_rows(x: jax.Array) -> jax.Array:
    """The activations ``[B, …]``, each device holding its own rows whole.

    XLA reads how activations lie off the parameters, and split by width along ``fsdp`` they would be summed over all
    devices, for the whole batch, at every layer.
    """
    partition = _current.get()
    if partition is None or row_parts(x.shape[0]) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, PartitionSpec(partition.batch)))


def by_columns(x: jax.Array) -> jax.Array:
    """The matrix ``[D, V]``, its columns split as heads are and each of them whole."""
    partition = _current.get()
    if partition is None:
        return x
    parts = math.prod(partition.mesh.shape[name] for name in partition.heads)
    spec = PartitionSpec(None, None if x.shape[1] % parts else partition.heads)
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, spec))


def spread(function: Callable, roles: tuple[Any, ...], results: Any, rows: int, heads: Sequence[int]) -> Callable:
    """``function`` on each device's part of its arguments.

    Args:
        roles: for each argument a PartitionSpec of ``"batch"`` and ``"heads"`` (or a pytree of them).
        results: the same for what it returns.
        rows: size of the batch axis. Where the mesh does not divide it, every device computes every row.
        heads: sizes of the head axes. Where the mesh does not divide each, every device computes every head.
    """
    partition = _current.get()
    if partition is None:
        return function
    sizes = {"batch": [rows], "heads": heads}
    axes = {"batch": partition.batch, "heads": partition.heads}
    for role, names in axes.items():
        parts = math.prod(partition.mesh.shape[name] for name in names)
        if any(size % parts for size in sizes[role]):
            axes[role] = ()
    if all(partition.mesh.shape[name] == 1 for names in axes.values() for name in names):
        return function

    def place(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(axes.get(role) or None for role in spec))

    specs = jax.tree.map(place, (roles, results), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return jax.shard_map(function, mesh=partition.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
