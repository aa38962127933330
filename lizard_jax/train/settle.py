"""What a run's settings leave open, settled before anything is trained: as stage 1 or a begun run has it, else by the
mesh, the teacher and the text."""

import sys
from datetime import date
from pathlib import Path

import jax
from jax.sharding import Mesh

from lizard_jax import sharding
from lizard_jax.cli import flatten, from_dict, override
from lizard_jax.config import RunConfig
from lizard_jax.embedded import budgets_path
from lizard_jax.errors import UserError
from lizard_jax.select import budgets
from lizard_jax.select.choice import resolved
from lizard_jax.train import checkpoint
from lizard_jax.train.teacher import find_teacher

# What stage 2 takes over from stage 1, unless the command line says otherwise: what it adapts, and the text.
CARRIED = (
    "teacher", "preset", "attention", "heads", "state_bytes", "curves", "data.path", "data.format", "data.separator",
    "data.split", "data.text_column", "data.held_out", "data.segment_mask", "data.date",
)  # fmt: skip


def stage_dir(config: RunConfig, stage: int | None = None) -> Path:
    """``OUT/stageK``; OUT defaults to ``runs/RECIPE``."""
    out = Path(config.out).expanduser() if config.out else Path("runs") / config.recipe
    return out / f"stage{config.stage if stage is None else stage}"


def begun(path: Path) -> RunConfig | None:
    """The settings of the run that a stage directory holds, if it holds one.

    Raises:
        UserError: they cannot be read.
    """
    if not (path / "run.json").is_file():
        return None
    return from_dict(RunConfig, checkpoint.read_json(path / "run.json")["config"])


def continued(config: RunConfig, given: frozenset[str]) -> RunConfig:
    """Stage 2's settings with stage 1's teacher, attention and text, except for what the command line gives.

    An attention without modules of its own has no stage 1, and starts here.

    Raises:
        UserError: there is no stage 1, or the command line asks for another attention or teacher than its.
    """
    if config.stage != 2:
        return config
    first = stage_dir(config, 1)
    if not config.attention.adds_modules and not first.exists():
        return config
    if not checkpoint.has_checkpoint(first, ("best",)):
        raise UserError(f"{first} holds no stage 1 to continue from; run train.py --stage=1 with the same --out first")
    record = checkpoint.read_json(first / "run.json")
    before = from_dict(RunConfig, record["config"])
    old, new = flatten(before), flatten(config)
    if "teacher" not in given and old["teacher"] != "embedded":
        # As typed it may have meant something else than it does from here.
        old["teacher"] = str(find_teacher(first, record))
    taken = {key: old[key] for key in new if key.startswith(CARRIED)}
    asked = {key: new[key] for key in given if key in taken}
    fixed = [
        f"{key}={asked[key]!r}"
        for key in asked
        if key.startswith(("attention", "preset", "heads", "state_bytes")) and asked[key] != old[key]
    ]
    if fixed:
        raise UserError(f"stage 1 in {first} was trained with other settings than {', '.join(fixed)}; leave them out")
    values = taken | asked
    return override(config, {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def settled(config: RunConfig, given: frozenset[str], earlier: RunConfig | None, source: Path, mesh: Mesh) -> RunConfig:
    """The settings with nothing open: date, batch, key heads, budgets.

    Args:
        given: dotted names of what the command line gave.
        earlier: settings of the run that is gone on with.
        source: the teacher's directory.

    Raises:
        UserError: as each of the four does.
    """
    config = with_batch(dated(config, earlier), given, earlier, mesh)
    sharding.check_batch(config.data.batch_size, mesh, config.data.accumulate)
    if config.stage == 2 and begun(stage_dir(config, 1)) is not None:
        return config  # with stage 1's attention
    return with_budgets(with_heads(config, given, earlier, source, mesh), given, earlier, source, mesh)


def dated(config: RunConfig, earlier: RunConfig | None) -> RunConfig:
    """The settings with the date that chat templates are told: as given, or the day the run began."""
    if config.data.date:
        return config
    return override(config, {"data.date": (earlier and earlier.data.date) or date.today().isoformat()})


def with_batch(config: RunConfig, given: frozenset[str], earlier: RunConfig | None, mesh: Mesh) -> RunConfig:
    """The settings with a batch that divides over the mesh and into its parts: as given, as a begun run has it, or the
    recipe's with as many rows more as it takes.
    """
    if "data.batch_size" in given:
        return config
    if earlier is not None:
        return override(config, {"data.batch_size": earlier.data.batch_size})
    rows, devices, parts = config.data.batch_size, sharding.row_devices(mesh), config.data.accumulate
    if rows % (devices * parts) == 0:
        return config
    more = -(-rows // (devices * parts)) * devices * parts
    each = f" and {parts} parts" if parts > 1 else ""
    _say(f"note: {more} rows a step instead of {rows}, for {devices} devices{each}")
    return override(config, {"data.batch_size": more})


def with_heads(
    config: RunConfig, given: frozenset[str], earlier: RunConfig | None, source: Path, mesh: Mesh | None = None
) -> RunConfig:
    """The settings with the key heads that ``--heads`` names, as a stage 1 or a begun run chose them if there is one.

    Raises:
        UserError: no such ranking, or one of another model; or heads are named twice.
    """
    if not config.heads or config.stage == 0:
        return config
    if "attention.softmax_heads" in given:
        if "heads" in given:
            raise UserError("--heads and --softmax-heads both name key heads; give one of them")
        return override(config, {"heads": ""})  # the recipe's own
    if config.attention.softmax_heads:
        return config
    if earlier is not None and earlier.heads == config.heads:
        return override(config, {"attention.softmax_heads": earlier.attention.softmax_heads})
    return override(config, {"attention.softmax_heads": resolved(config.heads, source, config.attention.window, mesh)})


def with_budgets(
    config: RunConfig, given: frozenset[str], earlier: RunConfig | None, source: Path, mesh: Mesh | None = None
) -> RunConfig:
    """The settings with what each key head may keep, so that the state is as large as ``--state-bytes`` says; as a
    stage 1 or a begun run split it if there is one.

    A reach of exact heads that the command line did not give is what the size can pay for.

    Raises:
        UserError: no such size or curves, one that is too small, or budgets that are given already.
    """
    if not config.state_bytes or config.stage == 0:
        return config
    named = sorted(given & {"attention.kept", "attention.budgets"})
    if "state_bytes" not in given and (named or config.attention.memory == "all"):
        return override(config, {"state_bytes": ""})  # the recipe's own; what holds all tokens keeps no pairs beside
    if named:
        raise UserError(f"--state-bytes says what is kept; leave out --{named[0].removeprefix('attention.')}")
    if config.attention.budgets:
        return config
    names = ("budgets", "kept", "retrieval_window")
    if earlier is not None and (earlier.state_bytes, earlier.curves) == (config.state_bytes, config.curves):
        names = [name for name in names if f"attention.{name}" not in given]
        return override(config, {f"attention.{name}": getattr(earlier.attention, name) for name in names})
    curves = config.curves
    default = (config.teacher, config.data.path) == ("embedded", "embedded")
    if not curves and default and budgets.read(budgets_path()).window == config.attention.window:
        curves = str(budgets_path())
    spent = budgets.split(
        config.state_bytes, source, config.attention, config.data, curves, dtype=config.dtype, mesh=mesh,
        reach_follows="attention.retrieval_window" not in given,
    )  # fmt: skip
    _say(spent.summary())
    return override(config, {f"attention.{name}": getattr(spent.switches, name) for name in names})


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
