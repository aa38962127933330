"""Lizard attention: a softmax window and a gated linear branch over the same q, k, v, and how they are combined.

Every published variant is a choice of the switches of ``LizardConfig``; none is a separate code path. A full forward
is a continuation from the empty past, so training, chunked prefill and one-token steps are one computation.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lizard_jax.config import ModelConfig
from lizard_jax.nn.context import Context, LizardState, Near
from lizard_jax.nn.feature_map import FeatureMap, slow_start
from lizard_jax.nn.gate import Gate
from lizard_jax.nn.head_sets import for_devices, on_devices, repeated, with_repeats
from lizard_jax.nn.kept_attention import far_with_pairs, near_with_pairs
from lizard_jax.nn.kept_pairs import Sizes, no_pairs
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.params import NewParam
from lizard_jax.nn.reuse import shared
from lizard_jax.nn.rope import cos_sin, inverse_frequencies, rotate, segment_positions
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import partition
from pallas_kernels.log_gate_attention import LinearState, empty_state, log_gate_step, mapped_log_gate_attention
from pallas_kernels.numerics import EMPTY
from pallas_kernels.sliding_window import sliding_window


@dataclass(frozen=True)
class Branches:
    """What the two branches say of every query, before they are combined; the linear one's are None without memory.

    Attributes:
        near: ``[B, T, N, H]`` output of the window, meta memory and kept pairs included.
        near_log: ``[B, T, N]`` its log-normalizer.
        far: ``[B, T, N, H]`` output of the linear branch, in fp32.
        far_log: ``[B, T, N]`` its log-normalizer, without β; -1e30 where its memory is empty.
    """

    near: Float[Array, "B T N H"]
    near_log: Float[Array, "B T N"]
    far: Float[Array, "B T N H"] | None
    far_log: Float[Array, "B T N"] | None


class LizardMixer(nnx.Module):
    """Heads of Lizard attention from unrotated q, k, v and the layer's normalized input x.

    Its parameters are the new ones alone (``NewParam``, fp32): feature maps ``phi_q``, ``phi_k``, the ``gate``, the
    meta memory, and what the branches are combined with (α for ``sum``, β per head for ``joint``).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.attention is not None
        switches = config.attention
        self.config = config
        self.switches = switches
        heads, kv_heads, width = config.num_heads, config.kv_heads, config.head_dim
        state_heads = kv_heads if switches.state_heads == "kv" else heads
        half = switches.feature_half or width
        self.feature_width = 2 * half
        self.state_heads = state_heads

        phi_q = phi_k = gate = alpha = beta = sink = meta_k = meta_v = None
        if switches.memory != "none":
            starts: Any = (switches.feature_start,) * 2
            if switches.feature_start == "slow":
                # One map for a key head's keys and queries: only then are their features' products a kernel of both.
                frequencies = inverse_frequencies(config.rope, width)
                shared = slow_start(frequencies, switches.window, kv_heads, half, rngs.params())
                starts = [jnp.repeat(shared, count // kv_heads, axis=0) for count in (heads, state_heads)]
            phi_q = FeatureMap(heads, width, half, switches.act, starts[0], rngs=rngs)
            phi_k = FeatureMap(state_heads, width, half, switches.act, starts[1], rngs=rngs)
            gate = Gate(switches, config.hidden_size, state_heads, 2 * half, rngs=rngs)
            if switches.combine == "sum":
                alpha = NewParam(jnp.ones((), jnp.float32))
            else:
                beta = NewParam(jnp.full((heads,), switches.beta_start, jnp.float32))
        tokens = switches.meta_tokens
        if switches.meta == "sink":
            sink = NewParam(jnp.full((heads,), jnp.log(float(tokens)), jnp.float32))
        elif switches.meta == "learned":
            meta_k = NewParam(jax.random.normal(rngs.params(), (tokens, kv_heads, width), jnp.float32))
            meta_v = NewParam(jnp.zeros((tokens, kv_heads, width), jnp.float32))
        self.phi_q, self.phi_k, self.gate = nnx.data(phi_q), nnx.data(phi_k), nnx.data(gate)
        self.alpha, self.beta, self.sink = nnx.data(alpha), nnx.data(beta), nnx.data(sink)
        self.meta_k, self.meta_v = nnx.data(meta_k), nnx.data(meta_v)

    @shared
    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        limits: Int[Array, " K"] | None = None,
    ) -> Float[Array, "B T N H"]:
        """The head outputs before o_proj, in q's dtype; 0 for padding (segment 0).

        Args:
            limits: how many pairs each key head keeps, where some keep less than ``kept``.
        """
        mixer, heads, kv_heads = self, q.shape[2], k.shape[2]
        q, k, v = for_devices(q, k, v)
        if k.shape[2] > kv_heads:
            mixer = with_repeats(self, k.shape[2])
            limits = None if limits is None else repeated(limits, k.shape[2], 0)
        log_gate = None if mixer.gate is None else partition.heads_by_tokens(mixer.gate(x, k))
        out = on_devices(mixer, log_gate, q, k, v, segment_ids, limits)
        return partition.heads_by_tokens(out)[:, :, :heads]

    def heads(
        self,
        log_gate: Float[Array, "B T S"] | Float[Array, "B T S F"] | None,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        segment_ids: Int[Array, "B T"] | None,
        limits: Int[Array, " K"] | None,
    ) -> Float[Array, "B T N H"]:
        """``__call__`` on one device, where the gate has been computed."""
        context = self._whole(log_gate, q, k, v, segment_ids, limits)
        return self.combine(self._branches(context, self._near(context))[0], q, segment_ids)

    def branches(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        near: Near | None = None,
        limits: Int[Array, " K"] | None = None,
    ) -> Branches:
        """What each branch says of a whole text, as ``__call__`` combines it.

        Args:
            near: what ``near`` gave for the same text, where it is at hand.
            limits: as in ``__call__``.
        """
        context = self._whole(None if self.gate is None else self.gate(x, k), q, k, v, segment_ids, limits)
        return self._branches(context, self._near(context) if near is None else near)[0]

    def near(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Near:
        """The exact part of a whole text, which depends on no gate and no feature map."""
        return self._near(self._whole(None, q, k, v, segment_ids))

    def _whole(
        self,
        log_gate: Array | None,
        q: Array,
        k: Array,
        v: Array,
        segment_ids: Int[Array, "B T"] | None,
        limits: Int[Array, " K"] | None = None,
    ) -> Context:
        """A whole text: a continuation of the empty past."""
        state = self.init_state(q.shape[0], None, k.dtype)
        segments = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        prefix = None
        if self.switches.meta == "prefix":
            # Each query reaches back to the start of its own document.
            start = jnp.arange(q.shape[1], dtype=jnp.int32) - segment_positions(segments)
            index = start[..., None] + jnp.arange(self.switches.meta_tokens, dtype=jnp.int32)
            index = jnp.minimum(index, q.shape[1] - 1)
            prefix_k, prefix_v = (jax.vmap(lambda a, i: a[i])(tokens, index) for tokens in (k, v))
            prefix = prefix_k, prefix_v  # [B, T, M, K, H]
        past = jnp.zeros((q.shape[0], self.switches.window), jnp.int32)
        return Context(
            q, k, v, jnp.concatenate([state.ring_k, k], axis=1), jnp.concatenate([state.ring_v, v], axis=1),
            log_gate, segments, jnp.concatenate([past, segments], axis=1), segment_positions(segments), prefix, state,
            None, segment_ids, limits,
        )  # fmt: skip

    def combine(
        self, branches: Branches, q: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T N H"]:
        """The head outputs that the branches' add up to (docs/attention.md, Combination); 0 for padding."""
        if branches.far is None or branches.far_log is None:
            return branches.near.astype(q.dtype)
        far, near = branches.far, branches.near.astype(branches.far.dtype)
        if self.alpha is not None:
            mixed = far + self.alpha[...].astype(near.dtype) * near
        else:
            assert self.beta is not None
            near_log, far_log = branches.near_log, branches.far_log + self.beta[...].astype(far.dtype)
            top = jax.lax.stop_gradient(jnp.maximum(near_log, far_log))
            near_weight, far_weight = jnp.exp(near_log - top)[..., None], jnp.exp(far_log - top)[..., None]
            mixed = (near_weight * near + far_weight * far) / (near_weight + far_weight)
        if segment_ids is not None:
            mixed = jnp.where((segment_ids != 0)[..., None, None], mixed, 0.0)
        return mixed.astype(q.dtype)

    def init_state(self, batch: int, max_length: int | None, dtype: jnp.dtype) -> LizardState:
        """The empty past. ``max_length`` is not needed: the state never grows."""
        config, switches = self.config, self.switches
        tokens = (config.kv_heads, config.head_dim)

        def zeros(length: int) -> Array:
            # An array of its own each time: a donated state may hold no buffer twice.
            return jnp.zeros((batch, length, *tokens), dtype)

        prefix = switches.meta_tokens if switches.meta == "prefix" else None
        linear = None
        if switches.memory != "none":
            linear = empty_state(
                batch, self.state_heads, self.feature_width, config.head_dim,
                dtype=accumulation_dtype(jnp.zeros((), dtype)),
                vector_gates=switches.gate in ("low_rank", "channel"),
            )  # fmt: skip
        return LizardState(
            jnp.zeros((batch,), jnp.int32), zeros(switches.window), zeros(switches.window),
            None if prefix is None else zeros(prefix), None if prefix is None else zeros(prefix), linear,
            no_pairs(batch, config.kv_heads, switches.kept, switches.window, config.head_dim, dtype)
            if switches.kept else None,
        )  # fmt: skip

    @shared
    def extend(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        state: LizardState,
        lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], LizardState]:
        """Each row's first ``lengths`` tokens after those ``state`` has seen: head outputs, and the state after them.

        The rest of a row is padding: it gives 0 and leaves no trace. T ≥ 1; a row may have no token at all.
        """
        time, window, switches = q.shape[1], self.switches.window, self.switches
        positions = state.position[:, None] + jnp.arange(time, dtype=jnp.int32)
        filled = jnp.arange(-window, 0, dtype=jnp.int32) + state.position[:, None] >= 0
        segments = (jnp.arange(time, dtype=jnp.int32) < lengths[:, None]).astype(jnp.int32)
        k_segments = jnp.concatenate([filled.astype(jnp.int32), segments], axis=1)
        prefix_k, prefix_v = state.prefix_k, state.prefix_v
        if prefix_k is not None and prefix_v is not None:
            slot = jnp.arange(switches.meta_tokens, dtype=jnp.int32) - state.position[:, None]
            arriving = ((slot >= 0) & (slot < lengths[:, None]))[..., None, None]
            index = jnp.clip(slot, 0, time - 1)[..., None, None]
            prefix_k = jnp.where(arriving, jnp.take_along_axis(k, index, axis=1), prefix_k)
            prefix_v = jnp.where(arriving, jnp.take_along_axis(v, index, axis=1), prefix_v)
        prefix = None if prefix_k is None or prefix_v is None else (prefix_k[:, None], prefix_v[:, None])
        log_gate = None if self.gate is None else self.gate(x, k)
        context = Context(
            q, k, v, jnp.concatenate([state.ring_k, k], axis=1), jnp.concatenate([state.ring_v, v], axis=1),
            log_gate, segments, k_segments, positions, prefix, state, lengths, segments,
        )  # fmt: skip
        near = self._near(context)
        branches, linear = self._branches(context, near)

        def last(ring: Array, new: Array) -> Array:
            tokens = jnp.concatenate([ring, new], axis=1)
            return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, window))(tokens, lengths)

        ring_k, ring_v = last(state.ring_k, k), last(state.ring_v, v)
        heads = self.combine(branches, q, segments)
        return heads, LizardState(state.position + lengths, ring_k, ring_v, prefix_k, prefix_v, linear, near.pairs)

    def _near(self, context: Context) -> Near:
        """Window, meta memory and kept pairs."""
        switches = self.switches
        frequencies = inverse_frequencies(self.config.rope, self.config.head_dim) if switches.window_rope else None
        sink, meta_k, meta_v = (None if p is None else p[...] for p in (self.sink, self.meta_k, self.meta_v))
        if switches.kept:
            learned = None if meta_k is None or meta_v is None else (meta_k, meta_v)
            return near_with_pairs(context, self.pair_sizes, frequencies=frequencies, sink=sink, learned=learned)
        heads, log = sliding_window(
            context.q, context.all_k, context.all_v, context.segments, context.k_segments,
            window=switches.window,
            rope_frequencies=frequencies,
            sink=sink,
            learned_k=meta_k,
            learned_v=meta_v,
            prefix_k=None if context.prefix is None else context.prefix[0],
            prefix_v=None if context.prefix is None else context.prefix[1],
            positions=context.positions,
        )  # fmt: skip
        return Near(heads, log)

    @property
    def pair_sizes(self) -> Sizes:
        """What is fixed of the choice of kept pairs."""
        switches = self.switches
        prefix = switches.meta_tokens if switches.meta == "prefix" else 0
        return Sizes(switches.window, min(switches.chunk, switches.window), prefix, self.config.max_positions)

    def _branches(self, context: Context, near: Near) -> tuple[Branches, LinearState | None]:
        """Both branches, and the linear state after them."""
        if self.switches.memory == "none":
            return Branches(near.heads, near.log, None, None), None
        if near.blocks is not None:
            far, far_log, linear = far_with_pairs(self, context, near.blocks)
        else:
            far, far_log, linear = self._linear(context)
        return Branches(near.heads, near.log, far.astype(accumulation_dtype(context.q)), far_log), linear

    def _linear(self, context: Context) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
        """Output, log-normalizer with the queries' log-scale added back, and the state after the last token."""
        switches, time, state = self.switches, context.q.shape[1], context.state
        q, k, all_k, all_v = context.q, context.k, context.all_k, context.all_v
        segments, k_segments, positions = context.segments, context.k_segments, context.positions
        assert self.phi_q is not None
        assert self.phi_k is not None
        assert context.log_gate is not None
        assert state.linear is not None
        if switches.memory == "evicted":
            # The token that leaves the window as its W-th successor arrives; the gates stay where they are.
            source_k, source_v, age = all_k[:, :time], all_v[:, :time], switches.window
            present = (k_segments[:, :time] == segments) & (segments != 0)
        else:
            source_k, source_v, age = k, context.v, 0
            present = segments != 0
        if switches.memory == "evicted" and switches.meta == "prefix":
            present &= positions - age >= switches.meta_tokens
        to_q, to_k = q, source_k
        if switches.linear_rope:
            frequencies = inverse_frequencies(self.config.rope, self.config.head_dim)
            to_q = rotate(q, *cos_sin(frequencies, positions))
            to_k = rotate(source_k, *cos_sin(frequencies, positions - age))
        log_gate = context.log_gate
        k_log_scale = jnp.where(present, 0.0, EMPTY)[..., None].repeat(self.state_heads, -1)
        if time == 1:
            (q_feat, q_log_scale), (k_feat, own) = self.phi_q(to_q), self.phi_k(to_k)
            k_log_scale = jnp.where(present[..., None], own, EMPTY)
            there = (segments[:, 0] != 0).reshape(-1, *(1,) * (log_gate.ndim - 2))
            far, far_log, linear = log_gate_step(
                q_feat[:, 0], k_feat[:, 0], source_v[:, 0], jnp.where(there, log_gate[:, 0], 0.0),
                k_log_scale=k_log_scale[:, 0], state=state.linear,
            )  # fmt: skip
            # An absent memory stays absent: its marker is so large that the log scale would not change it in fp32.
            far, far_log = far[:, None], far_log[:, None] + q_log_scale
        else:
            far, far_log, linear = mapped_log_gate_attention(
                to_q, to_k, source_v, log_gate,
                q_map=self.phi_q.kernel[...], k_map=self.phi_k.kernel[...], act=switches.act,
                k_log_scale=k_log_scale, initial_state=state.linear, segment_ids=context.segment_ids,
                return_log_normalizer=True, return_final_state=True, chunk=switches.chunk,
            )  # fmt: skip
        return far, far_log, linear
