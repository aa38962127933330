"""The command line, made from the dataclasses of ``config``: one flag for each field, its help from the field.

A run's settings are the recipe's, with the named preset's attention below the recipe's own changes to it, and the
command line's on top.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import math
import pkgutil
import sys
import types
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lizard_jax.config import LizardConfig, ModelConfig, RunConfig, preset, to_dict
from lizard_jax.errors import UserError
from lizard_jax.program import program

# Flags are named as their field. These two groups take their own name in front, and these fields another name.
_PREFIXED = ("lora", "mesh")
_PLAN = ("plan", "price", "plan_layers")
_RENAMED = {"recipe": "config", "data.path": "data", "data.seed": "data-seed"}
_GROUPS = {
    "": "run",
    "attention": "attention",
    "data": "data",
    "optim": "optimizer",
    "lora": "LoRA",
    "mesh": "mesh",
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One field of the run's settings: ``group.name`` as a flag."""

    group: str
    field: dataclasses.Field
    kind: Any

    @property
    def key(self) -> str:
        """The field's dotted name inside ``RunConfig``."""
        return f"{self.group}.{self.field.name}" if self.group else self.field.name

    @property
    def flag(self) -> str:
        """The flag as typed, ``--sequence-length``."""
        prefixed = f"{self.group}-{self.field.name}" if self.group in _PREFIXED else self.field.name
        return "--" + _RENAMED.get(self.key, prefixed).replace("_", "-")


def flags() -> Iterator[Flag]:
    """Every leaf field of ``RunConfig``, its own first, then group by group."""
    hints = get_type_hints(RunConfig)
    fields = dataclasses.fields(RunConfig)
    for field in fields:
        if not dataclasses.is_dataclass(hints[field.name]):
            yield Flag("", field, hints[field.name])
    for field in fields:
        if dataclasses.is_dataclass(hints[field.name]):
            inner = get_type_hints(hints[field.name])
            for leaf in dataclasses.fields(hints[field.name]):
                yield Flag(field.name, leaf, inner[leaf.name])


def _configs() -> ModuleType:
    """``configs/`` of the repository, or its copy inside an installed package."""
    inside = importlib.util.find_spec("lizard_jax.configs") is not None
    return importlib.import_module("lizard_jax.configs" if inside else "configs")


def recipes() -> list[str]:
    """Names of the recipes in ``configs/``."""
    names = (module.name for module in pkgutil.iter_modules(_configs().__path__))
    return sorted(name for name in names if not name.startswith("_"))


def load_recipe(name: str, stage: int) -> RunConfig:
    """The recipe's settings for one stage.

    Raises:
        UserError: no such recipe, or the recipe has no such stage.
    """
    if name not in recipes():
        raise UserError(f"unknown recipe {name!r}; choose from {', '.join(recipes())}")
    stages: dict[int, RunConfig] = importlib.import_module(f"{_configs().__name__}.{name}").RECIPE
    if stage not in stages:
        raise UserError(f"recipe {name!r} has no stage {stage}; it has {', '.join(map(str, sorted(stages)))}")
    return stages[stage]


def known_shape(recipe: str, teacher: str) -> ModelConfig | None:
    """The shape of a recipe's own teacher, where the recipe tells it; None for any other teacher."""
    module = importlib.import_module(f"{_configs().__name__}.{recipe}")
    own = next(iter(module.RECIPE.values())).teacher
    return getattr(module, "SHAPE", None) if teacher == own else None


def lookup(config: Any, key: str) -> Any:
    """The value at a dotted name."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def override(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The settings with the values at these dotted names replaced; each group is checked once, as a whole."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    own = groups.pop("", {})
    for group, changed in groups.items():
        own[group] = dataclasses.replace(getattr(config, group), **changed)
    return dataclasses.replace(config, **own)


def with_preset(config: RunConfig, name: str, attention: dict[str, Any]) -> RunConfig:
    """The settings with another attention preset: its switches, then the recipe's changes, then these.

    Feature width, exact heads and state size that a recipe chose are its own preset's: another stays as published.

    Raises:
        UserError: unknown preset, or switches that do not go together.
    """
    ours, base = config.attention, preset(config.preset)
    names = [field.name for field in dataclasses.fields(LizardConfig)]
    changed = {field: getattr(ours, field) for field in names if getattr(ours, field) != getattr(base, field)}
    if name != config.preset:
        for field in ("feature_half", "kept", "retrieval_window"):
            changed.pop(field, None)
        config = dataclasses.replace(config, preset=name, state_bytes="", heads="")
    return dataclasses.replace(config, attention=dataclasses.replace(preset(name), **{**changed, **attention}))


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """A config dataclass from what ``to_dict`` made of it (through JSON or not).

    Raises:
        UserError: a field that the dataclass does not have, or one of its own checks fails.
    """
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{kind.__name__} has no setting {', '.join(unknown)}; was it written by another version?")
    out = {}
    for name, value in values.items():
        inner = _dataclass_of(hints[name])
        if inner is not None and value is not None:
            if not isinstance(value, dict):
                raise UserError(f"{kind.__name__} has {name}={str(value)[:40]}, which must be an object")
            value = from_dict(inner, value)
        out[name] = tuple(value) if isinstance(value, list) else value
        if inner is None:
            _check_type(kind, name, hints[name], out[name])
    return kind(**out)


def _check_type(kind: type, name: str, hint: Any, value: Any) -> None:
    try:
        _adapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise UserError(f"{kind.__name__} has {name}={str(value)[:40]}: {reason}") from None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by dotted name, tuples as lists, so that settings compare equal across a trip through JSON."""
    out: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if isinstance(value, dict):
            out |= {f"{prefix}{name}.{leaf}": inner for leaf, inner in flatten(getattr(config, name)).items()}
        else:
            out[prefix + name] = value
    return out


def parse(argv: Sequence[str] | None = None) -> tuple[RunConfig, frozenset[str]]:
    """The run's settings, and the dotted names of those given on the command line.

    Raises:
        UserError: unknown recipe or preset, or switches that do not go together.
        SystemExit: 0 after ``--help``, 2 after a malformed command line.
    """
    first = _Parser(add_help=False)
    first.add_argument("--config", default="tiny")
    first.add_argument("--stage", type=int, choices=(0, 1, 2), default=1)
    known, _ = first.parse_known_args(argv)
    recipe = load_recipe(known.config, known.stage)
    given = vars(_parser(recipe).parse_args(argv))
    given = {key: value for key, value in given.items() if value is not None and key not in _PLAN}
    attention = {key.removeprefix("attention."): given[key] for key in given if key.startswith("attention.")}
    config = with_preset(recipe, given.get("preset", recipe.preset), attention)
    rest = {key: value for key, value in given.items() if not key.startswith("attention.")}
    return override(config, rest | {"recipe": known.config, "stage": known.stage}), frozenset(given)


def planned(argv: Sequence[str] | None = None) -> tuple[str, float | None, tuple[int, ...]] | None:
    """The machines of ``--plan``, the price of a device-hour and the depths to compile; None where a run is meant.

    Raises:
        SystemExit: 2 after a malformed command line.
    """
    parser = _Parser(add_help=False)
    _add_plan(parser)
    args, _ = parser.parse_known_args(argv)
    if args.plan is None and (args.price is not None or args.plan_layers):
        parser.error("--price and --plan-layers belong to --plan")
    return None if args.plan is None else (args.plan, args.price, args.plan_layers or ())


def _add_plan(parser: Any) -> None:
    parser.add_argument(
        "--plan", metavar="CHIPS", help="train nothing: compile the step for machines that are not here, as h100-8 or "
        "v5e-16, and say memory, time and device-hours",
    )  # fmt: skip
    parser.add_argument("--price", type=float, metavar="USD", help="of a device-hour, for the plan's bill")
    parser.add_argument(
        "--plan-layers", type=_list_of(int), metavar="A,B", help="layers to compile and go on from (default: 2,4); the "
        "model's own number alone is exact, and slow",
    )  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """argparse with flags in full only and one ``error:`` line for what it cannot read."""

    def __init__(self, **options: Any) -> None:
        super().__init__(prog=program("train.py"), allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser(recipe: RunConfig) -> argparse.ArgumentParser:
    parser = _Parser(
        description="Turn a Llama- or Mistral-style checkpoint into its linear twin. "
        "Stage 1 distils each layer's attention, stage 2 adapts the whole model with LoRA, "
        "stage 0 pretrains a small teacher. A run directory that holds a checkpoint is resumed.",
        epilog=f"Recipes: {', '.join(recipes())}. Defaults shown are those of {recipe.recipe!r}, stage {recipe.stage}.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    _add_plan(parser.add_argument_group("plan"))
    for flag in flags():
        default = lookup(recipe, flag.key)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text = flag.field.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"dest": flag.key, "default": None, "help": f"{text} (default: {shown or 'empty'})"}
        if flag.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(flag.kind) is Literal:
            options["choices"] = get_args(flag.kind)
            options["type"] = type(get_args(flag.kind)[0])
        elif get_origin(flag.kind) is tuple:
            options["type"] = _list_of(get_args(flag.kind)[0])
            options["metavar"] = "A,B,…"
        else:
            options["type"] = _number if flag.kind is int else flag.kind
            options["metavar"] = {int: "N", float: "X", str: flag.field.name.upper()}[flag.kind]
        groups[flag.group].add_argument(flag.flag, **options)
    return parser


def _number(text: str) -> int:
    """An int, also as ``20_000_000`` or ``2e7``."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
    if not math.isfinite(value) or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


_number.__name__ = "whole number"


def _list_of(kind: type) -> Any:
    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    read.__name__ = f"list of {kind.__name__}"
    return read


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass a type hint names, also as ``X | None``."""
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)
