"""JAX is told of a machine without accelerators, and left alone everywhere else."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lizard_jax import accelerators
from pallas_kernels import chips


@pytest.fixture
def before_jax(monkeypatch):
    """As on Linux before anything imported JAX."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "jax")


@pytest.mark.usefixtures("before_jax")
@pytest.mark.parametrize(
    ("nodes", "environment", "plugins", "chosen"),
    [
        ([], {}, [], "cpu"),
        (["nvidia0"], {}, [], None),
        (["accel0"], {}, [], None),
        ([], {"JAX_PLATFORMS": "gpu"}, [], "gpu"),
        (["nvidia0"], {"JAX_PLATFORMS": "gpu"}, ["xla_cuda13", "other"], "cuda"),
        (["kfd"], {"JAX_PLATFORMS": "gpu,cpu"}, ["xla_rocm7"], "rocm,cpu"),
        (["nvidia0"], {"JAX_PLATFORMS": "tpu"}, ["xla_cuda13"], "tpu"),
    ],
)
def test_the_platform(monkeypatch, tmp_path, nodes, environment, plugins, chosen):
    found = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(accelerators.importlib.metadata, "entry_points", lambda group: found)
    for node in nodes:
        (tmp_path / node).touch()
    accelerators.settle_platform(environment, tmp_path)
    assert environment.get("JAX_PLATFORMS") == chosen


def test_a_platform_that_cannot_start_is_one_line(tmp_path):
    told = {"JAX_PLATFORMS": "nonsense", "PATH": os.environ["PATH"]}
    line = [sys.executable, "train.py", "--stage=1", "--steps=1", f"--out={tmp_path}"]
    done = subprocess.run(line, cwd=Path(__file__).parents[1], env=told, capture_output=True, text=True)
    assert done.returncode == 2
    assert "JAX_PLATFORMS=nonsense: no such device on this machine" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_another_error_than_a_platforms_passes_through():
    with pytest.raises(AssertionError, match="mine"), accelerators.startable({"JAX_PLATFORMS": "cuda"}):
        raise AssertionError("mine")


@pytest.mark.skipif(any(any(Path("/dev").glob(p)) for p in accelerators.DEVICES), reason="an accelerator is here")
def test_nothing_is_said_of_plugins_without_devices(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    code = "import lizard_jax, jax; print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.usefixtures("before_jax")
@pytest.mark.parametrize(
    ("nodes", "environment", "chosen"),
    [
        (["nvidia0"], {"XDG_CACHE_HOME": "/c"}, "/c/lizard-jax/compiled"),
        (["accel0"], {"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        ([], {"XDG_CACHE_HOME": "/c"}, None),
        (["nvidia0"], {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": "/c"}, None),
    ],
)
def test_what_is_compiled_for_an_accelerator_is_kept(tmp_path, nodes, environment, chosen):
    for node in nodes:
        (tmp_path / node).touch()
    accelerators.keep_compiled(environment, tmp_path)
    assert environment.get("JAX_COMPILATION_CACHE_DIR") == chosen


@pytest.mark.parametrize("command", ["train", "generate", "eval", "select", "convert"])
def test_a_command_says_so_before_jax_is_there(command):
    code = f"import sys, lizard_jax.{command}.__main__; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "a100"),
        ("gpu", "NVIDIA H200", "h200"),
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v5", "v5p"),
        ("tpu", "TPU v6 lite", "v6e"),
        ("tpu", "TPU7x", "tpu7x"),
        ("gpu", "NVIDIA GeForce RTX 4090", None),
        ("cpu", "cpu", None),
    ],
)
def test_a_devices_chip_is_known_by_its_kind(platform, kind, name):
    found = chips.here(SimpleNamespace(platform=platform, device_kind=kind))
    assert found == (chips.CHIPS[name] if name else None)
