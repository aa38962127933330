"""Gated linear attention in Triton through jax-triton, for A100 and later."""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp

from pallas_kernels.log_gate_attention.problem import Implementation, Problem
from pallas_kernels.log_gate_attention.triton.attend import attend
from pallas_kernels.log_gate_attention.triton.attend_mapped import attend_mapped
from pallas_kernels.log_gate_attention.triton.plan import is_ampere
from pallas_kernels.target import Target, unfit_gpu


def cannot_run(problem: Problem, target: Target) -> str | None:
    """Why a problem cannot run here, in one line; None where it can."""
    if target.platform != "gpu" and not target.interpret:
        return f"triton runs on GPUs; this process has {target.platform}"
    if (unfit := unfit_gpu(target)) is not None:
        return f"triton: {unfit}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("jax_triton") is None:
        return "triton needs the packages triton and jax-triton"
    if problem.vector_gates:
        return "triton takes gates of one value per head, not per feature"
    if problem.dtype not in (jnp.bfloat16, jnp.float32):
        return f"triton takes bfloat16 and float32, not {problem.dtype}"
    sizes = {"F": problem.F, "H": problem.H} | ({"X": problem.width} if problem.width else {})
    wrong = next((f"{name} is {size}" for name, size in sizes.items() if size % 16 or size > 256), None)
    if wrong is not None:
        return f"{wrong}; triton needs multiples of 16 up to 256"
    large = problem.act is None and min(problem.F, problem.H) > 128
    if large and (is_ampere(target) or problem.dtype == jnp.float32):
        return f"F is {problem.F} and H is {problem.H}; triton's gradient then needs bfloat16 and the memory of an H100"
    return None


IMPLEMENTATION = Implementation(attend, attend_mapped, cannot_run)
