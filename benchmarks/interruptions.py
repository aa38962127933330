"""A run that is killed, and one whose machine loses power, at many moments: whether it ends as if nothing had happened.

    uv run --group test python -m benchmarks.interruptions [--moments 30]

``train.py`` on its embedded default with short texts, saving after every step and validating after every second. A run
is killed (SIGKILL) at a moment drawn over its life, every other time while a checkpoint is being saved; the same
command goes on, is killed again, and so on until one comes to its end. Its last checkpoint, its best one and the
numbers that it logged are then those of a run that nothing disturbed, bit for bit, or this says what is not and ends
with 1.

Power loss is imitated: the run goes under ``strace``, which tells what was written and what was brought to the disk
(fsync). After the kill, each file that has not been since it was last written loses what it never brought there: in
turns it is empty (or as long as when it was last brought there), as where names reach the disk before contents, and not
there at all.

At last one of two processes that train together is killed, and one process goes on on another mesh (in float64, where
the order of additions is the only difference). Writes ``benchmarks/interruptions.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from benchmarks.plans import ROOT
from lizard_jax import orbax_noise
from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError
from lizard_jax.program import ended
from lizard_jax.train.checkpoint import has_checkpoint
from lizard_jax.train.log import read_metrics

TABLE = ROOT / "benchmarks" / "interruptions"
STEPS = 8
SMALL = ("--batch-size=2", "--sequence-length=64", "--held-out-tokens=512")
RUN = ("train.py", "--stage=1", f"--steps={STEPS}", "--save-every=1", "--validate-every=2", *SMALL)
TRACED = (
    "open,openat,creat,write,writev,pwrite64,pwritev,truncate,ftruncate,copy_file_range,sendfile,fsync,fdatasync,"
    "rename,renameat,renameat2"
)
KINDS = {
    "killed": "killed",
    "emptied": "power lost, files empty that were not on the disk",
    "dropped": "power lost, files gone that were not on the disk",
}
CLOSE = 1e-9
"""Relative, where the mesh is another."""
NUMBERS = ("step", "loss", "layer_mse", "learning_rate", "grad_norm")


def started(
    out: Path, trace: Path | None, more: tuple[str, ...] = (), beside: dict[str, str] | None = None
) -> subprocess.Popen:
    """The run as a process, under strace where there is a file for what it tells; with more flags and environment."""
    watched = () if trace is None else ("strace", "-f", "-y", "-qq", "--seccomp-bpf", "-s", "0", "-e", TRACED)
    where = () if trace is None else ("-o", str(trace))
    environment = (
        os.environ
        | (beside or {})
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(out.parent / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    )
    return subprocess.Popen(
        [*watched, *where, sys.executable, *RUN, *more, f"--out={out}"],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def saving(stage: Path) -> bool:
    """Whether a checkpoint of the run is being written."""
    return any(stage.glob("*/*.orbax-checkpoint-tmp"))


def stopped(process: subprocess.Popen, traced: bool, stage: Path, moment: float, within: bool) -> bool | None:
    """Kill the run after some seconds, or at the first save from then on; whether it was saving, None at its end."""
    end = time.monotonic() + moment
    while process.poll() is None and (time.monotonic() < end or (within and not saving(stage))):
        time.sleep(0.001)
    if within:
        time.sleep(random.random() * 0.2)
    busy = saving(stage)
    if process.poll() is not None:
        return None
    if traced:
        # strace writes down what it has seen when what it watches has ended.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            os.kill(int(children[0]), signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    return busy if process.returncode else None


def not_on_disk(trace: Path, below: Path) -> dict[Path, int]:
    """The files that were written after they were last brought to the disk, and the length that they had then."""
    synced: dict[str, int] = {}
    dirty: set[str] = set()
    lengths: collections.Counter[str] = collections.Counter()
    waiting: dict[str, str] = {}

    def happened(call: str, text: str, done: bool) -> None:
        file = re.match(r"\d+<([^>]*)>", text)
        name = file[1] if file else ""
        if call in ("fsync", "fdatasync"):
            if done and name in dirty:
                dirty.discard(name)
                synced[name] = lengths[name]
        elif call.startswith("rename"):
            old, new = re.findall(r'"([^"]*)"', text)[:2]
            moved = [each for each in lengths if done and (each == old or each.startswith(old + "/"))]
            for each in moved:
                there = new + each[len(old) :]
                lengths[there], was = lengths.pop(each), each in dirty
                synced[there] = synced.pop(each, 0)
                dirty.discard(each)
                (dirty.add if was else dirty.discard)(there)
        elif "open" in call or call == "creat":
            opened = re.search(r"= \d+<([^>]*)>$", text)
            if opened and ("O_TRUNC" in text or ("O_CREAT" in text and opened[1] not in lengths)):
                lengths[opened[1]] = synced[opened[1]] = 0
                dirty.add(opened[1])
        elif name:
            dirty.add(name)
            wrote = re.search(r"= (\d+)$", text)
            lengths[name] += int(wrote[1]) if wrote else 0

    for line in trace.read_text().splitlines():
        pid, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            waiting[pid] = rest.removesuffix("<unfinished ...>")
            continue
        if again := re.match(r"<\.\.\. \w+ resumed>", rest):
            rest = waiting.pop(pid, "") + rest[again.end() :]
        if call := re.match(r"(\w+)\(", rest):
            happened(call[1], rest[call.end() :], re.search(r"= 0$", rest) is not None)
    for rest in waiting.values():
        if call := re.match(r"(\w+)\(", rest):
            happened(call[1], rest[call.end() :], done=False)
    return {Path(name): synced.get(name, 0) for name in dirty if name.startswith(f"{below}/") and Path(name).is_file()}


def lose(files: dict[Path, int], gone: bool) -> None:
    """What a power failure leaves of files that were not on the disk."""
    for file, length in files.items():
        if gone and not length:
            file.unlink()
        else:
            os.truncate(file, min(length, file.stat().st_size))


def arrays(stage: Path, kind: str) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint of a kind, and its step."""
    step = max(int(entry.name) for entry in (stage / kind).iterdir())
    out = {"step": np.asarray(step)}
    orbax_noise.quiet()
    with orbax_noise.failing_quietly(), ocp.PyTreeCheckpointer() as reader:
        for part in ("params", "optimizer") if kind == "checkpoints" else ("params",):
            place = stage / kind / str(step) / part
            how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in reader.metadata(place).item_metadata}
            read = reader.restore(place, ocp.args.PyTreeRestore(restore_args=how))
            out |= {f"{part}/{name}": array for name, array in read.items()}
    return out


def ending(stage: Path) -> dict[str, Any]:
    """What a run came to: its arrays, and the numbers of its log."""
    log = read_metrics(stage / "metrics.jsonl", STEPS)
    lines = [[line.get(name, line.get("validation", {}).get(name)) for name in NUMBERS] for line in log]
    return arrays(stage, "checkpoints") | {f"best {k}": v for k, v in arrays(stage, "best").items()} | {"log": lines}


def unlike(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    return [
        name
        for name in sorted(mine.keys() | theirs.keys())
        if name not in mine
        or name not in theirs
        or (mine[name] != theirs[name] if name == "log" else not np.array_equal(mine[name], theirs[name]))
    ]


def whole(out: Path, more: tuple[str, ...] = (), beside: dict[str, str] | None = None) -> float:
    """Seconds of a run to its end."""
    began = time.monotonic()
    process = started(out, None, more, beside)
    _, told = process.communicate()
    if process.returncode:
        raise UserError(f"the run ended with {process.returncode}: {told.strip().splitlines()[-1:]}")
    return time.monotonic() - began


def disturbed(kind: str, moments: int, work: Path, life: float, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Interrupt runs so many times, each resumed until it ends, and hold each end to the undisturbed one's."""
    found: dict[str, Any] = {"moments": [], "runs": 0, "unlike": [], "lost": collections.Counter()}
    out, trace = work / kind, None if kind == "killed" else work / "trace"
    with tqdm(total=moments, unit="moment", desc=kind, disable=None) as bar:
        while True:
            last = len(found["moments"]) == moments
            process = started(out, trace)
            drawn = float("inf") if last else random.uniform(0, life)
            within = not last and len(found["moments"]) % 2 == 1
            busy = stopped(process, trace is not None, out / "stage1", drawn, within)
            if busy is None:
                assert process.stderr is not None
                told = process.stderr.read().strip().splitlines()
                if process.returncode:
                    raise UserError(f"{kind}: after {found['moments'][-1:]} the run ended with {told[-1:]}")
                found["runs"] += 1
                found["unlike"] += unlike(ending(out / "stage1"), undisturbed)
                shutil.rmtree(out)
                if last:
                    return found
                continue
            if trace is not None:
                files = not_on_disk(trace, out)
                lose(files, gone=kind == "dropped")
                found["lost"].update(re.sub(r"\d+|[0-9a-f]{32}", "N", str(file.relative_to(out))) for file in files)
            found["moments"].append(
                {"seconds": round(drawn, 2), "saving": busy, "checkpoint": has_checkpoint(out / "stage1")}
            )
            bar.update()


def bereaved(work: Path) -> dict[str, Any]:
    """Two processes of one device each, one of them killed; then one process of four devices, on fsdp x tensor.

    Returns:
        seconds until the survivor was gone, the step that was gone on from, and the largest difference of an array of
        the end from that of one process on one device, relative to the array's largest value.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    out = work / "two"
    pair = [started(out, None, ("--dtype=float64",), both | {"JAX_PROCESS_ID": str(index)}) for index in range(2)]
    while not (out / "stage1" / "sums" / f"checkpoints-{STEPS // 2}.json").exists():
        time.sleep(0.01)
        if any(process.poll() is not None for process in pair):
            raise UserError("one of two processes ended before it was killed")
    pair[1].kill()
    began = time.monotonic()
    pair[0].communicate(timeout=300)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "code": pair[0].returncode}
    marks = (out / "stage1" / "sums").glob("checkpoints-*.json")
    found["step"] = max(int(mark.stem.rpartition("-")[2]) for mark in marks if json.loads(mark.read_text()))
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    whole(out, ("--dtype=float64", "--mesh-fsdp=2", "--mesh-tensor=2"), devices)
    whole(work / "one", ("--dtype=float64",))
    mine, theirs = (arrays(place / "stage1", "checkpoints") for place in (out, work / "one"))
    found["off"] = max(
        float(np.abs(mine[name] - theirs[name]).max() / max(np.abs(theirs[name]).max(), 1e-300)) for name in theirs
    )
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: each kind of interruption."""
    lines = [
        f"`{' '.join(RUN)}`, interrupted and gone on with until it ended; each end beside an undisturbed run's.", "",
        "| interruption | moments | while saving | with a checkpoint to go on from | files lost | ends | unlike |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for kind, title in KINDS.items():
        row, moments = rows[kind], rows[kind]["moments"]
        busy, resumed = (sum(bool(moment[name]) for moment in moments) for name in ("saving", "checkpoint"))
        counts = (len(moments), busy, resumed, sum(row["lost"].values()), row["runs"], len(row["unlike"]))
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    peer = rows["peer"]
    lines += [
        "", f"One of two processes killed: the other was gone after {peer['seconds']:.0f} seconds; one process went on "
        f"from step {peer['step']} of {STEPS} on 2 x 2 devices, and its arrays are within {peer['off']:.0e} of one "
        "device's (float64).",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    if args.moments < 2:
        raise UserError(f"--moments is {args.moments}, must be at least 2")
    if shutil.which("strace") is None:
        raise UserError("strace is not installed, and tells here what reached the disk; install it")
    random.seed(args.seed)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        whole(work / "first")  # which fills the compilation cache
        life = whole(work / "undisturbed")
        undisturbed = ending(work / "undisturbed" / "stage1")
        for kind in KINDS:
            count = args.moments if kind == "killed" else args.moments // 2
            rows[kind] = disturbed(kind, count, work, life if kind == "killed" else 1.5 * life, undisturbed)
        rows["peer"] = bereaved(work)
    write_atomic(args.table.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    write_atomic(args.table.with_suffix(".md"), text)
    print(text)
    return int(rows["peer"]["off"] > CLOSE or any(rows[kind]["unlike"] for kind in KINDS))


def main() -> int:
    """Interrupt runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30, help="of kills, and of power losses; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default %(default)s")
    parser.add_argument(
        "--table", type=Path, default=ROOT / "benchmarks" / "interruptions", help="the table, less suffix"
    )
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; no table is written")


if __name__ == "__main__":
    sys.exit(main())
