"""Train one stage: ``python train.py --stage=1``; ``--help`` lists every setting."""

import os
import sys
from collections.abc import Sequence

from lizard_jax.cli import parse, planned
from lizard_jax.program import ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 for bad input, 128 + N after signal N."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return ended(lambda: _main(argv), interrupted="interrupted before the first step; nothing was written")


def _main(argv: Sequence[str] | None) -> int:
    config, given = parse(argv)
    if (machines := planned(argv)) is not None:
        from lizard_jax.plan.report import show

        show(config, given, *machines)
        return 0
    # After the command line is known to be good: these take seconds to import.
    from lizard_jax.train.loop import Stopped
    from lizard_jax.train.run import run

    try:
        run(config, given)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
