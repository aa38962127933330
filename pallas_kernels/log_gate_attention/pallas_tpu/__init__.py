"""Gated linear attention on TPUs: Mosaic kernels, forward and backward, with the feature map inside where asked for."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import target as targets
from pallas_kernels.limits import PALLAS_TPU
from pallas_kernels.log_gate_attention.pallas_tpu import backward as backward_pass
from pallas_kernels.log_gate_attention.pallas_tpu import forward as forward_pass
from pallas_kernels.log_gate_attention.pallas_tpu.layout import (
    LANES,
    Plan,
    from_rows,
    gate_rows,
    narrow,
    narrow_features,
    plan_call,
    turned,
    turned_back,
    widen,
    widen_features,
)
from pallas_kernels.log_gate_attention.problem import Implementation, Problem
from pallas_kernels.log_gate_attention.state import LinearState

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from pallas_kernels.log_gate_attention.problem import Act
    from pallas_kernels.target import Target

TOO_LARGE = "the heads that share a state are too many or too wide for a TPU's VMEM"


def _turn_maps(plan: Plan, arrays: dict[str, Array]) -> dict[str, Array]:
    """In the kernels' dtype and layout; rounded first, for what is turned then is half the size."""
    return {name: turned(plan, x.astype(plan.dtype)) if name.endswith("_map") else x for name, x in arrays.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan: Plan, arrays: dict[str, Array]) -> dict[str, Array]:
    """Inputs and outputs in the kernels' layout, by name, but for the maps, which are as given."""
    return forward_pass.forward(plan, _turn_maps(plan, arrays))


def _run_fwd(plan: Plan, arrays: dict[str, Array]):
    return _run(plan, arrays), arrays


def _run_bwd(plan: Plan, arrays: dict[str, Array], cotangents: dict[str, Array]):
    inputs = _turn_maps(plan, arrays)
    starts = forward_pass.states(plan, inputs)
    cotangents = {f"d{name}": x for name, x in cotangents.items() if name != "m"}
    grads = backward_pass.backward(plan, inputs, starts, cotangents)
    for name in grads:
        if name.endswith("_map"):
            _, X, E = arrays[name].shape
            grads[name] = turned_back(jnp.sum(grads[name], 0), X, E).astype(arrays[name].dtype)
    return (grads | {"m": jnp.zeros_like(arrays["m"])},)


_run.defvjp(_run_fwd, _run_bwd)


def _attend(
    q, k, v, g, c, state: LinearState, maps: dict[str, Array], normalize: bool, act: Act | None, chunk: int
) -> tuple[Array, Array, LinearState]:
    (B, T, N, width), (K, H), (S, features) = q.shape, v.shape[2:], state.z.shape[1:]
    problem = Problem(B, T, N, S, K, features, H, q.dtype, act=act, width=width if act else None)
    plan = plan_call(problem, targets.current(), normalize, chunk)
    if plan is None:
        raise ValueError(TOO_LARGE)
    g, c = gate_rows(plan, g, c)
    arrays = {
        "q": widen(q, plan.X), "k": widen(k, plan.X), "v": widen(v, plan.H), "g": g, "c": c,
        "kv": jnp.pad(widen_features(plan, state.kv), ((0, 0), (0, 0), (0, 0), (0, plan.H - H))),
        "z": widen_features(plan, state.z)[:, :, None],
        "m": state.m[..., None, None],
        **maps,
    }  # fmt: skip
    out: dict[str, Array] = _run(plan, arrays)
    kv, z = narrow_features(plan, out["kv"][..., :H]), narrow_features(plan, out["z"][:, :, 0])
    final = LinearState(kv, z, out["m"][:, :, 0, 0])
    return narrow(out["y"], N, H), from_rows(out["n"], T), final


def attend(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B T S F"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    normalize: bool,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """One pass over the sequence; its gradient takes two, the first for the states before each chunk.

    ``chunk`` is a hint, see ``plan_call``. Widths are filled to multiples of 128 with zeros, which costs nothing where
    they are.
    """
    return _attend(q, k, v, g, c, state, {}, normalize, None, chunk)


def attend_mapped(
    q: Float[Array, "B T N X"],
    k: Float[Array, "B T K X"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    q_map: Float[Array, "N X half"],
    k_map: Float[Array, "S X half"],
    act: Act,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The same from raw queries and keys: features live in VMEM alone, forward and backward."""
    return _attend(q, k, v, g, c, state, {"q_map": q_map, "k_map": k_map}, True, act, chunk)


def cannot_run(problem: Problem, target: Target) -> str | None:
    """Why not, in one line; None where it can."""
    sizes = {"F": problem.F, "H": problem.H, "X": problem.width}
    if (refusal := PALLAS_TPU.refusal(target, problem.dtype, vector_gates=problem.vector_gates, **sizes)) is not None:
        return refusal
    return None if plan_call(problem, target, normalize=True, chunk=LANES) else TOO_LARGE


IMPLEMENTATION = Implementation(attend, attend_mapped, cannot_run)
