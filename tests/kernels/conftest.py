"""Kernels are tested where they run, or interpreted on a CPU. A platform asked for and not there ends the run."""

import logging
import os

# Several test processes share a device: none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest


def pytest_configure(config):
    # `pallas_gpu` is built on this backend knowingly; its docstring says why.
    config.addinivalue_line("filterwarnings", "ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
    if hasattr(config, "workerinput"):  # the process that leads the workers has looked
        return
    reasons = []

    def keep_reason(record):
        reasons.append(record.exc_info[1] if record.exc_info else record.getMessage())
        return False

    # JAX logs a plugin's failure with a traceback and goes on; here it is at most one line's reason.
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep_reason)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms, reason = os.environ.get("JAX_PLATFORMS"), str((reasons or [error])[0]).strip().splitlines()[0]
        pytest.exit(f"JAX_PLATFORMS={platforms}: no such device on this machine ({reason})", returncode=3)
    finally:
        logger.removeFilter(keep_reason)
