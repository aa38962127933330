"""What must hold before JAX or the packages are imported: the platform, eight devices, and watched axis letters."""

import importlib
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
if os.environ["JAX_PLATFORMS"] == "cpu":
    # A third of the suite's time is LLVM's, on functions that run once. XLA's own passes stay as they are.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

importlib.import_module("lizard_jax.accelerators").settle_platform()
importlib.import_module("tests.axes").watch("lizard_jax", "pallas_kernels")
