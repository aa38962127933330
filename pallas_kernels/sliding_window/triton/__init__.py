"""The window on NVIDIA GPUs from A100 on, by Triton kernels that jax-triton launches."""

from pallas_kernels.sliding_window.triton.attend import IMPLEMENTATION

__all__ = ["IMPLEMENTATION"]
