"""What must hold before JAX or the packages are imported: the platform, eight devices, and watched axis letters."""

import atexit
import importlib
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
if os.environ["JAX_PLATFORMS"] == "cpu":
    # A third of the suite's time is LLVM's, on functions that run once. XLA's own passes stay as they are.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The two workers, and the processes that tests start, compile much of the same; the first process of all cleans up.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lizard-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

importlib.import_module("lizard_jax.accelerators").settle_platform()
importlib.import_module("tests.axes").watch("lizard_jax", "pallas_kernels")
