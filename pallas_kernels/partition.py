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
    """The mesh axes that batch rows, heads and a text's tokens are split over.

    With ``time`` a device holds a stretch of every text where tokens are computed one by one, and inside of attention
    all of it for heads of its own: there heads are split over ``heads`` and ``time`` together.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    time: tuple[str, ...] = ()

    def parts(self, names: tuple[str, ...]) -> int:
        """Devices along these axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def inside(self) -> tuple[str, ...]:
        """What heads are split over inside of attention."""
        return (*self.heads, *self.time)


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
    return 1 if partition is None else _parts(partition, partition.batch, rows)


def head_parts(heads: int) -> int:
    """The same of so many key heads."""
    partition = _current.get()
    return 1 if partition is None else _parts(partition, partition.inside, heads)


def time_parts(time: int) -> int:
    """The same of so many tokens, outside of attention."""
    partition = _current.get()
    return 1 if partition is None else _parts(partition, partition.time, time)


def spread_heads(heads: int) -> int:
    """So many heads, or where texts are split the next number that the devices divide."""
    partition = _current.get()
    if partition is None or partition.parts(partition.time) == 1:
        return heads
    parts = partition.parts(partition.inside)
    return -(-heads // parts) * parts


def _parts(partition: Partition, names: tuple[str, ...], count: int) -> int:
    parts = partition.parts(names)
    return 1 if count % parts else parts


def _pinned(partition: Partition, x: jax.Array, *axes: tuple[str, ...]) -> jax.Array:
    """``x`` split along its first axes by those of the mesh, and whole along those that the mesh does not divide."""
    fits = (
        names if names and size % partition.parts(names) == 0 else None
        for names, size in zip(axes, x.shape, strict=False)
    )
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, PartitionSpec(*fits)))


def by_rows(x: jax.Array) -> jax.Array:
    """An array ``[B, …]``, each device holding its own rows whole."""
    partition = _current.get()
    return x if partition is None or row_parts(x.shape[0]) == 1 else _pinned(partition, x, partition.batch)


def by_tokens(x: jax.Array) -> jax.Array:
    """The activations ``[B, T, D]``, each device holding its own rows, or its stretch of them, at full width.

    XLA reads how activations lie off the parameters, and split by width along ``fsdp`` they would be summed over all
    devices, for the whole batch, at every layer.
    """
    partition = _current.get()
    if partition is None or row_parts(x.shape[0]) * time_parts(x.shape[1]) == 1:
        return x
    return _pinned(partition, x, partition.batch, partition.time)


def heads_by_tokens(x: jax.Array) -> jax.Array:
    """An array ``[B, T, heads, …]`` where texts are split: before and behind attention each device has its tokens."""
    partition = _current.get()
    if partition is None or partition.parts(partition.time) == 1:
        return x
    return _pinned(partition, x, partition.batch, partition.time, partition.heads)


def by_columns(x: jax.Array) -> jax.Array:
    """The matrix ``[D, V]``, its columns split as heads are and each of them whole."""
    partition = _current.get()
    if partition is None:
        return x
    return _pinned(partition, x, (), partition.heads)


def spread(function: Callable, roles: tuple[Any, ...], results: Any, rows: int, heads: Sequence[int]) -> Callable:
    """``function`` on each device's part of its arguments; inside it there is one device.

    Args:
        roles: for each argument a PartitionSpec of ``"batch"`` and ``"heads"`` (or a pytree of them).
        results: the same for what it returns.
        rows: size of the batch axis. Where the mesh does not divide it, every device computes every row.
        heads: sizes of the head axes. Where the mesh does not divide each, every device computes every head.
    """
    partition = _current.get()
    if partition is None or partition.mesh.size == 1:
        return function
    sizes = {"batch": [rows], "heads": heads}
    axes = {"batch": partition.batch, "heads": partition.inside}
    for role, names in axes.items():
        if any(size % partition.parts(names) for size in sizes[role]):
            axes[role] = ()

    def place(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(axes.get(role) or None for role in spec))

    def own(*arrays: Any) -> Any:
        with over(None):
            return function(*arrays)

    specs = jax.tree.map(place, (roles, results), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return jax.shard_map(own, mesh=partition.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
