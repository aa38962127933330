"""A forward pass of a softmax decoder, and a step of stage 1, beside torch's forward pass of the same checkpoint.

    uv run --extra gguf benchmarks/smollm2.py /tmp/smollm2
    uv run --group test python -m benchmarks.beside_torch /tmp/smollm2 [--dtype bfloat16]

All on this machine's CPU with the threads that each library takes by itself, the calls in turns; hidden states alone,
no logits. The student is as costly as the recipes make it: exact heads and kept pairs in every layer. Ratios are of
medians, times of the fastest. Writes ``benchmarks/beside_torch.json``; rows of other dtypes and lengths stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.timing import in_turns
from lizard_jax.atomic import write_atomic
from lizard_jax.cli import load_recipe
from lizard_jax.convert.load import load_hf
from lizard_jax.data.loader import Batch
from lizard_jax.errors import UserError
from lizard_jax.plan.estimate import likely
from lizard_jax.program import ended
from lizard_jax.train import stages

ROOT = Path(__file__).resolve().parents[1]


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over that of what was expected."""
    return float(np.sqrt(np.mean(np.square(actual - expected)) / np.mean(np.square(expected))))


def measured(directory: Path, length: int, dtype: str, repeats: int) -> dict[str, object]:
    """One row: seconds of each, and of ours over torch's.

    Raises:
        UserError: torch or transformers do not read the checkpoint, or its hidden states are others than ours.
    """
    try:
        import torch
        import transformers
    except ImportError as absent:
        raise UserError(f"{absent.name} is not installed; --group test brings it") from None
    theirs = transformers.AutoModel.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    teacher = load_hf(directory, dtype=dtype)
    config = load_recipe("llama3_2_1b", 1)
    student = load_hf(directory, dtype=dtype, attention=likely(config, teacher.config).attention)

    tokens = np.random.default_rng(0).integers(0, teacher.config.vocab_size, (1, length)).astype(np.int32)
    ones = np.ones((1, length), np.int32)
    batch = Batch(inputs=tokens, targets=tokens, segment_ids=ones, loss_mask=ones.astype(np.float32))
    ids = torch.as_tensor(tokens, dtype=torch.long)
    forward = jax.jit(lambda model, ids: model.hidden(ids))
    step = jax.jit(
        lambda model, batch: stages.loss_and_grads(config, model, batch),
        compiler_options=stages.compiler_options(config, jax.default_backend()),
    )

    def by_torch() -> np.ndarray:
        with torch.inference_mode():
            return theirs(ids, use_cache=False).last_hidden_state.float().numpy()

    calls: dict[str, Callable[[], object]] = {
        "torch": by_torch,
        "forward": lambda: forward(teacher, tokens),
        "stage 1": lambda: step(student, batch),
    }
    for call in calls.values():  # compiled, and read into memory
        jax.block_until_ready(call())
    # In bf16 thirty layers stray from float32 by percents, in either library: here by less than twice what it is there.
    wide = np.asarray(forward(load_hf(directory, dtype="float32"), tokens))
    ours, other = relative(np.asarray(forward(teacher, tokens), np.float32), wide), relative(by_torch(), wide)
    if not (ours < 2 * other if dtype == "bfloat16" else other < 1e-4):
        raise UserError(f"torch computes something else: {other:.1e} from float32, and here {ours:.1e}")
    times = in_turns(calls, repeats)
    median = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "seconds": {name: min(values) for name, values in times.items()},
        "over torch": {name: median[name] / median["torch"] for name in ("forward", "stage 1")},
        "from float32": {"here": ours, "torch": other},
        "torch": torch.__version__, "transformers": transformers.__version__, "jax": jax.__version__,
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    row = measured(args.checkpoint, args.length, args.dtype, args.repeats)
    for name, ratio in row["over torch"].items():  # type: ignore[attr-defined]
        print(f"{name:8} {ratio:.2f} × torch's forward pass of {row['seconds']['torch']:.1f} s")  # type: ignore[index]
    file = ROOT / "benchmarks" / "beside_torch.json"
    old = json.loads(file.read_text()) if file.is_file() else {}
    rows = dict(sorted((old | {f"{args.dtype}, {args.length}": row}).items()))
    write_atomic(file, json.dumps(rows, indent=1) + "\n")
    return 0


def main() -> int:
    """Measure one length in one dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="an HF directory that transformers reads")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default %(default)s")
    parser.add_argument("--length", type=int, default=2048, help="tokens; default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="turns; default %(default)s")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
