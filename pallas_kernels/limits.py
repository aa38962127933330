"""What the kernels of a toolchain can take, whatever the op."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax.numpy as jnp

from pallas_kernels.target import Target, unfit_gpu

_PLATFORMS = {"gpu": "GPUs", "tpu": "TPUs"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one toolchain.

    Attributes:
        name: the implementation's.
        platform: that it is for.
        widest: the largest size of an axis that is tiled whole; None where memory alone decides.
        packages: modules that it needs beside jax.
    """

    name: str
    platform: str
    widest: int | None = None
    packages: tuple[str, ...] = ()

    def refusal(
        self, device: Target, dtype: jnp.dtype, *, vector_gates: bool = False, **sizes: int | None
    ) -> str | None:
        """Why a problem cannot run on a target, in one line; None where it can as far as this knows.

        Args:
            vector_gates: gates are of one value per feature.
            sizes: of axes that must be multiples of 16, by letter; None for one that is not there.
        """
        if device.platform != self.platform:
            return f"{self.name} runs on {_PLATFORMS[self.platform]}; this process has {device.platform}"
        if (unfit := unfit_gpu(device)) is not None:
            return f"{self.name}: {unfit}"
        if missing := [module for module in self.packages if importlib.util.find_spec(module) is None]:
            return f"{self.name} needs {' and '.join(missing)}, which this environment lacks"
        if vector_gates:
            return f"gates are of one value per feature; {self.name} needs one per head"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"inputs are {jnp.dtype(dtype).name}; {self.name} takes bfloat16 and float32"
        most = "" if self.widest is None else f" up to {self.widest}"
        for letter, size in sizes.items():
            if size is not None and (size % 16 or (self.widest is not None and size > self.widest)):
                return f"{letter} is {size}; {self.name} needs multiples of 16{most}"
        return None


PALLAS_GPU = Limits("pallas_gpu", "gpu", 256)
PALLAS_TPU = Limits("pallas_tpu", "tpu")
TRITON = Limits("triton", "gpu", 256, ("triton", "jax_triton"))
