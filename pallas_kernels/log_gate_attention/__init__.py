"""Gated linear attention: ``log_gate_attention``, ``mapped_log_gate_attention``, its one-token step and its memory."""

from pallas_kernels.log_gate_attention.api import log_gate_attention, log_gate_step, mapped_log_gate_attention
from pallas_kernels.log_gate_attention.features import feature_map
from pallas_kernels.log_gate_attention.state import LinearState, empty_state

__all__ = [
    "LinearState",
    "empty_state",
    "feature_map",
    "log_gate_attention",
    "log_gate_step",
    "mapped_log_gate_attention",
]
