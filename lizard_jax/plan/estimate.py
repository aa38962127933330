"""What a run takes of absent machines: memory, work and time of its step on a mesh, and the run's device-hours.

Layers are alike, so the step is compiled at two depths and everything that grows is continued to the model's. Which key
heads stay exact, and which keep how many pairs, is for the weights to say; here every layer has as many exact heads,
and every other head as many pairs as fill the state.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

from jax.sharding import Mesh

from lizard_jax import sharding
from lizard_jax.cli import override
from lizard_jax.config import ModelConfig, RunConfig
from lizard_jax.errors import UserError
from lizard_jax.models.flops import forward_flops
from lizard_jax.plan import absent
from lizard_jax.plan.step import Parts, compiled, flops, mesh_over, parts
from lizard_jax.select import budgets
from lizard_jax.select.choice import asked
from lizard_jax.train.loop import total_steps
from pallas_kernels.chips import CHIPS, Chip

DEPTHS = (2, 4)
"""Layers that are compiled; the first adds more to what is alive at once than those after it."""
ROOM = 0.92
"""Of a device's memory, what a program can have."""
SPREAD = 3.0
"""Times that whole programs' temporary memory may be more or less than what two depths continue to; up to 2.7 were seen
(``benchmarks/plans.md``)."""


@dataclasses.dataclass(frozen=True)
class Machines:
    """Chips that are not here."""

    chip: Chip
    count: int

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.count * self.chip.devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a mesh; bytes and seconds are of one device.

    Attributes:
        mesh: sizes of its axes, and ``remat`` as in the settings.
        parts: what lies there between steps.
        temporaries, code: what a step needs beside them.
        flops: of all devices.
        memory, links: bytes that a step moves.
        kinds: bytes of results of its collectives, by kind.
        compute, reading, sending: seconds that the chip cannot beat for each.
        tracing: seconds of this machine's processor before its first step's program is there, of all threads.
        compiling: seconds of it to compile the program, where none is kept.
        depths: layers of what was compiled; two where the model's are continued from them.
    """

    mesh: tuple[int, ...]
    remat: bool
    parts: Parts
    temporaries: float
    code: float
    flops: float
    memory: float
    links: float
    kinds: dict[str, float]
    compute: float
    reading: float
    sending: float
    tracing: float
    compiling: float
    depths: tuple[int, ...]

    @property
    def total(self) -> float:
        """Bytes at the step's height."""
        return self.parts.total + self.temporaries + self.code

    def fits(self, memory: float) -> bool | None:
        """Whether a device of so many bytes has room for it; None where what two depths continue to cannot say."""
        room = ROOM * memory - self.parts.total
        off = SPREAD if len(self.depths) > 1 else 1.0
        if off * self.temporaries + self.code <= room:
            return True
        # Of a whole program's code next to nothing was seen where two depths continued to much.
        return None if len(self.depths) > 1 and self.temporaries / off <= room else False

    @property
    def least(self) -> float:
        """Seconds of a step where everything overlaps."""
        return max(self.compute, self.reading, self.sending)

    @property
    def most(self) -> float:
        """Seconds of a step where nothing overlaps, at the chip's peaks."""
        return self.compute + self.reading + self.sending


def machines(text: str) -> Machines:
    """What ``h100-8`` asks for.

    Raises:
        UserError: no such chip, or they do not come in that number.
    """
    match = re.fullmatch(r"(\w+?)-(\d{1,5})", text)
    if match is None or match[1] not in CHIPS or not int(match[2]):
        raise UserError(f"--plan {text}: give a chip and how many, as h100-8; the chips are {', '.join(CHIPS)}")
    chip, count = CHIPS[match[1]], int(match[2])
    allowed = absent.counts(chip)
    if allowed is not None and count not in allowed:
        raise UserError(f"--plan {text}: slices of {chip.title} have {', '.join(map(str, allowed))} chips")
    if chip.node is not None and count > chip.node and count % chip.node:
        raise UserError(f"--plan {text}: {chip.title}s come up to {chip.node} in a node, or in whole nodes")
    return Machines(chip, count)


def likely(config: RunConfig, shape: ModelConfig) -> ModelConfig:
    """The model with an attention as costly as the settings will make it, alike in every layer.

    Raises:
        UserError: no number of heads or no size, or one that is too small.
    """
    attention = dataclasses.replace(config.attention, budgets=())
    if config.stage == 0:
        return dataclasses.replace(shape, attention=None)
    if config.heads or attention.softmax_heads:
        share = len(attention.softmax_heads) / (shape.num_layers * shape.kv_heads)
        if not share:
            _, count = asked(config.heads)
            share = float(count[:-1]) / 100 if count.endswith("%") else int(count) / (shape.num_layers * shape.kv_heads)
        each = min(shape.kv_heads - 1, max(1, round(share * shape.kv_heads)))
        names = (f"{layer}.{head}" for layer in range(shape.num_layers) for head in range(each))
        attention = dataclasses.replace(attention, softmax_heads=tuple(names))
    if not config.state_bytes:
        return dataclasses.replace(shape, attention=attention)
    limit = budgets.size(config.state_bytes, shape, attention)
    if attention.softmax_heads and attention.retrieval_window:
        reach = budgets.reach(limit, shape, attention)
        attention = dataclasses.replace(attention, retrieval_window=reach)

    def taken(kept: int) -> int:
        whole = dataclasses.replace(shape, attention=dataclasses.replace(attention, kept=kept))
        with_pairs = shallow(whole, 1)
        return budgets.state_bytes(with_pairs, limit.length) * shape.num_layers

    budgets.check_size(limit, taken(0))
    low, high = 0, 1
    while taken(high) <= limit.bytes and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle) <= limit.bytes else (low, middle)
    return dataclasses.replace(shape, attention=dataclasses.replace(attention, kept=low))


def shallow(model: ModelConfig, layers: int) -> ModelConfig:
    """The same model with so many layers."""
    attention = model.attention
    if attention is not None:
        heads = tuple(name for name in attention.softmax_heads if int(name.split(".")[0]) < layers)
        attention = dataclasses.replace(attention, softmax_heads=heads, softmax_layers=())
    return dataclasses.replace(model, num_layers=layers, attention=attention, sliding_window_layers=None)


def variants(
    config: RunConfig, given: frozenset[str], where: Machines, shape: ModelConfig
) -> Iterator[tuple[RunConfig, Mesh]]:
    """The run on the mesh that it asks for; where it asks for none, on a few. In stage 2 also without remat.

    Rows are as many as divide over a mesh. A mesh on which parameters and optimizer alone do not fit is left out.
    """
    n = where.devices
    devices = absent.tpus(where.chip, where.count) if where.chip.platform == "tpu" else absent.gpus(where.chip, n)
    meshes = [sharding.mesh_shape(config.mesh, n)]
    if not any(key.startswith("mesh.") for key in given):
        meshes += [(n, 1, 1, 1)] if n > 1 else []
        meshes += [(1, n // 2, 2, 1)] if n > 3 and shape.kv_heads % 2 == 0 else []
    remats = [config.remat] if "remat" in given or config.stage == 1 else [config.remat, not config.remat]
    for sizes, remat in itertools.product(dict.fromkeys(meshes), remats):
        mesh = mesh_over(devices, sizes)
        sharding.check_split(config.data.sequence_length, shape.kv_heads, mesh)
        rows, over = config.data.batch_size, sharding.row_devices(mesh) * config.data.accumulate
        if "data.batch_size" in given:
            sharding.check_batch(rows, mesh, config.data.accumulate)
        settled = override(config, {"data.batch_size": -(-rows // over) * over, "remat": remat})
        settled = override(settled, {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, sizes, strict=True)})
        if parts(settled, shape, mesh).total < ROOM * where.chip.memory:
            yield settled, mesh


def checked(depths: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """The depths to compile for a model of so many layers, of those asked for.

    Raises:
        UserError: neither two of them nor the model's own.
    """
    found = tuple(sorted({min(depth, layers) for depth in depths or DEPTHS}))
    if found[0] < 1 or (len(found) != 2 and found != (layers,)):
        raise UserError(
            f"--plan-layers {','.join(map(str, depths))}: give two depths to go on from, as 2,4, or all {layers} alone"
        )
    return found


def plan(config: RunConfig, shape: ModelConfig, where: Machines, mesh: Mesh, depths: tuple[int, ...] = ()) -> Plan:
    """The run on a mesh.

    Args:
        depths: layers that are compiled: two that the model's are continued from (``DEPTHS``), or just its own.
    """
    depths = checked(depths, shape.num_layers)
    steps = [compiled(config, shallow(shape, depth), where.chip, mesh) for depth in depths]
    work = [flops(config, shallow(shape, depth)) for depth in depths]

    def deep(few: float, many: float) -> float:
        return few + (many - few) * (shape.num_layers - depths[0]) / max(1, depths[-1] - depths[0])

    def of(name: str) -> float:
        return deep(getattr(steps[0], name), getattr(steps[-1], name))

    def by_kind(found: list[dict[str, float]]) -> dict[str, float]:
        kinds = sorted(set(found[0]) | set(found[-1]))
        return {kind: max(0.0, deep(found[0].get(kind, 0), found[-1].get(kind, 0))) for kind in kinds}

    links = sum(by_kind([step.moved.links for step in steps]).values())
    memory = deep(steps[0].moved.memory, steps[-1].moved.memory)
    total, chip = deep(work[0], work[-1]), where.chip
    within = chip.node is None or where.devices <= chip.node
    return Plan(
        mesh=tuple(mesh.devices.shape),
        remat=config.remat,
        parts=parts(config, shape, mesh),
        temporaries=max(of("temporaries"), *(step.temporaries for step in steps)),
        code=of("code"),
        flops=total,
        memory=memory,
        links=links,
        kinds=by_kind([step.moved.results for step in steps]),
        compute=total / where.devices / chip.flops,
        reading=memory / chip.bandwidth,
        sending=links / (chip.link if within else chip.beyond),
        tracing=max(of("tracing"), *(step.tracing for step in steps)),
        compiling=max(of("compiling"), *(step.compiling for step in steps)),
        depths=depths,
    )


def hours(config: RunConfig, found: Plan, devices: int) -> tuple[float, float]:
    """Device-hours of the whole run, where everything overlaps and where nothing does."""
    steps = total_steps(config)
    return found.least * steps * devices / 3600, found.most * steps * devices / 3600


def forward_passes(config: RunConfig, shape: ModelConfig, found: Plan) -> float:
    """A step's FLOPs in forward passes of the teacher over the same batch."""
    return found.flops / forward_flops(shape, config.data.batch_size * config.data.sequence_length)
