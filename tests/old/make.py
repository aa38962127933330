"""Writes what this version leaves behind, for later ones to read: ``python -m tests.old.make tests/old/NAME.tar.gz``.

A minute teacher, a run of both stages with its best checkpoints, and the run as a Flax directory, as an HF directory
and as one with an adapter; with some of the logits each gives. A file that is there stays as it is: it stands for its
version.
"""

import dataclasses
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

import lizard_jax
import tests.conftest  # noqa: F401  (the same devices and strictness as in the tests)
from lizard_jax.convert.__main__ import flax2hf, hf2flax
from lizard_jax.convert.files import carry
from lizard_jax.convert.save import save_hf
from lizard_jax.embedded import teacher_path
from lizard_jax.models import build
from lizard_jax.train.__main__ import main as train
from tests.jitted import logits
from tests.train.tiny import MODEL

IDS = np.random.default_rng(0).integers(0, 1024, (1, 32), np.int32)
STUDENTS = "run/stage1", "run/stage2", "flax", "hf", "adapter"
LINE = "--sequence-length 32 --window 8 --chunk 8 --kept 3 --batch-size 8 --steps 2 --held-out 0.1 --held-out-tokens 64"


def some_logits(student: str | Path) -> np.ndarray:
    """Every seventh token's, of a student in that directory."""
    return np.asarray(logits(lizard_jax.load(student), IDS))[..., ::7]


def make() -> None:
    """Everything, in this directory."""
    shape = dataclasses.replace(MODEL, vocab_size=1024, hidden_size=8, intermediate_size=12, head_dim=4)
    save_hf(build(shape, rngs=nnx.Rngs(0)), Path("teacher"), source=None)
    carry(teacher_path(), Path("teacher"))
    words = np.random.default_rng(0).choice(["def", "return", "lizard", "class", "yield", "x"], (20, 80))
    Path("text.txt").write_text("<|endoftext|>".join(" ".join(row) for row in words))
    for stage in (1, 2):
        if train([f"--stage={stage}", "--teacher=teacher", "--data=text.txt", "--out=run", *LINE.split()]):
            sys.exit("no run")
    flax2hf("run/stage2", "hf", adapter=False)
    flax2hf("run/stage2", "adapter", adapter=True)
    hf2flax("hf", "flax")
    np.savez_compressed("expected.npz", **{name.replace("/", "_"): some_logits(name) for name in STUDENTS})
    for stage in (1, 2):
        shutil.rmtree(f"run/stage{stage}/checkpoints")
        for file in Path(f"run/stage{stage}/sums").glob("checkpoints-*"):
            file.unlink()
    for file in Path.cwd().rglob("*"):
        tokenizer = "token" in file.name and file.parent.name != "teacher"
        if tokenizer or file.name in ("text.txt", "curves.png") or "tfevents" in file.name:
            file.unlink()


def main() -> None:
    """The archive at the path on the command line."""
    target = Path(sys.argv[1]).absolute()
    if target.exists():
        sys.exit(f"{target} is there and stands for the version that made it; name another")
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        make()
        with tarfile.open(target, "w:gz") as archive:
            archive.add(".")


if __name__ == "__main__":
    main()
