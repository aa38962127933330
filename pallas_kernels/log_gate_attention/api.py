"""The only door to gated linear attention: one public op, many implementations, and its one-token step."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import partition
from pallas_kernels.dispatch import choose
from pallas_kernels.log_gate_attention.exponents import FORGET
from pallas_kernels.log_gate_attention.problem import Act, Problem
from pallas_kernels.log_gate_attention.segments import apply_segments
from pallas_kernels.log_gate_attention.state import LinearState, empty_state
from pallas_kernels.log_gate_attention.step import step
from pallas_kernels.numerics import ABSENT, EMPTY, accumulator
from pallas_kernels.partition import HEADS, MEMORY, TOKENS

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def log_gate_attention(
    q_feat: Float[Array, "B T N F"],
    k_feat: Float[Array, "B T S F"],
    v: Float[Array, "B T K H"],
    log_gate: Float[Array, "B T S"] | Float[Array, "B T S F"],
    *,
    k_log_scale: Float[Array, "B T S"] | None = None,
    initial_state: LinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize: bool = True,
    return_log_normalizer: bool = False,
    return_final_state: bool = False,
    chunk: int = 64,
    implementation: str | None = None,
):
    """Causal linear attention whose memory forgets by a learned gate.

    ``y_i = Σ_j w_ij v_j / Σ_j w_ij`` over ``j ≤ i`` with ``w_ij = e^(g_{j+1} + … + g_i + c_j) φ(q_i)·φ(k_j)``, where
    ``g`` are the log gates (≤ 0) and ``c`` the log scales of the keys. Gates of one value per feature stand inside the
    dot product: ``w_ij = e^(c_j) Σ_f e^(g_{j+1,f} + … + g_{i,f}) φ(q_i)_f φ(k_j)_f``.

    Query head ``n`` reads state head ``n // (N/S)``, and state head ``s`` holds the values of key/value head
    ``s // (S/K)``. With ``S = K`` the query heads of a key/value head share one memory; with ``S = N`` each has its
    own. Neither keys nor values are repeated in memory.

    Args:
        q_feat: features of the queries, ``[B, T, N, F]``, not negative.
        k_feat: features of the keys, ``[B, T, S, F]``, not negative.
        v: values, ``[B, T, K, H]``; the output has their dtype.
        log_gate: log gates, ``[B, T, S]`` or ``[B, T, S, F]``, at most 0 and computed in fp32. One at or below -500
            forgets everything.
        k_log_scale: log scale of each key, ``[B, T, S]``. A key at or below -1e29 is absent: it has no weight and no
            gradient. ``None`` stands for 0.
        initial_state: the memory at the start; it continues the first document. ``None`` stands for an empty one.
        segment_ids: ``[B, T]`` integers: 0 is padding, and the memory is emptied where an id differs from the last one
            that was not 0. Padding reads 0, writes nothing and forgets nothing.
        normalize: divide by ``Σ_j w_ij``; otherwise ``y_i`` is the plain sum.
        return_log_normalizer: also return ``n_i = log Σ_j w_ij``, ``[B, T, N]``.
        return_final_state: also return the memory after the last position.
        chunk: tokens computed at once; a matter of speed and memory only, and a hint to the kernels.
        implementation: one of ``dispatch.IMPLEMENTATIONS``; ``None`` picks by platform and shape.

    Returns:
        ``y`` ``[B, T, N, H]``; with one or both of the flags a tuple ``(y, n, state)`` of what was asked for. ``n`` and
        the state are fp32 (fp64 if any input is). Where no key is in memory, or all weights are 0, ``y`` is 0, ``n`` is
        -1e30 and every gradient 0; "0" is 1e-30 or less relative to the row's largest decay factor.

    Raises:
        ValueError: an unknown implementation, one that cannot compute this here, or shapes that do not fit.
    """
    (B, T, N, F), S, (K, H) = q_feat.shape, k_feat.shape[2], v.shape[2:]
    _check_heads(N, S, K)
    _check("k_feat", k_feat.shape, (B, T, S, F))
    _check("v", v.shape, (B, T, K, H))
    _check("log_gate", log_gate.shape, (B, T, S), (B, T, S, F))
    vector = log_gate.ndim == 4
    problem = Problem(B, T, N, S, K, F, H, _widest(q_feat, k_feat, v), vector_gates=vector)
    chosen = _choose(problem, implementation, chunk)

    wide = _accumulator(q_feat, k_feat, v, log_gate, k_log_scale, initial_state and initial_state.kv)
    g, c = _gates(log_gate, k_log_scale, (B, T, S), wide)
    if segment_ids is not None:
        _check("segment_ids", segment_ids.shape, (B, T))
        q_feat, g, c = apply_segments(q_feat, g, c, segment_ids)
    state = _state(initial_state, B, S, F, H, wide, vector)

    run = functools.partial(chosen.attend, normalize=normalize, chunk=chunk)
    arrays = (q_feat, k_feat, v)
    if chosen.kernel:
        arrays = tuple(x.astype(problem.dtype) for x in arrays)
        run = partition.spread(run, (*(TOKENS,) * 5, MEMORY), (TOKENS, TOKENS, MEMORY), B, (S, K))
    y, n, state = run(*arrays, g, c, state)
    return _asked(y.astype(v.dtype), n, state, return_log_normalizer, return_final_state)


def mapped_log_gate_attention(
    q: Float[Array, "B T N X"],
    k: Float[Array, "B T K X"],
    v: Float[Array, "B T K H"],
    log_gate: Float[Array, "B T S"] | Float[Array, "B T S F"],
    *,
    q_map: Float[Array, "N X half"],
    k_map: Float[Array, "S X half"],
    act: Act,
    k_log_scale: Float[Array, "B T S"] | None = None,
    initial_state: LinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_log_normalizer: bool = False,
    return_final_state: bool = False,
    chunk: int = 64,
    implementation: str | None = None,
):
    """``log_gate_attention`` of ``φ(q)`` and ``φ(k)``, whose features the kernels compute themselves.

    ``φ(x) = act(xA) ⊕ act(−xA)``, see ``features.feature_map``. The features, twice as wide as the heads, are the
    op's largest inputs; the kernels make them where they are used, in the forward and in the backward pass. For
    ``exp`` the keys' log scales join the exponents of the gates, and the queries' are part of the log normalizer.

    Args:
        q_map, k_map: the weights A, of each query head and of each state head; rounded to the dtype of ``q`` where
            they meet it. Gradients are summed in fp32 and come in the weights' dtype.
        act: ``exp`` or ``softmax``.

    Everything else, results and errors are those of ``log_gate_attention`` with ``normalize=True``.
    """
    (B, T, N, X), (K, H), S, half = q.shape, v.shape[2:], k_map.shape[0], k_map.shape[2]
    F = 2 * half
    _check_heads(N, S, K)
    _check("k", k.shape, (B, T, K, X))
    _check("v", v.shape, (B, T, K, H))
    _check("q_map", q_map.shape, (N, X, half))
    _check("k_map", k_map.shape, (S, X, half))
    _check("log_gate", log_gate.shape, (B, T, S), (B, T, S, F))
    if act not in ("exp", "softmax"):
        raise ValueError(f"log_gate_attention: act is {act!r}, must be 'exp' or 'softmax'")
    vector = log_gate.ndim == 4
    problem = Problem(B, T, N, S, K, F, H, _widest(q, k, v), vector_gates=vector, act=act, width=X)
    chosen = _choose(problem, implementation, chunk)

    wide = _accumulator(q, k, v, log_gate, k_log_scale, initial_state and initial_state.kv)
    g, c = _gates(log_gate, k_log_scale, (B, T, S), wide)
    if segment_ids is not None:
        _check("segment_ids", segment_ids.shape, (B, T))
        q, g, c = apply_segments(q, g, c, segment_ids)
    state = _state(initial_state, B, S, F, H, wide, vector)

    run = functools.partial(chosen.attend_mapped, act=act, chunk=chunk)
    arrays = (q, k, v)
    if chosen.kernel:
        arrays = tuple(x.astype(problem.dtype) for x in arrays)
        roles = (*(TOKENS,) * 5, MEMORY, HEADS, HEADS)
        run = partition.spread(run, roles, (TOKENS, TOKENS, MEMORY), B, (S, K))
    y, n, state = run(*arrays, g, c, state, q_map, k_map)
    if segment_ids is not None:  # φ(0) is not 0
        real = (segment_ids != 0)[..., None]
        y, n = jnp.where(real[..., None], y, jnp.zeros((), y.dtype)), jnp.where(real, n, EMPTY)
    return _asked(y.astype(v.dtype), n, state, return_log_normalizer, return_final_state)


def log_gate_step(
    q_feat: Float[Array, "B N F"],
    k_feat: Float[Array, "B S F"],
    v: Float[Array, "B K H"],
    log_gate: Float[Array, "B S"] | Float[Array, "B S F"],
    *,
    k_log_scale: Float[Array, "B S"] | None = None,
    state: LinearState,
    normalize: bool = True,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"], LinearState]:
    """The same op for one token: what ``log_gate_attention`` gives at the next position, and the memory after it.

    Returns ``(y, n, state)`` with ``y`` in the dtype of ``v``; see ``log_gate_attention`` for the rest.

    Raises:
        ValueError: shapes that do not fit.
    """
    (B, N, F), S, (K, H) = q_feat.shape, k_feat.shape[1], v.shape[1:]
    _check_heads(N, S, K)
    _check("k_feat", k_feat.shape, (B, S, F))
    _check("v", v.shape, (B, K, H))
    _check("log_gate", log_gate.shape, (B, S), (B, S, F))
    wide = _accumulator(q_feat, k_feat, v, log_gate, k_log_scale, state.kv)
    g, c = _gates(log_gate, k_log_scale, (B, S), wide)
    q, k, values = (x.astype(wide) for x in (q_feat, k_feat, v))
    memory = _state(state, B, S, F, H, wide, log_gate.ndim == 3)
    y, n, state = step(q, k, values, g, c, state=memory, normalize=normalize)
    return y.astype(v.dtype), n, state


def _check(name: str, shape: tuple[int, ...], *allowed: tuple[int, ...]) -> None:
    if shape not in allowed:
        raise ValueError(f"log_gate_attention: {name} has shape {shape}, expected {' or '.join(map(str, allowed))}")


def _check_heads(N: int, S: int, K: int) -> None:
    if S not in (N, K) or N % K:
        raise ValueError(
            f"log_gate_attention: {N} query heads, {S} state heads and {K} key/value heads do not fit: "
            "query heads must be a multiple of key/value heads, and state heads one of the two"
        )


def _choose(problem: Problem, implementation: str | None, chunk: int):
    if chunk < 1:
        raise ValueError(f"log_gate_attention: chunk is {chunk}, must be at least 1")
    if problem.T < 1:
        raise ValueError("log_gate_attention: no tokens; T must be at least 1")
    return choose("log_gate_attention", problem, implementation)


def _accumulator(*arrays: Array | None) -> jnp.dtype:
    return accumulator(*(x.dtype for x in arrays if x is not None))


def _widest(*arrays: Array) -> jnp.dtype:
    return max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)


def _gates(log_gate: Array, k_log_scale: Array | None, heads: tuple[int, ...], wide) -> tuple[Array, Array]:
    """Log gates and key scales as implementations expect them: what is far below is exactly -1e30."""
    g = jnp.where(log_gate > FORGET, log_gate.astype(wide), EMPTY)
    if k_log_scale is None:
        return g, jnp.zeros(heads, wide)
    _check("k_log_scale", k_log_scale.shape, heads)
    return g, jnp.where(k_log_scale > ABSENT, k_log_scale.astype(wide), EMPTY)


def _state(state: LinearState | None, B: int, S: int, F: int, H: int, wide, vector: bool) -> LinearState:
    if state is None:
        return empty_state(B, S, F, H, wide, vector_gates=vector)
    _check("state.kv", state.kv.shape, (B, S, F, H))
    _check("state.z", state.z.shape, (B, S, F))
    _check("state.m", state.m.shape, (B, S), *([(B, S, F)] if vector else []))
    m = jnp.broadcast_to(state.m[..., None], (B, S, F)) if vector and state.m.ndim == 2 else state.m
    return LinearState(state.kv.astype(wide), state.z.astype(wide), jax.lax.stop_gradient(m.astype(wide)))


def _asked(y, n, state, return_log_normalizer: bool, return_final_state: bool) -> Any:
    if not (return_log_normalizer or return_final_state):
        return y
    return (y, *([n] if return_log_normalizer else []), *([state] if return_final_state else []))
