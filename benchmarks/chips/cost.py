"""What the kernels cost by their arithmetic: FLOPs, bytes, and the time no kernel can beat on a chip.

    python -m benchmarks.chips.cost [--help]

FLOPs are those of the matmuls of the chunked computation, two for a multiply-add, over whole C×C tiles (the diagonal
tile too, which matrix units compute in full); exponentials, sums and the sums of gates run beside them on other units.
Bytes are of device memory. ``compulsory`` reads each input once and writes each output once; ``moved`` adds what an
algorithm leaves in memory between its passes. What each compiled kernel really moves is in ``benchmarks/compile.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.chips import Chip
from pallas_kernels.log_gate_attention.problem import Problem

if TYPE_CHECKING:
    from pallas_kernels.sliding_window.problem import Problem as WindowProblem

SCALAR = 4  # bytes of a gate, a key's log scale, a log normalizer, a number of a state: fp32


CHIPS = {chip.title: chip for chip in chips.CHIPS.values()}
"""By title."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: int
    compulsory: int
    moved: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.compulsory + other.compulsory, self.moved + other.moved)

    @property
    def ratio(self) -> float:
        """Bytes moved over compulsory bytes."""
        return self.moved / self.compulsory

    def roofline(self, chip: Chip) -> float:
        """Seconds in which the chip can neither do fewer FLOPs nor move fewer bytes; for bf16."""
        return max(self.flops / chip.flops, self.compulsory / chip.bandwidth)


def forward(problem: Problem, chunk: int, split: bool = False) -> Cost:
    """``log_gate_attention``, or its mapped form where ``problem.act`` is given; no state given or asked for.

    Args:
        split: the state at each chunk's start is written in a first pass over keys and values and read in a second;
            otherwise it stays on the chip from chunk to chunk.
    """
    B, T, N, S, F, H = problem.B, problem.T, problem.N, problem.S, problem.F, problem.H
    maps, map_bytes = _maps(problem)
    in_chunk = 2 * chunk * (F + H)  # scores, values
    per_token = N * (in_chunk + 2 * F * H) + S * 2 * F * H  # … and the state read, and written
    flops = B * T * (per_token + (N + S) * maps)
    compulsory = B * T * (_inputs(problem) + _outputs(problem)) + map_bytes
    moved = compulsory
    if split:
        flops += B * T * S * maps
        moved += B * T * _keys(problem) + 2 * _states(problem, chunk)
    return Cost(flops, compulsory, moved)


def backward(problem: Problem, chunk: int, split: bool = False) -> Cost:
    """Cotangents of everything but a state, from the inputs and the cotangents of ``y`` and ``n``.

    Nothing is kept from the forward pass: a first pass leaves the state at each chunk's start in memory, a second goes
    from the last chunk to the first.

    Args:
        split: the cotangents of those states are left in memory too, so that chunks are independent in a third pass.
    """
    B, T, N, S, F, H = problem.B, problem.T, problem.N, problem.S, problem.F, problem.H
    maps, map_bytes = _maps(problem)
    in_chunk = 2 * chunk * (3 * F + 2 * H)  # scores again, dq, dk; dy·v, dv
    rows, keys = 2 * 2 * F * H, 2 * 2 * F * H  # dy·kv and dkv of every query head; dkv·v and dv of every state head
    flops = B * T * (N * (in_chunk + rows) + S * (keys + 2 * F * H))
    flops += B * T * maps * (3 * (N + S) + S)  # recomputed, dx, dA; and the keys' for the states
    compulsory = B * T * (2 * _inputs(problem) + _outputs(problem)) + 2 * map_bytes
    moved = compulsory + B * T * _keys(problem) + 2 * _states(problem, chunk)
    if split:  # dkv needs queries and their cotangents once more
        queries = _inputs(problem) - _keys(problem)
        moved += B * T * (queries + _outputs(problem)) + 2 * _states(problem, chunk)
        flops += B * T * (N * maps)
    return Cost(flops, compulsory, moved)


def forward_backward(problem: Problem, chunk: int, split: bool = False) -> Cost:
    """A training step's share: both passes."""
    return forward(problem, chunk, split) + backward(problem, chunk, split)


def window_forward(problem: WindowProblem, block: int) -> Cost:
    """``sliding_window`` without meta memory: a block of queries meets the W keys before it and its own."""
    band = problem.W + block
    flops = problem.B * problem.T * problem.N * 4 * band * problem.H
    compulsory = _window_tokens(problem)
    return Cost(flops, compulsory, compulsory + _overlap(problem, block))


def window_backward(problem: WindowProblem, block: int) -> Cost:
    """Scores again, dy·v, dq, dk, dv. The kernels read ``y`` and ``n`` of the forward pass, too."""
    band = problem.W + block
    flops = problem.B * problem.T * problem.N * 10 * band * problem.H
    # dy and dn in place of y and n, and the cotangents of q, k and v.
    keys_and_queries = problem.B * problem.H * (problem.T * problem.N + 2 * (problem.T + problem.W) * problem.K)
    compulsory = _window_tokens(problem) + keys_and_queries * problem.dtype.itemsize
    kept = problem.B * problem.T * problem.N * (problem.H * problem.dtype.itemsize + SCALAR)
    return Cost(flops, compulsory, compulsory + kept + _overlap(problem, block))


def _maps(problem: Problem) -> tuple[int, int]:
    """FLOPs of a head's feature map for one token, and bytes of all maps."""
    if problem.act is None or problem.width is None:
        return 0, 0
    return problem.width * problem.F, (problem.N + problem.S) * problem.width * problem.F // 2 * SCALAR


def _keys(problem: Problem) -> int:
    """Bytes of what a token writes to the state: its keys, values, gates and key scales."""
    size = jnp.dtype(problem.dtype).itemsize
    keys = problem.S * problem.F if problem.width is None else problem.K * problem.width
    return size * (keys + problem.K * problem.H) + 2 * SCALAR * problem.S


def _inputs(problem: Problem) -> int:
    """Bytes of a token's queries and of ``_keys``."""
    return _keys(problem) + jnp.dtype(problem.dtype).itemsize * problem.N * (problem.width or problem.F)


def _outputs(problem: Problem) -> int:
    """Bytes of a token's outputs and log normalizers; their cotangents are as many."""
    return problem.N * (jnp.dtype(problem.dtype).itemsize * problem.H + SCALAR)


def _states(problem: Problem, chunk: int) -> int:
    """Bytes of the state at the start of every chunk."""
    return SCALAR * problem.B * problem.S * -(-problem.T // chunk) * problem.F * problem.H


def _window_tokens(problem: WindowProblem) -> int:
    queries = problem.T * problem.N * (2 * problem.H * problem.dtype.itemsize + SCALAR)
    keys = 2 * (problem.T + problem.W) * problem.K * problem.H * problem.dtype.itemsize
    return problem.B * (queries + keys)


def _overlap(problem: WindowProblem, block: int) -> int:
    """Bytes of keys and values read again: the W before each block but the first."""
    again = (-(-problem.T // block) - 1) * problem.W
    return 2 * problem.B * again * problem.K * problem.H * problem.dtype.itemsize


def table(problem: Problem, chunk: int) -> str:
    """Costs a token and rooflines a call of one problem and of its mapped form."""
    mapped = dataclasses.replace(problem, act="exp", width=problem.H)
    rows = {
        "forward": forward(problem, chunk),
        "forward, split": forward(problem, chunk, split=True),
        "forward+backward": forward_backward(problem, chunk),
        "mapped forward": forward(mapped, chunk),
        "mapped forward+backward": forward_backward(mapped, chunk),
    }
    return _lines(rows, problem.B * problem.T)


def window_table(problem: WindowProblem, block: int) -> str:
    """The same of a window."""
    there = window_forward(problem, block)
    rows = {"forward": there, "forward+backward": there + window_backward(problem, block)}
    return _lines(rows, problem.B * problem.T)


def _lines(rows: dict[str, Cost], tokens: int) -> str:
    lines = [f"{'':24}{'kFLOP/token':>12}{'kB/token':>10}{'moved':>7}  " + "".join(f"{c + ' ms':>9}" for c in CHIPS)]
    for name, cost in rows.items():
        times = "".join(f"{1e3 * cost.roofline(chip):9.3f}" for chip in CHIPS.values())
        sizes = f"{cost.flops / tokens / 1e3:12.0f}{cost.compulsory / tokens / 1e3:10.1f}{cost.ratio:7.2f}"
        lines.append(f"{name:24}{sizes}  {times}")
    return "\n".join(lines)


def main() -> None:
    from pallas_kernels.sliding_window.problem import Problem as WindowProblem

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, metavar="B")
    parser.add_argument("--length", type=int, default=2048, metavar="T")
    parser.add_argument("--heads", type=int, default=32, metavar="N")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8], metavar="K", help="state heads are as many")
    parser.add_argument("--head-width", type=int, default=128, metavar="H")
    parser.add_argument("--features", type=int, nargs="+", default=[128, 256], metavar="F")
    parser.add_argument("--window", type=int, default=128, metavar="W")
    parser.add_argument("--chunk", type=int, default=64, metavar="C", help="and block of the window's queries")
    a = parser.parse_args()
    print("Peaks, bf16:")
    for name, chip in CHIPS.items():
        print(f"  {name:5} {chip.flops / 1e12:6.1f} TFLOP/s {chip.bandwidth / 1e12:6.3f} TB/s  ({chip.source})")
    print("\n'moved' is bytes moved over compulsory bytes; 'ms' is the roofline of a call.")
    dtype, sizes = jnp.dtype(jnp.bfloat16), f"bf16, B={a.batch} T={a.length} N={a.heads} H={a.head_width}"
    for K in a.kv_heads:
        for F in a.features:
            print(f"\nlog_gate_attention, {sizes} K=S={K} F={F} C={a.chunk}")
            problem = Problem(a.batch, a.length, a.heads, K, K, F, a.head_width, dtype)
            print(table(problem, a.chunk))
        print(f"\nsliding_window, {sizes} K={K} W={a.window} C={a.chunk}")
        window = WindowProblem(a.batch, a.length, a.heads, K, a.head_width, a.window, dtype, True)
        print(window_table(window, a.chunk))


if __name__ == "__main__":
    main()
