"""Measure a checkpoint, teacher or linearized.

python -m lizard_jax.eval perplexity CKPT --data text.txt
python -m lizard_jax.eval NAME --help

CKPT is an HF directory or hub id, a Flax directory, or a run's stage directory.
"""

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import lizard_jax.eval
from lizard_jax.errors import UserError
from lizard_jax.program import program


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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    modules = evaluations()
    told = arguments(modules).parse_args(argv)
    try:
        modules[told.evaluation].run(told)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # What is left in the buffer cannot be written either, and Python would say so once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: the output was closed before the results were written", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or told.evaluation}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no result was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
