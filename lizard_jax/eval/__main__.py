"""Measure a checkpoint, teacher or linearized.

python -m lizard_jax.eval perplexity CKPT --data text.txt
python -m lizard_jax.eval NAME --help

CKPT is an HF directory or hub id, a Flax directory, or a run's stage directory.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import lizard_jax.eval
from lizard_jax import devices
from lizard_jax.program import ended, program


def evaluations() -> dict[str, Any]:
    """The modules of this package that are evaluations, by the name they are called by."""
    names = sorted(module.name for module in pkgutil.iter_modules(lizard_jax.eval.__path__))
    modules = (importlib.import_module(f"lizard_jax.eval.{name}") for name in names if not name.startswith("_"))
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}


def arguments(modules: dict[str, Any]) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("python -m lizard_jax.eval"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="evaluation", required=True, metavar="NAME")
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
        devices.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return ended(lambda: _main(argv), interrupted="interrupted; no result was written")


def _main(argv: Sequence[str] | None) -> int:
    modules = evaluations()
    args = arguments(modules).parse_args(argv)
    with devices.over(args):
        modules[args.evaluation].run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
