"""Gated linear attention: ``log_gate_attention``, its one-token step and its memory."""

from pallas_kernels.log_gate_attention.api import log_gate_attention, log_gate_step
from pallas_kernels.log_gate_attention.state import LinearState, empty_state

__all__ = ["LinearState", "empty_state", "log_gate_attention", "log_gate_step"]
