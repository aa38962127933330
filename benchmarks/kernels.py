"""How fast the linear branch's op is: on a GPU its kernels, on a CPU its plain JAX, each beside what others wrote.

    uv run --extra torch python -m benchmarks.kernels
    uv run --extra cuda --extra torch --with flash-linear-attention python -m benchmarks.kernels        on a GPU

On a GPU: ``log_gate_attention`` by each of its GPU implementations, features given (``triton``, ``pallas_gpu``) or
made inside (``triton, mapped``), in bf16 at B=16, N=32, H=128 for every T, K and F; beside flash-linear-attention's
``chunk_simple_gla`` and ``chunk_gla`` (left out where it is not installed), which know no groups: they get keys and
values repeated to N heads, untimed, and pick their tiles at the first size timed. Ours also divides by the sum of
weights. One process, the same arrays, the same clock: calls queued one behind the other and waited for together.
``roofline`` is what the chip's peaks allow, see ``benchmarks/chips/cost.py``. What is aimed at on an H200: at most half
of ``chunk_simple_gla``'s time and 1.5 times the roofline. (The paper, A100, forward, T=2048: GLA 4.29 ms, its own
kernel 3.25 ms.) ``benchmarks/tune.py`` finds the tiles for a GPU first.

On a CPU: ``xla`` beside the same chunked computation in eager PyTorch, on one core and on all, in fp32 at a small
size, two minutes; the ratio is to the better one.

Every pair is first checked to give the same numbers. Contestants take turns; times are medians. Prints a table and
writes ``kernels.json``, ``kernels.md`` and ``kernels.png`` to ``benchmarks/``, anew after every size.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# PyTorch allocates on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

if importlib.util.find_spec("torch") is None:
    sys.exit("error: the rival is PyTorch, which is not installed: uv run --extra torch python -m benchmarks.kernels")

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.chips import cost
from benchmarks.timing import FEWEST_SECONDS, PASSES, Call, inputs, jax_passes, mapped_inputs, say, seconds_of
from lizard_jax.atomic import write_atomic
from lizard_jax.train.report import versions
from pallas_kernels import chips
from pallas_kernels.log_gate_attention import log_gate_attention, mapped_log_gate_attention
from pallas_kernels.log_gate_attention.problem import Problem

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
GPU = {"batch": 16, "lengths": [2048, 4096, 8192], "heads": 32, "kv_heads": [32, 8], "width": 128, "features": [128]}
CPU = {"batch": 1, "lengths": [512, 1024, 2048], "heads": 8, "kv_heads": [8, 2], "width": 64, "features": [128]}
CHUNK = 64
LOAD = "others' load"
RIVALS = ("chunk_simple_gla", "chunk_gla")
TIMED = ("jax", "torch", "triton", "jax-triton", "flash-linear-attention")
"""Packages whose versions a time depends on."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One function in one pass at one size, ready to call."""

    name: str
    which: str
    problem: Problem
    call: Call
    wait: Callable[[Any], None]


def in_torch(q, k, v, g, chunk: int):
    """``log_gate_attention`` of ``S = K`` in eager PyTorch, one matmul after another; its gradient is autograd's.

    Exponents are differences of one cumulative sum a chunk, which is enough for the mild gates of a benchmark.
    """
    (B, T, N, F), (K, H) = q.shape, v.shape[2:]
    q = q.reshape(B, T, K, N // K, F).permute(0, 2, 3, 1, 4)  # [B, K, R, T, F]: a group's rows are one matmul's
    k, v, g = k.transpose(1, 2), v.transpose(1, 2), g.transpose(1, 2)
    kv, z = q.new_zeros(B, K, F, H), q.new_zeros(B, K, F, 1)
    out = []
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        qs, ks, vs, since = q[:, :, :, rows], k[:, :, rows], v[:, :, rows], g[:, :, rows].cumsum(-1)
        C = since.shape[-1]
        causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
        pair = (since[..., :, None] - since[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        carried = since.exp()[:, :, None, :, None]
        flat = qs.reshape(B, K, -1, F)
        weights = (flat @ ks.mT).reshape(B, K, -1, C, C) * pair[:, :, None]
        num = (weights.reshape(B, K, -1, C) @ vs).reshape(B, K, -1, C, H)
        num = num + carried * (flat @ kv).reshape(B, K, -1, C, H)
        den = weights.sum(-1, keepdim=True) + carried * (flat @ z).reshape(B, K, -1, C, 1)
        out.append(num / den)
        take, keep = (since[..., -1:] - since).exp()[..., None] * ks, since[..., -1, None, None].exp()
        kv, z = keep * kv + take.mT @ vs, keep * z + take.sum(2)[..., None]
    return torch.cat(out, 3).permute(0, 3, 1, 2, 4).reshape(B, T, N, H)


def jitted(attend: Callable, arguments: tuple, dy: jax.Array) -> dict[str, Call]:
    """The passes of an implementation, ready to call."""
    passes = jax_passes(attend, arguments, dy).items()
    return {which: functools.partial(jax.jit(function), *given) for which, (function, given) in passes}


def torch_passes(
    attend: Callable, arguments: list[torch.Tensor], dy: torch.Tensor, threads: int = 1
) -> dict[str, Call]:
    """The same in PyTorch, on so many cores where it runs on a CPU."""
    leaves = [x.detach().requires_grad_() for x in arguments]

    def forward():
        torch.set_num_threads(threads)
        with torch.no_grad():
            return attend(*arguments)

    def both():
        torch.set_num_threads(threads)
        y = attend(*leaves)
        return y.detach(), torch.autograd.grad(y, leaves, dy)

    return {"forward": forward, "forward+backward": both}


def to_torch(x: jax.Array) -> torch.Tensor:
    return torch.from_dlpack(x) if jax.default_backend() == "gpu" else torch.from_numpy(np.array(x))


def wait_torch(result: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def contestants(problem: Problem, implementations: list[str], rivals: list[str]) -> Iterator[Contestant]:
    """Of one size, with those functions of flash-linear-attention where it is installed."""
    x = inputs(problem)
    dy = x.pop("dy")
    for name in implementations:
        attend = functools.partial(log_gate_attention, implementation=name, chunk=CHUNK)
        for which, call in jitted(attend, tuple(x.values()), dy).items():
            yield Contestant(name, which, problem, call, jax.block_until_ready)
    if jax.default_backend() == "cpu":
        tensors = [to_torch(value) for value in x.values()]
        attend = functools.partial(in_torch, chunk=CHUNK)
        for threads in sorted({1, os.cpu_count() or 1}):  # more are slower where other programs run
            for which, call in torch_passes(attend, tensors, to_torch(dy), threads).items():
                yield Contestant(f"PyTorch ({threads})", which, problem, call, wait_torch)
        return
    if "triton" in implementations:
        raw = mapped_inputs(problem)
        mapped = dataclasses.replace(problem, act="exp", width=problem.H)

        def attend_mapped(q, k, v, g, q_map, k_map):
            return mapped_log_gate_attention(
                q, k, v, g, q_map=q_map, k_map=k_map, act="exp", implementation="triton", chunk=CHUNK
            )

        arguments = (raw["q"], raw["k"], x["v"], x["g"], raw["q_map"], raw["k_map"])
        for which, call in jitted(attend_mapped, arguments, dy).items():
            yield Contestant("triton, mapped", which, mapped, call, jax.block_until_ready)
    if importlib.util.find_spec("fla") is not None:
        groups = problem.N // problem.S
        q = to_torch(x["q"])
        k, v, g = (to_torch(x[name]).repeat_interleave(groups, 2) for name in "kvg")
        per_feature = g[..., None].expand(*g.shape, problem.F).contiguous()
        for name, foreign, gates in (("chunk_simple_gla", simple_gla, g), ("chunk_gla", gla, per_feature)):
            if name not in rivals:
                continue
            for which, call in torch_passes(foreign, [q, k, v, gates], to_torch(dy)).items():
                yield Contestant(name, which, problem, call, wait_torch)


def simple_gla(q, k, v, g):
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return chunk_simple_gla(q, k, v, g, scale=1.0)[0]


def gla(q, k, v, g):
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]

    return chunk_gla(q, k, v, g, scale=1.0)[0]


def distance(x: Any, y: Any) -> float:
    """Relative RMS."""
    x, y = (np.asarray(a.float().cpu() if isinstance(a, torch.Tensor) else a, np.float64) for a in (x, y))
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


def check(problem: Problem, implementations: list[str], rivals: list[str]) -> dict[str, float]:
    """How far each contestant is from ``xla`` in fp32 at a short length: the largest of output and gradients.

    Those of flash-linear-attention do not divide, and are held against our op without division.

    Raises:
        SystemExit: one is not the same function.
    """
    short = dataclasses.replace(problem, B=1, T=4 * CHUNK + 7)
    x = inputs(short)
    dy = x.pop("dy")
    wide = tuple(value.astype(jnp.float32) for value in x.values())

    @functools.cache
    def truth(normalize: bool):
        attend = functools.partial(log_gate_attention, implementation="xla", normalize=normalize)
        return jitted(attend, wide, dy.astype(jnp.float32))["forward+backward"]()

    limit = 1e-4 if short.dtype == jnp.float32 else 2e-2
    far = {}
    for one in contestants(short, implementations, rivals):
        if one.which == "forward" or one.problem.act or one.name == "xla":
            continue
        foreign = one.name in RIVALS
        (y, grads), (true_y, true_grads) = one.call(), truth(not foreign)
        pairs = [(y, true_y), (grads[0], true_grads[0])]
        if not foreign:  # keys and values were repeated for them
            pairs += list(zip(grads[1:], true_grads[1:], strict=True))
        far[one.name] = max(distance(a, b) for a, b in pairs)
        if not far[one.name] <= limit:
            raise SystemExit(f"{one.name} is not the same function: relative RMS {far[one.name]:.1e} from xla in fp32")
    return far


def compiled(ready: list[Contestant]) -> list[Contestant]:
    """Those of JAX compiled, side by side."""

    def one(contestant: Contestant) -> Contestant:
        call = contestant.call
        if not isinstance(call, functools.partial):
            return contestant
        function: Any = call.func
        return dataclasses.replace(contestant, call=functools.partial(function.lower(*call.args).compile(), *call.args))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, ready))


def settle_foreign(problem: Problem, implementations: list[str], rivals: list[str]) -> None:
    """The first call of flash-linear-attention's tunes it for all sizes to come."""
    for one in contestants(problem, implementations, rivals):
        if one.name in RIVALS:
            one.wait(one.call())


def in_turns(ready: list[Contestant], repeats: int, bar: tqdm) -> list[float]:
    """Median seconds of each, after a warm-up that also says how many calls make a measurement."""
    counts = []
    for one in ready:
        one.wait(one.call())
        counts.append(max(1, round(FEWEST_SECONDS / max(1e-9, seconds_of(one.call, one.wait, 1)))))
    taken: list[list[float]] = [[] for _ in ready]
    for _ in range(repeats):
        for one, count, times in zip(ready, counts, taken, strict=True):
            times.append(seconds_of(one.call, one.wait, count))
            bar.update()
    return [float(np.median(times)) for times in taken]


def sizes(a: argparse.Namespace, dtype: jnp.dtype) -> list[Problem]:
    return [
        Problem(a.batch, T, a.heads, K, K, F, a.width, dtype)
        for F in a.features for K in a.kv_heads for T in a.lengths
    ]  # fmt: skip


def measure(a: argparse.Namespace, dtype: jnp.dtype, implementations: list[str]) -> Iterator[list[dict]]:
    """After every size all rows so far, one a contestant and pass; ratios are of times taken in turns, at one size."""
    rows, chip = [], chips.here(jax.devices()[0])
    problems = sizes(a, dtype)
    with tqdm(total=0, disable=None, unit=" timings") as bar:
        for problem in problems:
            size = f"T={problem.T} K={problem.K} F={problem.F}"
            bar.set_postfix_str(size)
            both = compiled(list(contestants(problem, implementations, a.rivals)))
            say(f"{size}: compiled")
            for which in PASSES:
                ready = [one for one in both if one.which == which]
                bar.total += len(ready) * a.repeats
                medians = dict(zip((one.name for one in ready), in_turns(ready, a.repeats, bar), strict=True))
                for one in ready:
                    roofline = None
                    if chip is not None:
                        of = cost.forward if which == "forward" else cost.forward_backward
                        roofline = of(one.problem, CHUNK).roofline(chip)
                    row = {"implementation": one.name, "pass": which, "T": problem.T, "K": problem.K, "F": problem.F}
                    row |= {"ms": 1e3 * medians[one.name], "roofline_ms": roofline and 1e3 * roofline}
                    for other in ("chunk_simple_gla", "PyTorch"):
                        if rivals := [taken for name, taken in medians.items() if name.startswith(other)]:
                            row[f"of {other}"] = medians[one.name] / min(rivals)
                    rows.append(row)
            say(f"{size}: timed")
            yield rows


def table(rows: list[dict]) -> str:
    """Markdown, a row per contestant, pass, K and F, a column per length: ms, times the roofline, of the rival."""
    lengths = sorted({row["T"] for row in rows})
    rival = next((key.removeprefix("of ") for key in rows[0] if key.startswith("of ")), None)
    title = "ms" + ("" if rows[0]["roofline_ms"] is None else ", × roofline") + (f", × {rival}" if rival else "")
    lines = [f"| {title} | pass | K | F |" + "".join(f" T={T} |" for T in lengths)]
    lines.append("|---|---|---|---|" + "---|" * len(lengths))
    for key in dict.fromkeys((row["implementation"], row["pass"], row["K"], row["F"]) for row in rows):
        cells = {row["T"]: row for row in rows if (row["implementation"], row["pass"], row["K"], row["F"]) == key}
        lines.append("| " + " | ".join([*map(str, key), *(cell(cells.get(T)) for T in lengths)]) + " |")
    return "\n".join(lines)


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    parts = [f"{row['ms']:.3g}"]
    if row["roofline_ms"] is not None:
        parts.append(f"{row['ms'] / row['roofline_ms']:.2f}")
    parts += [f"{value:.2f}" for key, value in row.items() if key.startswith("of ")]
    return ", ".join(parts)


def aim(rows: list[dict]) -> str:
    """Whether the H200's target is met, or that nobody has measured."""
    if "H200" not in jax.devices()[0].device_kind:
        return (
            "The target on an H200 (half of chunk_simple_gla's time, 1.5 × roofline) is unmeasured: this run was on "
            f"{jax.devices()[0].device_kind}."
        )
    best = min((r for r in rows if r["implementation"] in ("triton", "pallas_gpu") and r["pass"] == "forward"),
               key=lambda r: r["ms"] / r["roofline_ms"])  # fmt: skip
    return (
        f"Target on an H200: 1.5 × roofline and 0.5 × chunk_simple_gla. Best forward: {best['implementation']} at "
        f"T={best['T']}, K={best['K']}, {best['ms'] / best['roofline_ms']:.2f} × roofline and "
        f"{best.get('of chunk_simple_gla', float('nan')):.2f} × chunk_simple_gla."
    )


def plot(rows: list[dict], path: Path, title: str) -> None:
    """A panel per pass and K: milliseconds by length, the roofline dotted."""
    columns, F = sorted({row["K"] for row in rows}, reverse=True), rows[0]["F"]
    figure, axes = plt.subplots(2, len(columns), figsize=(5 * len(columns), 8), squeeze=False, sharex=True)
    for line, which in zip(axes, PASSES, strict=True):
        for axis, K in zip(line, columns, strict=True):
            here = [row for row in rows if (row["pass"], row["K"], row["F"]) == (which, K, F)]
            for name in dict.fromkeys(row["implementation"] for row in here):
                mine = sorted((row["T"], row["ms"]) for row in here if row["implementation"] == name)
                axis.plot(*zip(*mine, strict=True), marker="o", label=name)
            bound = sorted({(r["T"], r["roofline_ms"]) for r in here if r["roofline_ms"] and "mapped" not in
                            r["implementation"]})  # fmt: skip
            if bound:
                axis.plot(*zip(*bound, strict=True), color="black", linestyle=":", label="roofline")
            axis.set(title=f"{which}, K={K}, F={F}", xlabel="T", ylabel="ms", xscale="log", yscale="log")
            ticks = sorted({row["T"] for row in here})
            axis.set_xticks(ticks, [str(T) for T in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(backend: str) -> argparse.Namespace:
    default = GPU if backend == "gpu" else CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=default["batch"], metavar="B", help="(here: %(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=default["lengths"], metavar="T", help="(here: %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=default["heads"], metavar="N", help="(here: %(default)s)")
    parser.add_argument(
        "--kv-heads", type=int, nargs="+", default=default["kv_heads"], metavar="K", help="(here: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=default["width"], metavar="H", help="(here: %(default)s)")
    parser.add_argument(
        "--features", type=int, nargs="+", default=default["features"], metavar="F", help="(here: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=20 if backend == "gpu" else 5, help="(here: %(default)s)")
    parser.add_argument(
        "--rivals", nargs="*", default=list(RIVALS), choices=RIVALS, help="of flash-linear-attention (both)"
    )
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="for the results (benchmarks/)")
    return parser.parse_args()


def main() -> int:
    backend = jax.default_backend()
    a = parse(backend)
    implementations = ["triton", "pallas_gpu"] if backend == "gpu" else ["xla"]
    dtype = jnp.dtype(jnp.bfloat16 if backend == "gpu" else jnp.float32)
    if backend == "gpu" and importlib.util.find_spec("fla") is None:
        print("flash-linear-attention is not installed (pip install flash-linear-attention): left out", file=sys.stderr)
    load = round(os.getloadavg()[0], 1)
    far: dict[str, float] = {}
    settle_foreign(sizes(a, dtype)[0], implementations, a.rivals)
    say("rivals tuned")
    for problem in sizes(a, dtype):
        if min(a.lengths) == problem.T:
            for name, value in check(problem, implementations, a.rivals).items():
                far[name] = max(far.get(name, 0.0), value)
    say("all agree")
    record = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        LOAD: load,
        "versions": versions(TIMED),
        "dtype": dtype.name,
        "B": a.batch,
        "N": a.heads,
        "H": a.width,
        "chunk": CHUNK,
        "repeats": a.repeats,
        "agreement": far,
    }
    text = ""
    for rows in measure(a, dtype, implementations):
        text = write(a.out, record | {"rows": rows})
    print(text)
    return 0


def write(out: Path, record: dict[str, Any]) -> str:
    """The results as JSON, table and picture; the table comes back."""
    r, rows = record, record["rows"]
    title = f"log_gate_attention on {r['device']}, {r['dtype']}, B={r['B']} N={r['N']} H={r['H']}, chunk {r['chunk']}"
    agree = "Relative RMS from xla in fp32: " + ", ".join(f"{name} {x:.1e}" for name, x in r["agreement"].items()) + "."
    busy = f"Load of the machine's {r['cores']} cores before this run: {r[LOAD]}."
    text = "\n\n".join([title, table(rows), agree, busy, aim(rows)])
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "kernels.json", json.dumps(record, indent=1) + "\n")
    write_atomic(out / "kernels.md", text + "\n")
    plot(rows, out / "kernels.png", title)
    return text


if __name__ == "__main__":
    sys.exit(main())
