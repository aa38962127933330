"""What must hold before JAX or the packages are imported: the platform, eight devices, and watched axis letters."""

import atexit
import importlib
import os
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the suite's time is compiling functions that run once. XLA's own passes stay as they are; LLVM does the
    # least, and loops are written the older way, which opens no MLIR context for each: two fifths of the time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if "xla_backend_extra_options" not in flags:
        flags += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = flags.strip()
if "LIZARD_TESTS" not in os.environ:
    # What the workers, and the processes that tests start, compile alike; the first process of all cleans up.
    os.environ["LIZARD_TESTS"] = tempfile.mkdtemp(prefix="lizard-tests-")
    atexit.register(shutil.rmtree, os.environ["LIZARD_TESTS"], ignore_errors=True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["LIZARD_TESTS"], "xla")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        # Two thirds of what it takes to start a process. Still nothing is written beside sources.
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = os.path.join(os.environ["LIZARD_TESTS"], "python")
        sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

importlib.import_module("lizard_jax.accelerators").settle_platform()
importlib.import_module("tests.axes").watch("lizard_jax", "pallas_kernels")
