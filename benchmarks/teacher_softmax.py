"""What the teacher's softmax moves on TPUs that are not here: by the flash kernel, and as plain JAX computes it.

    uv run --group test python -m benchmarks.teacher_softmax [--length 2048] [--chips v5e v6e]

One row of Llama-3-8B's 32 heads of 128 with 8 key heads, packed documents, in bf16, and the projection behind it,
compiled forward. Bytes are those that the compiled program's operations read and write, each operand once: keys that
the kernel reads again for another block of queries do not count. Nothing has run. Writes
``benchmarks/teacher_softmax.json``; rows of other lengths and chips stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.chips.compilers import TPUS, compile_for
from lizard_jax.atomic import write_atomic
from lizard_jax.config import ModelConfig
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.plan.program import moved
from lizard_jax.program import ended
from pallas_kernels import flash

FILE = Path(__file__).resolve().parent / "teacher_softmax.json"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def measured(chip: str, length: int) -> dict[str, float]:
    """GiB moved and GiB of temporaries of one call."""
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
    documents = jax.ShapeDtypeStruct((1, length), jnp.int32)
    program = compile_for(chip, lambda *arrays: heads(*arrays), q, k, k, documents, kernel).executable
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "moved": moved(program.as_text() or "", 1).memory / 2**30,
        "temporary": memory.temp_size_in_bytes / 2**30,
    }


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    rows = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for chip in args.chips:
        row = {"flash": measured(chip, args.length)}
        with mock.patch.object(flash, "fits", return_value=False):
            row["plain"] = measured(chip, args.length)
        rows[f"{chip}, {args.length}"] = row
        for name, sizes in row.items():
            print(f"{chip} {name:5} {sizes['moved']:.3f} GiB moved, {sizes['temporary']:.3f} GiB of temporaries")
        write_atomic(FILE, json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    return 0


def main() -> int:
    """Compile both for every chip asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens; default %(default)s")
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"], choices=sorted(TPUS), help="default v5e v6e")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; the rows so far are kept")


if __name__ == "__main__":
    sys.exit(main())
