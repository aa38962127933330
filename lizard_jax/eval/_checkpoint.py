"""What every evaluation asks about the model it measures, and how it is loaded."""

import argparse
from pathlib import Path
from typing import Any

from lizard_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``CKPT``, ``--teacher`` and ``--dtype``."""
    parser.add_argument("checkpoint", metavar="CKPT", help="HF directory or hub id, Flax directory, or stage directory")
    parser.add_argument(
        "--teacher", metavar="DIR", help="of a stage directory, where its teacher has moved (default: where it was)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as stored)"
    )


def load(args: argparse.Namespace) -> Any:
    """The model.

    Raises:
        UserError: there is none, it is not supported, or it is damaged: a parameter is not finite.
    """
    import lizard_jax
    from lizard_jax.nn.finite import not_finite
    from pallas_kernels import partition

    model = lizard_jax.load(args.checkpoint, dtype=args.dtype, teacher=args.teacher, mesh=partition.mesh())
    if (path := not_finite(model)) is not None:
        raise UserError(f"{args.checkpoint} is damaged: its parameter {path} holds NaN or infinity")
    return model


def tokenizer_source(args: argparse.Namespace) -> str:
    """Where the checkpoint's tokenizer lies, found without reading its weights.

    Raises:
        UserError: there is no such checkpoint.
    """
    from lizard_jax.convert.files import locate, read_json

    directory = Path(args.checkpoint).expanduser()
    if (directory / "run.json").is_file():
        from lizard_jax.train.teacher import find_teacher

        return str(find_teacher(directory, read_json(directory / "run.json"), args.teacher))
    return str(locate(args.checkpoint))
