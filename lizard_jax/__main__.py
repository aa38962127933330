"""The command ``lizard``: train, convert, generate, select, eval."""

import importlib
import sys

COMMANDS = {
    "train": "linearize a checkpoint: stages 1 and 2, or a teacher of your own (stage 0)",
    "convert": "HF and Flax directories into each other, and a student without training",
    "generate": "write text, one prompt or many, or a conversation",
    "select": "which key heads of a teacher are worth exact memory, for train --heads",
    "eval": "perplexity, fidelity, passkeys, recall, RULER, lm-evaluation-harness",
}


def main() -> int:
    """Hands the command line to the command that its first word names; returns its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"lizard {name}"]
        return importlib.import_module(f"lizard_jax.{name}.__main__").main()
    usage = "usage: lizard COMMAND …\n\n" + "\n".join(f"  {name:9}{help}" for name, help in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"{usage}\n\nlizard COMMAND --help says more.")
        return 0
    print(f"error: no command {name}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
