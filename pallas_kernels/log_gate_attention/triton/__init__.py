"""Gated linear attention in Triton through jax-triton, for A100 and later."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.limits import TRITON
from pallas_kernels.log_gate_attention.problem import Implementation, Problem
from pallas_kernels.log_gate_attention.triton.attend import attend
from pallas_kernels.log_gate_attention.triton.attend_mapped import attend_mapped
from pallas_kernels.log_gate_attention.triton.plan import is_ampere
from pallas_kernels.target import Target


def cannot_run(problem: Problem, target: Target) -> str | None:
    """Why a problem cannot run here, in one line; None where it can."""
    sizes = {"F": problem.F, "H": problem.H, "X": problem.width}
    if (refusal := TRITON.refusal(target, problem.dtype, vector_gates=problem.vector_gates, **sizes)) is not None:
        return refusal
    large = problem.act is None and min(problem.F, problem.H) > 128
    if large and (is_ampere(target) or problem.dtype == jnp.float32):
        return f"F is {problem.F} and H is {problem.H}; triton's gradient then needs bfloat16 and the memory of an H100"
    return None


IMPLEMENTATION = Implementation(attend, attend_mapped, cannot_run)
