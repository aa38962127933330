"""Strict numerics for every test, and the real data beside the project where it is present."""

import ctypes
import gc
import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# What JAX keeps of a trace is many small objects that live long: looking through them for garbage took a tenth of the
# suite's time.
gc.set_threshold(50_000, 20, 100)

SLOW = frozenset(Path(__file__).with_name("slow.txt").read_text().split())
"""Tests that the short check leaves out, as ``train/test_run.py::test_name``: what takes more than two seconds."""

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


LONGEST = (
    "kernels/test_log_gate_attention", "train/test_run", "kernels/test_compile", "train/test_fsdp", "test_on_chips",
    "train/test_linearize", "test_budgets", "test_recovery", "plan/test_plan", "generate/test_devices",
    "nn/test_split_attention", "kernels/test_sliding_window", "models/test_decode",
)  # fmt: skip
"""Files that take a minute or more, the longest first: begun first, so that no worker waits for another's last one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what ``slow.txt`` names, and puts the longest files first."""
    for item in items:
        if item.nodeid.partition("[")[0].removeprefix("tests/") in SLOW:
            item.add_marker(pytest.mark.slow)
    place = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


MOST_MEMORY = 2.5 * 2**30
"""Of a worker, beyond which what JAX compiled is forgotten at the end of a file; few files share a function."""


@pytest.fixture(scope="module", autouse=True)
def _memory():
    """Gives memory back between files, where it can be asked for."""
    yield
    statm = Path("/proc/self/statm")
    if statm.is_file() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > MOST_MEMORY:
        jax.clear_caches()
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # glibc's own


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real checkpoints and texts beside the project; the test skips where it is absent."""
    if not (SHARED / "babyllama" / "config.json").is_file():
        pytest.skip("no ../shared/data beside the project")
    return SHARED


@pytest.fixture
def x64():
    """float64 switched on for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
