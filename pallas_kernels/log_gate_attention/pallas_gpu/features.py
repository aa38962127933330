"""Features inside the kernels, given or made from raw values, and the way back through their map."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.log_gate_attention.pallas_gpu.chunk import Chunk, Loads, pieces_of, places
from pallas_kernels.log_gate_attention.pallas_gpu.matmul import sum_of
from pallas_kernels.log_gate_attention.pallas_gpu.plan import SUM_PIECE, Plan
from pallas_kernels.numerics import EMPTY
from pallas_kernels.pallas_triton import dot

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Features(NamedTuple):
    """Of one head in one chunk; of a feature map also the log scale, and what is needed on the way back."""

    parts: Loads | tuple[Float[Array, "C width"], ...]
    scale: Float[Array, " C"] | None = None
    exact: tuple[Float[Array, "C width"], ...] = ()


def features_of(chunk: Chunk, ref, maps, head, raw_head) -> Features:
    """Given features, or ``act(xA) ⊕ act(−xA)`` of raw ones with their log scale."""
    plan = chunk.plan
    if plan.act is None:
        return Features(Loads(chunk, ref, head))
    scores = sum_of(
        dot(chunk.load(ref, raw_head, piece), maps[head, piece]) for piece in pieces_of(0, plan.X, plan.raw_piece)
    )
    real = (places(plan.width) < plan.half)[None, :]
    if plan.act == "exp":
        scale = jnp.max(jnp.abs(scores), 1)
        exact = tuple(jnp.where(real, jnp.exp(sign * scores - scale[:, None]), 0.0) for sign in (1.0, -1.0))
    else:
        scale = None
        exact = tuple(_softmax(sign * scores, real) for sign in (1.0, -1.0))
    return Features(tuple(part.astype(plan.dtype) for part in exact), scale, exact)


def _softmax(scores: Float[Array, "C width"], real: Bool[Array, "1 width"]) -> Float[Array, "C width"]:
    raised = jnp.exp(scores - jnp.max(jnp.where(real, scores, EMPTY), 1)[:, None])
    raised = jnp.where(real, raised, 0.0)
    return raised / jnp.sum(raised, 1)[:, None]


def through_map(chunk: Chunk, features: Features, cotangents, ref, maps, head, raw_head, out, cut, dmap):
    """From cotangents of features to those of raw values, which are stored, and of the map, which join ``dmap``."""
    plan, on_scores = chunk.plan, []
    for exact, cotangent in zip(features.exact, cotangents, strict=True):
        product = exact * cotangent
        on_scores.append(product if plan.act == "exp" else product - exact * jnp.sum(product, 1)[:, None])
    dscores = (on_scores[0] - on_scores[1]).astype(plan.dtype)
    sums = []
    for piece, sum_before in zip(pieces_of(cut, plan.X // plan.cuts, SUM_PIECE), dmap, strict=True):
        chunk.store(out, dot(dscores, maps[head, piece], (1, 1)), head, piece)
        sums.append(sum_before + dot(chunk.load(ref, raw_head, piece), dscores, (0, 0)))
    return tuple(sums)


def sum_maps(plan: Plan, body: Callable, out, b, head) -> None:
    """Run ``body(i, cut, dmap) -> dmap`` over the chunks of a run for one cut of the raw axis, and store the sum."""
    run, size = pl.program_id(2) // plan.cuts, plan.X // plan.cuts
    cut = pl.program_id(2) % plan.cuts * size
    zeros = tuple(jnp.zeros((min(size, SUM_PIECE), plan.width), jnp.float32) for _ in pieces_of(0, size, SUM_PIECE))
    first = run * plan.run
    dmap = lax.fori_loop(
        first, jnp.minimum(first + plan.run, plan.count), lambda i, dmap: body(i, cut, dmap), zeros
    )  # fmt: skip
    for piece, part in zip(pieces_of(cut, size, SUM_PIECE), dmap, strict=True):
        out[b, run, head, piece] = part


def maps_first(refs, plan: Plan):
    """``(maps of queries, of keys)`` where there are any, and the other references."""
    return ((None, None), refs) if plan.act is None else (refs[:2], refs[2:])
