"""Imports run one way: a room knows only those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = ["errors", "typing", "config"]
NN = [*BASE, "sharding", "nn", "pallas_kernels"]
MODEL = [*NN, "models"]
ALLOWED: dict[str, list[str]] = {
    "typing": [],
    "errors": [],
    "config": ["errors", "typing"],
    "orbax_noise": ["errors"],
    "atomic": [],
    "checksums": [],
    "program": ["errors", "accelerators"],
    "accelerators": ["errors"],
    "sharding": [*BASE, "pallas_kernels"],
    "devices": [*BASE, "sharding", "pallas_kernels"],
    "nn": NN,
    "models": MODEL,
    "lora": MODEL,
    "losses": MODEL,
    "embedded": BASE,
    "data": [*BASE, "embedded"],
    "convert": [*MODEL, "lora", "embedded", "orbax_noise", "checksums", "atomic"],
    "cli": [*BASE, "configs", "embedded", "program"],
    "select": [*MODEL, "losses", "convert", "data", "embedded", "atomic", "program"],
    "train": [
        *MODEL,
        "losses",
        "lora",
        "convert",
        "data",
        "embedded",
        "cli",
        "orbax_noise",
        "atomic",
        "checksums",
        "select",
        "program",
    ],
    "plan": [*MODEL, "losses", "lora", "convert", "data", "embedded", "cli", "select", "train"],
    "generate": [*MODEL, "convert", "data", "atomic"],
    "load": [*MODEL, "lora", "convert", "train", "generate"],
    "eval": [*MODEL, "losses", "lora", "convert", "data", "embedded", "train", "generate", "load", "atomic"],
}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "lizard_jax" else parts[0]


def imported(path: Path) -> set[str]:
    """Rooms of the project a file imports, lazily or at the top."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = ("lizard_jax.load" if name == "lizard_jax" else name).split(".")
            if parts[0] in ("lizard_jax", "pallas_kernels", "configs"):
                out.add(parts[1] if parts[0] == "lizard_jax" else parts[0])
    return out


FILES = sorted(
    path for folder in ("lizard_jax", "pallas_kernels") for path in (ROOT / folder).rglob("*.py")
    if path.name != "__main__.py" and (path.name != "__init__.py" or path.parent.name != "lizard_jax")
)  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_those_below_it(path):
    here = room(path)
    allowed = {"pallas_kernels"} if here == "pallas_kernels" else {here, *ALLOWED[here]}
    assert imported(path) <= allowed


def test_importing_the_package_is_light():
    """``import lizard_jax`` costs no jax import: commands check their arguments before they load anything slow."""
    import subprocess
    import sys

    code = "import sys, lizard_jax; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_the_short_check_leaves_out_is_there():
    for name in (ROOT / "tests" / "slow.txt").read_text().split():
        file, test = name.split("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), name
