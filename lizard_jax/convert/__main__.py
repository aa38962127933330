"""Convert checkpoints between HF directories and Flax directories, and teachers to students without training.

python convert.py hf2flax SRC DST    SRC: HF directory or hub id
python convert.py flax2hf SRC DST    SRC: Flax directory, or a run's stage directory such as runs/tiny/stage2
python convert.py linearize SRC DST  SRC: HF directory or hub id of a teacher; DST: its student without any training
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lizard_jax.errors import UserError
from lizard_jax.program import ended, program

if TYPE_CHECKING:
    from lizard_jax.models.llama import Llama

RETRIEVAL = 8192
"""Tokens that exact heads see where nothing is said: as the recipes have it."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("convert.py"),
        description="Convert checkpoints between HF directories and Flax directories, bit for bit, and teachers to "
        "students that were not trained.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_flax = commands.add_parser(
        "hf2flax",
        help="HF checkpoint to Flax directory",
        description="Write the model of an HF checkpoint as a Flax directory: parameters by Orbax, with config, "
        "generation config, tokenizer and licence files. What this project linearized comes in with its new modules.",
    )
    to_flax.add_argument("src", help="HF checkpoint directory or hub id (owner/name); safetensors or PyTorch .bin")
    to_hf = commands.add_parser(
        "flax2hf",
        help="Flax directory or trained stage to HF checkpoint",
        description="Write a model as an HF checkpoint: base weights in safetensors, new attention modules in "
        "lizard.safetensors, their settings in config.json.",
    )
    to_hf.add_argument("src", help="Flax directory of hf2flax, or a run's stage directory such as runs/tiny/stage2")
    to_hf.add_argument(
        "--adapter",
        action="store_true",
        help="write LoRA as a PEFT adapter in DST/adapter, the base weights untouched (default: merge it into them)",
    )
    to_hf.add_argument(
        "--teacher", metavar="DIR", help="of a stage directory, where its teacher has moved (default: where it was)"
    )
    linear = commands.add_parser(
        "linearize",
        help="HF checkpoint to a student that was not trained",
        description="Write a teacher as a student without any training: its own weights, a window with the real first "
        "tokens, and as much of the past as the state has room for, where it is worth most: a tenth of the key heads "
        "whole, exact pairs for the others. A memory starts where 8,192 tokens of text say, as in stage 1.",
    )
    linear.add_argument("src", help="HF checkpoint directory or hub id (owner/name) of the teacher")
    linear.add_argument("--preset", default="lizard", help="attention preset (default %(default)s)")
    linear.add_argument("--window", type=int, default=128, help="tokens the window sees (default %(default)s)")
    linear.add_argument(
        "--memory", choices=("all", "evicted", "none"),
        help="what the linear branch holds (default: none with preset lizard, for an untrained memory only costs; else "
        "the preset's)",
    )  # fmt: skip
    linear.add_argument(
        "--data", default="embedded", metavar="PATH",
        help="text to measure the start on: anything train.py takes (default: Python's own sources)",
    )  # fmt: skip
    linear.add_argument(
        "--sequence-length", type=int, default=2048, metavar="T",
        help="tokens read in one go, several windows (default %(default)s)",
    )  # fmt: skip
    linear.add_argument(
        "--kept", type=int, metavar="X", help="as many exact pairs for every key head, in place of --state-bytes",
    )  # fmt: skip
    linear.add_argument(
        "--state-bytes", metavar="SIZE",
        help="size of a sequence's state, as 16MiB or 1024tokens (of a plain window): split among key heads by need "
        "(default: 1024tokens with preset lizard, an eighth of a cache at 8,192)",
    )  # fmt: skip
    linear.add_argument(
        "--curves", default="", metavar="FILE",
        help="what each key head needs, from `lizard select --by error` (default: measured on --data)",
    )  # fmt: skip
    linear.add_argument(
        "--feature-half", type=int, metavar="N",
        help="half-width of a memory's feature map (default: the head width)",
    )  # fmt: skip
    linear.add_argument(
        "--heads", metavar="FILE:N",
        help="key heads that keep softmax attention: FILE:N or FILE:10%% of `lizard select`, auto:10%%, or nothing "
        "(default: auto:10%% beside --state-bytes with preset lizard)",
    )  # fmt: skip
    linear.add_argument(
        "--retrieval-window", type=int, metavar="W",
        help="tokens that those see, beside the first; 0 keeps all in a growing cache (default: 8192, or as many as "
        "--state-bytes pays for)",
    )  # fmt: skip
    for command in (to_flax, to_hf, linear):
        command.add_argument("dst", help="directory to write; it must not exist or be empty, and appears whole or not")
    return parser


def hf2flax(src: str, dst: str) -> str:
    """Runs ``hf2flax`` and returns the line that says what was written."""
    from lizard_jax.convert.files import refuse_existing
    from lizard_jax.convert.flax_dir import save_flax
    from lizard_jax.convert.load import load_hf

    refuse_existing(dst)
    with _Bar("reading") as progress:
        model = load_hf(src, progress=progress)
    print("writing parameters …", file=sys.stderr)
    save_flax(model, dst, source=src)
    return _summary(model, dst)


def flax2hf(src: str, dst: str, *, adapter: bool, teacher: str | None = None) -> str:
    """Runs ``flax2hf`` and returns the line that says what was written."""
    from lizard_jax.convert.files import refuse_existing
    from lizard_jax.convert.flax_dir import load_flax, read_manifest
    from lizard_jax.convert.save import save_hf

    refuse_existing(dst)
    directory = Path(src).expanduser()
    source: str | Path = directory
    trained = (directory / "run.json").is_file()
    if not trained:
        read_manifest(directory)  # so that a wrong path gets its one line and no other
    print("reading parameters …", file=sys.stderr)
    if trained:
        from lizard_jax.train.run import load_run

        model, source = load_run(directory, teacher=teacher)
    else:
        model = load_flax(directory)
    with _Bar("writing") as progress:
        save_hf(model, dst, source=source, adapter=adapter, progress=progress)
    return _summary(model, dst)


def linearize(
    src: str, dst: str, *, preset: str, window: int, data: str, length: int, memory: str | None = None,
    heads: str = "", retrieval_window: int | None = None, kept: int = 0, feature_half: int = 0,
    state_bytes: str = "", curves: str = "",
) -> str:  # fmt: skip
    """Runs ``linearize`` and returns the lines that say what was measured and written."""
    import dataclasses

    from lizard_jax import config
    from lizard_jax.convert.files import locate, refuse_existing
    from lizard_jax.convert.save import save_hf
    from lizard_jax.train.linearize import linearize as student_of

    refuse_existing(dst)
    if state_bytes and kept:
        raise UserError("--state-bytes says what is kept; leave out --kept")
    given = config.preset(preset)
    more: dict[str, int] = {"feature_half": feature_half} if feature_half else {}
    attention = dataclasses.replace(given, window=window, kept=kept or given.kept, **more)
    if memory is not None:
        attention = dataclasses.replace(attention, memory=memory)
    if heads:
        from lizard_jax.select.choice import resolved

        reach = max(RETRIEVAL, window) if retrieval_window is None else retrieval_window
        chosen = resolved(heads, locate(src), window)
        attention = dataclasses.replace(attention, softmax_heads=chosen, retrieval_window=reach)
    text = config.DataConfig(path=data, sequence_length=length, batch_size=1, segment_mask=False)
    said = []
    if state_bytes:
        from lizard_jax.select import budgets

        follows = retrieval_window is None
        spent = budgets.split(state_bytes, locate(src), attention, text, curves, reach_follows=follows)
        attention = spent.switches
        said.append(spent.summary())
    with _Bar("reading") as progress:
        model, start = student_of(src, attention, text, progress=progress)
    with _Bar("writing") as progress:
        save_hf(model, dst, source=src, progress=progress)
    return "\n".join([*said, *([start.summary()] if start else []), _state(model), _summary(model, dst)])


def untrained(args: argparse.Namespace) -> argparse.Namespace:
    """What the command line left open of ``linearize``: the best that is known without training (docs/recipe.md)."""
    ours = args.preset == "lizard"
    if args.memory is None and ours and args.feature_half is None:
        args.memory = "none"
    if args.state_bytes is None:
        args.state_bytes = "1024tokens" if ours and args.kept is None and args.memory != "all" else ""
    if args.heads is None:
        args.heads = "auto:10%" if ours and args.state_bytes else ""
    return args


def _state(model: "Llama") -> str:
    """What generating costs, at two lengths where it grows."""
    short, long = (model.state_bytes(length) / 2**20 for length in (2048, 8192))
    if short == long:
        return f"a sequence's state takes {short:.2f} MiB at any length"
    return f"a sequence's state takes {short:.2f} MiB at 2,048 tokens and {long:.2f} at 8,192"


class _Bar:
    """A progress bar on stderr: tensors, bytes, bytes a second. It shows with the first tensor."""

    def __init__(self, doing: str):
        self._doing = doing
        self._bar: tqdm | None = None
        self._tensors = 0

    def __enter__(self) -> Callable[[int, int], None]:
        return self._step

    def _step(self, size: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(desc=self._doing, total=total, unit="B", unit_scale=True, file=sys.stderr)
        self._tensors += 1
        self._bar.set_postfix_str(f"{self._tensors} tensors", refresh=False)
        self._bar.update(size)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _summary(model: object, dst: str) -> str:
    from lizard_jax.convert.params import parameters
    from lizard_jax.models.llama import Llama

    assert isinstance(model, Llama)
    arrays = [variable[...] for variable in parameters(model).values()]
    size = sum(file.stat().st_size for file in Path(dst).expanduser().rglob("*") if file.is_file())
    count = sum(array.size for array in arrays)
    return f"{len(arrays)} tensors, {count:,} parameters, {size / 1e9:.3f} GB written to {dst}"


def main() -> int:
    """Runs the command line; returns the exit code."""
    return ended(_main, interrupted="interrupted; nothing was written")


def _main() -> int:
    args = arguments().parse_args()
    if args.command == "linearize":
        args = untrained(args)
        print(
            linearize(
                args.src, args.dst, preset=args.preset, window=args.window, data=args.data,
                length=args.sequence_length, memory=args.memory, heads=args.heads,
                retrieval_window=args.retrieval_window, kept=args.kept or 0, feature_half=args.feature_half or 0,
                state_bytes=args.state_bytes, curves=args.curves,
            )
        )  # fmt: skip
        return 0
    # Conversion computes nothing: the accelerator's memory is left to others.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.command == "hf2flax":
        print(hf2flax(args.src, args.dst))
    else:
        print(flax2hf(args.src, args.dst, adapter=args.adapter, teacher=args.teacher))
    return 0


if __name__ == "__main__":
    sys.exit(main())
