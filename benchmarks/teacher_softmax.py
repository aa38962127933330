"""What the teacher's softmax moves on chips that are not here: by a flash kernel, and as plain JAX computes it.

    uv run --group test python -m benchmarks.teacher_softmax [--length 2048] [--chips v5e v6e sm_80 sm_90]
    uv run --extra cuda python -m benchmarks.teacher_softmax --here        # milliseconds on the chip at hand

One row of Llama-3-8B's 32 heads of 128 with 8 key heads, packed documents, in bf16, and the projection behind it,
compiled forward. Bytes are those that the compiled program's operations read and write, each operand once: keys that
the kernel reads again for another block of queries do not count. Writes ``benchmarks/teacher_softmax.json``; rows of
other lengths and chips stay.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.chips.compilers import CHIPS, compile_for
from benchmarks.timing import in_turns
from lizard_jax.atomic import write_atomic
from lizard_jax.config import ModelConfig
from lizard_jax.errors import UserError
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.plan.program import moved
from lizard_jax.program import ended
from pallas_kernels import flash, target

FILE = Path(__file__).resolve().parent / "teacher_softmax.json"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def layer(length: int) -> tuple[Callable[..., jax.Array], tuple[jax.ShapeDtypeStruct, ...]]:
    """The layer's heads and the projection behind them, and what it is called with."""
    config = ModelConfig(
        architecture="llama", vocab_size=8, hidden_size=HEADS * HEAD_DIM, intermediate_size=8, num_layers=1,
        num_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=length,
    )  # fmt: skip
    mixer = SoftmaxMixer(config, 0)

    def heads(q, k, v, documents, kernel):
        x = jnp.zeros((1, length, config.hidden_size), q.dtype)
        return mixer(x, q, k, v, segment_ids=documents).reshape(1, length, -1) @ kernel

    q, k = (jax.ShapeDtypeStruct((1, length, count, HEAD_DIM), jnp.bfloat16) for count in (HEADS, KV_HEADS))
    kernel = jax.ShapeDtypeStruct((config.hidden_size, config.hidden_size), jnp.bfloat16)
    return heads, (q, k, k, jax.ShapeDtypeStruct((1, length), jnp.int32), kernel)


def measured(chip: str, length: int) -> dict[str, float]:
    """GiB moved and GiB of temporaries of one call."""
    heads, arguments = layer(length)
    # A function of its own, for what was traced of another is remembered.
    program = compile_for(chip, lambda *arrays: heads(*arrays), *arguments).executable
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "moved": moved(program.as_text() or "", 1).memory / 2**30,
        "temporary": memory.temp_size_in_bytes / 2**30,
    }


def timed(length: int) -> dict[str, float]:
    """Milliseconds of a call on the chip at hand, the fastest of ten in turns; on GPUs by cuDNN as well, without
    documents and rotation."""
    heads, shapes = layer(length)
    draws = (jax.random.normal(jax.random.key(i), shape.shape) for i, shape in enumerate(shapes))
    arguments = [(draw + 1).astype(shape.dtype) for draw, shape in zip(draws, shapes, strict=True)]
    arguments[3] = jnp.ones_like(arguments[3])
    calls = {"flash": jax.jit(lambda *arrays: heads(*arrays)).lower(*arguments).compile()}
    with mock.patch.object(flash, "fits", return_value=False):
        calls["plain"] = jax.jit(lambda *arrays: heads(*arrays)).lower(*arguments).compile()
    if target.current().platform == "gpu":

        def fused(q, k, v, documents, kernel):
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
            return y.reshape(1, length, -1) @ kernel

        calls["cudnn"] = jax.jit(fused).lower(*arguments).compile()
    turns = in_turns({name: functools.partial(call, *arguments) for name, call in calls.items()}, 10)
    return {name: 1e3 * min(seconds) for name, seconds in turns.items()}


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    rows = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if args.here:
        here = target.current()
        if here.platform == "cpu":
            raise UserError("--here times a GPU or a TPU; this process has none")
        row = rows.setdefault(f"{here.chip}, {args.length}", {})
        for name, milliseconds in timed(args.length).items():
            row.setdefault(name, {})["milliseconds"] = milliseconds
            print(f"{here.chip} {name:5} {milliseconds:.3f} ms")
        write_atomic(FILE, json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
        return 0
    for chip in args.chips:
        found = {"flash": measured(chip, args.length)}
        with mock.patch.object(flash, "fits", return_value=False):
            found["plain"] = measured(chip, args.length)
        row = rows.setdefault(f"{chip}, {args.length}", {})
        for name, sizes in found.items():
            row.setdefault(name, {}).update(sizes)
            print(f"{chip} {name:5} {sizes['moved']:.3f} GiB moved, {sizes['temporary']:.3f} GiB of temporaries")
        write_atomic(FILE, json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    return 0


def main() -> int:
    """Compile both for every chip asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens; default %(default)s")
    parser.add_argument(
        "--chips",
        nargs="+",
        default=["v5e", "v6e", "sm_80", "sm_90"],
        choices=sorted(CHIPS),
        help="default %(default)s",
    )
    parser.add_argument("--here", action="store_true", help="time them on the chip of this process instead")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; the rows so far are kept")


if __name__ == "__main__":
    sys.exit(main())
