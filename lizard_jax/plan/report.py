"""The command ``train.py --plan CHIPS``: a row for each mesh as it is found, then the best and its bill."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lizard_jax.cli import known_shape
from lizard_jax.config import ModelConfig, RunConfig
from lizard_jax.convert.files import read_json, teacher_dir
from lizard_jax.convert.hf_config import model_config
from lizard_jax.embedded import teacher_config
from lizard_jax.errors import UserError
from lizard_jax.plan.absent import CannotCompile
from lizard_jax.plan.estimate import (
    SPREAD,
    Machines,
    Plan,
    checked,
    forward_passes,
    hours,
    likely,
    machines,
    plan,
    variants,
)
from lizard_jax.sharding import AXES
from lizard_jax.train.loop import total_steps

FITS = {True: "yes", None: "unsure", False: "no"}
WIDTH = 124
"""Columns of the table, also where the terminal has fewer or there is none."""


def show(
    config: RunConfig, given: frozenset[str], target: str, price: float | None, depths: tuple[int, ...] = ()
) -> None:
    """Print the plan of a run on machines that are not here.

    Args:
        given: dotted names of the settings that the command line gave.
        target: as ``machines`` reads it.
        price: USD of a device-hour.
        depths: layers that are compiled, as ``plan`` has them.

    Raises:
        UserError: no such machines, no such teacher, compilers that are not installed, or nothing that fits.
    """
    where = machines(target)
    if price is not None and not 0 < price < 1e6:
        raise UserError(f"--price {price:g} is no price of a device-hour")
    shape = likely(config, shape_of(config))
    checked(depths, shape.num_layers)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    try:
        chosen = list(variants(config, given, where, shape))
        if not chosen:
            raise UserError(
                f"parameters and optimizer alone do not fit {target} on any mesh that was tried; take more chips"
            )
        found = []
        for settled, mesh in tqdm(chosen, desc="compiling", unit="mesh", file=sys.stderr, disable=None, leave=False):
            found.append((settled, plan(settled, shape, where, mesh, depths)))
    except CannotCompile as error:
        raise UserError(f"{error}; uv run --group test train.py --plan … brings it") from None
    console.print(table(config, target, where, shape, [each for _, each in found]))
    if len(continued := found[0][1].depths) > 1:
        console.print(
            f"Temporary memory is continued from {continued[0]} and {continued[1]} layers: the whole program can take "
            f"up to {SPREAD:g} times more or less, and what that leaves open is unsure; --plan-layers "
            f"{shape.num_layers} compiles it."
        )
    judged = [(each.fits(where.chip.memory), settled, each) for settled, each in found]
    # What may not fit is advised only where nothing surely does.
    fitting = [pair for fits, *pair in judged if fits] or [pair for fits, *pair in judged if fits is None]
    if not fitting:
        console.print(
            f"nothing fits {where.chip.memory / 2**30:.0f} GiB; take more chips, fewer --batch-size or a shorter "
            "--sequence-length"
        )
        return
    settled, best = min(fitting, key=lambda pair: pair[1].most / pair[0].data.batch_size)
    console.print("\n".join(words(settled, shape, where, best, price)))


def shape_of(config: RunConfig) -> ModelConfig:
    """The teacher's shape: from its files, or as the recipe knows it.

    Raises:
        UserError: neither.
    """
    if config.teacher == "embedded":
        return teacher_config()
    known = known_shape(config.recipe, config.teacher)
    return known if known is not None else model_config(read_json(teacher_dir(config.teacher) / "config.json"))


def table(config: RunConfig, target: str, where: Machines, shape: ModelConfig, found: list[Plan]) -> Table:
    """A row a mesh."""
    out = Table(title=f"{config.recipe}, stage {config.stage}, {target}: GiB of a device, and milliseconds of a step")
    heads = ["mesh", "weights", "optimizer", "temporary", "code", "all", "fits", "compute", "memory", "links", "step"]
    for head in heads:
        out.add_column(head, justify="left" if head == "mesh" else "right", no_wrap=True)
    for each in found:
        own = each.parts
        sizes = (own.frozen + own.trained, own.optimizer + own.batch, each.temporaries, each.code, each.total)
        fits = FITS[each.fits(where.chip.memory)]
        mesh = " x ".join(map(str, _named(each))) + (
            "" if config.stage == 1 else ", remat" if each.remat else ", no remat"
        )
        times = (1e3 * each.compute, 1e3 * each.reading, 1e3 * each.sending)
        out.add_row(
            mesh, *(f"{size / 2**30:.2f}" for size in sizes), fits, *(f"{time:.1f}" for time in times),
            f"{1e3 * each.least:.0f}–{1e3 * each.most:.0f}",
        )  # fmt: skip
    return out


def _named(found: Plan) -> tuple[int, ...]:
    """The mesh, without its last axis where no text is split."""
    return found.mesh if found.mesh[-1] > 1 else found.mesh[:-1]


def minutes(seconds: float) -> str:
    """A time as one says it."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def words(config: RunConfig, shape: ModelConfig, where: Machines, best: Plan, price: float | None) -> list[str]:
    """What the best row means for the run."""
    rows, time, steps = config.data.batch_size, config.data.sequence_length, total_steps(config)
    low, high = hours(config, best, where.devices)
    tokens = rows * time
    out = [
        ("best: " if best.fits(where.chip.memory) else "best, if it fits: ")
        + " ".join(f"--mesh-{axis}={size}" for axis, size in zip(AXES, _named(best), strict=False))
        + f" --batch-size={rows}"
        + ("" if config.stage == 1 else " --remat" if best.remat else " --no-remat"),
        f"{best.flops / 1e12:,.1f} TFLOP a step of {rows} x {time} tokens ({forward_passes(config, shape, best):.2f} "
        f"forward passes of the teacher), {best.memory / 1e9:.1f} GB of its memory and {best.links / 1e9:.2f} GB over "
        "links a device",
        f"{steps:,} steps: {steps * best.least / 3600:.2f} to {steps * best.most / 3600:.2f} hours, {low:.1f} to "
        f"{high:.1f} device-hours, {tokens / best.most:,.0f} to {tokens / best.least:,.0f} tokens a second",
    ]
    if price is not None:
        out.append(f"at {price:g} USD a device-hour {low * price:,.2f} to {high * price:,.2f} USD")
    exact = len(shape.attention.softmax_heads) if shape.attention is not None else 0
    assumed = f"{exact // shape.num_layers} exact key heads a layer, " if exact else ""
    kept = f"{assumed}{shape.attention.kept} kept pairs for every other" if shape.attention is not None else ""
    depth = " and ".join(map(str, best.depths)) + " layers" if len(best.depths) > 1 else "its whole depth"
    out.append(
        "Bounds at the chip's peaks, which real programs stay below: from all three overlapping to none of them. "
        f"From the program compiled at {depth}{f'; assumed: {kept}' if kept else ''}. Validations, checkpoints and "
        f"compiling come on top: the step once, roughly {minutes(best.tracing + best.compiling)} of a processor such "
        f"as this one's; {minutes(best.tracing)} of them again whenever the run starts."
    )
    return out
