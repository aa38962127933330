"""What attention costs with length: chunked Lizard attention beside dense softmax attention, T = 1k … 16k.

    python benchmarks/attention.py

Three things, forward and forward with backward (gradients of queries, keys, values and new parameters), in fp32: the
linear branch's op alone, whole Lizard attention (feature maps, window branch, linear branch, merge; preset ``lizard``)
and ``jax.nn.dot_product_attention``. All in one process, measured in turns; medians. Dense attention holds a T×T
matrix per head, so it stops at ``--dense-limit``. Prints a table and writes ``benchmarks/attention.json`` and
``benchmarks/attention.png``. Expect time per token of the first two to stay flat: 8 times the length for under 9 times
the time. Takes about five minutes on two cores.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from lizard_jax.config import ModelConfig, preset
from lizard_jax.nn.lizard_attention import LizardMixer
from pallas_kernels.log_gate_attention import log_gate_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
LENGTHS = (1024, 2048, 4096, 8192, 16384)
PASSES = ("forward", "forward+backward")


def shape_of(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    """A one-layer decoder of this attention shape; only its attention is built."""
    width = heads * head_dim
    return ModelConfig(
        architecture="llama", vocab_size=1, hidden_size=width, intermediate_size=width, num_layers=1, num_heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, max_positions=2048, attention=preset("lizard"),
    )  # fmt: skip


def contestants(config: ModelConfig) -> dict[str, Callable]:
    """Functions of ``(mixer parameters, x, q, k, v)`` that give the head outputs."""
    graph, _ = nnx.split(LizardMixer(config, rngs=nnx.Rngs(0)))

    def linear(params, x, q, k, v):
        # Features of the preset's width; the maps themselves belong to the second contestant.
        q_feat, k_feat = (jnp.abs(jnp.concatenate([a, a], -1)) for a in (q, k))
        log_gate = -jnp.abs(x[..., : config.kv_heads]).astype(jnp.float32)
        return log_gate_attention(q_feat, k_feat, v, log_gate)

    def lizard(params, x, q, k, v):
        return nnx.merge(graph, params)(x, q, k, v)

    def softmax(params, x, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return {"linear branch": linear, "lizard": lizard, "softmax": softmax}


def both_passes(attend: Callable) -> dict[str, Callable]:
    """The function and its gradient in everything, jitted."""

    def total(*arguments):
        return jnp.sum(jnp.square(attend(*arguments)))

    return {"forward": jax.jit(attend), "forward+backward": jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))}


def in_turns(calls: dict[tuple, Callable[[], object]], repeats: int) -> dict[tuple, float]:
    """Median seconds of each call, the calls taking turns so that the machine's moods fall on all alike."""
    times: dict[tuple, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[key].append(time.perf_counter() - start)
    return {key: float(np.median(values)) for key, values in times.items()}


def measure(config: ModelConfig, lengths: list[int], repeats: int, dense_limit: int) -> list[dict]:
    """One row per contestant, pass and length."""
    _, params = nnx.split(LizardMixer(config, rngs=nnx.Rngs(0)))
    calls: dict[tuple, Callable[[], object]] = {}
    for length in lengths:
        keys = jax.random.split(jax.random.key(length), 4)
        x = jax.random.normal(keys[0], (1, length, config.hidden_size))
        q, k, v = (
            jax.random.normal(key, (1, length, heads, config.head_dim))
            for key, heads in zip(keys[1:], (config.num_heads, config.kv_heads, config.kv_heads), strict=True)
        )
        for name, attend in contestants(config).items():
            if name == "softmax" and length > dense_limit:
                continue
            for which, function in both_passes(attend).items():
                calls[name, which, length] = lambda function=function, a=(params, x, q, k, v): function(*a)
    seconds = in_turns(calls, repeats)
    return [{"attention": a, "pass": p, "T": t, "seconds": s} for (a, p, t), s in seconds.items()]


def eightfold(rows: list[dict]) -> list[dict]:
    """What 8 times the length costs, for every pair of lengths measured that far apart."""
    seconds = {(row["attention"], row["pass"], row["T"]): row["seconds"] for row in rows}
    return [
        {"attention": a, "pass": p, "from": t, "to": 8 * t, "ratio": seconds[a, p, 8 * t] / s}
        for (a, p, t), s in seconds.items()
        if (a, p, 8 * t) in seconds
    ]


def table(rows: list[dict], ratios: list[dict]) -> str:
    """Milliseconds by length, one line per contestant and pass, and the eightfold ratios."""
    lengths = sorted({row["T"] for row in rows})
    seconds = {(row["attention"], row["pass"], row["T"]): row["seconds"] for row in rows}
    lines = [f"{'milliseconds at T =':34}" + "".join(f"{t:>10}" for t in lengths)]
    for which in PASSES:
        for name in dict.fromkeys(row["attention"] for row in rows):
            cells = (seconds.get((name, which, t)) for t in lengths)
            lines.append(
                f"{name:16}{which:18}" + "".join(f"{'-' if s is None else f'{1e3 * s:.1f}':>10}" for s in cells)
            )
    lines += [f"{r['attention']}, {r['pass']}: {r['from']} -> {r['to']} costs x{r['ratio']:.2f}" for r in ratios]
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Time against length, one panel a pass."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, which in zip(panels, PASSES, strict=True):
        for name in dict.fromkeys(row["attention"] for row in rows):
            points = [(row["T"], row["seconds"]) for row in rows if row["attention"] == name and row["pass"] == which]
            panel.loglog(*zip(*points, strict=True), marker="o", base=2, label=name)
        panel.set(title=which, xlabel="T")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend()
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=120)
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dense-limit", type=int, default=8192, help="longest T of dense attention")
    parser.add_argument("--out", type=Path, default=HERE, help="directory of attention.json and attention.png")
    args = parser.parse_args()
    config = shape_of(args.heads, args.kv_heads, args.head_dim)
    rows = measure(config, args.lengths, args.repeats, args.dense_limit)
    ratios = eightfold(rows)
    print(table(rows, ratios))
    device = jax.devices()[0]
    result = {
        "device": device.device_kind, "cores": os.cpu_count(), "jax": jax.__version__, "repeats": args.repeats,
        "B": 1, "N": args.heads, "K": args.kv_heads, "H": args.head_dim, "F": 2 * args.head_dim,
        "W": preset("lizard").window, "C": preset("lizard").chunk, "rows": rows, "eightfold": ratios,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    beside = args.out / "attention.part.json"
    beside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(beside, args.out / "attention.json")
    plot(rows, args.out / "attention.png")


if __name__ == "__main__":
    main()
