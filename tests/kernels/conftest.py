"""Kernels are tested where they run, or interpreted on a CPU. A platform asked for and not there ends the run."""

import os

# Several test processes share a device: none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

from lizard_jax.accelerators import startable
from lizard_jax.errors import UserError


def pytest_configure(config):
    # `pallas_gpu` is built on this backend knowingly; its docstring says why.
    config.addinivalue_line("filterwarnings", "ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
    if hasattr(config, "workerinput"):  # the process that leads the workers has looked
        return
    try:
        with startable():
            jax.devices()
    except UserError as error:
        pytest.exit(str(error), returncode=3)
