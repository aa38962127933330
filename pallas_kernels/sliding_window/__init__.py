"""Banded softmax attention with meta memory: ``sliding_window``."""

from pallas_kernels.sliding_window.api import sliding_window

__all__ = ["sliding_window"]
