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
from lizard_jax.nn.feature_map import FeatureMap, slow_start
from lizard_jax.nn.gate import Gate
from lizard_jax.nn.kept_pairs import KeptPairs, Read, Sizes, aligned, filled, no_pairs, read, read_one, turn, unaligned
from lizard_jax.nn.numerics import ABSENT, accumulation_dtype
from lizard_jax.nn.params import NewParam
from lizard_jax.nn.rope import cos_sin, inverse_frequencies, rotate, segment_positions
from lizard_jax.typing import Array, Bool, Float, Int
from pallas_kernels.log_gate_attention import LinearState, empty_state, log_gate_step, mapped_log_gate_attention
from pallas_kernels.sliding_window import meta, sliding_window


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LizardState:
    """All a layer remembers of the tokens so far, of one size whatever their number.

    Attributes:
        position: ``[B]`` int32, tokens seen.
        ring_k, ring_v: ``[B, W, K, H]`` the last W keys and values, oldest first, unrotated.
        prefix_k, prefix_v: ``[B, M, K, H]`` the first M, where ``meta="prefix"``.
        linear: the state of the linear branch, fp32, where there is one.
        pairs: what was kept of what left the window, where ``kept`` says so.
    """

    position: Int[Array, " B"]
    ring_k: Float[Array, "B W K H"]
    ring_v: Float[Array, "B W K H"]
    prefix_k: Float[Array, "B M K H"] | None
    prefix_v: Float[Array, "B M K H"] | None
    linear: LinearState | None
    pairs: KeptPairs | None = None


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

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T N H"]:
        """The head outputs before o_proj, in q's dtype; 0 for padding (segment 0)."""
        return self.combine(self.branches(x, q, k, v, segment_ids=segment_ids), q, segment_ids)

    def branches(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Branches:
        """What each branch says of a whole text, as ``__call__`` combines it."""
        state = self.init_state(q.shape[0], None, k.dtype)
        segments = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        prefix_k = prefix_v = None
        if self.switches.meta == "prefix":
            # Each query reaches back to the start of its own document.
            start = jnp.arange(q.shape[1], dtype=jnp.int32) - segment_positions(segments)
            index = start[..., None] + jnp.arange(self.switches.meta_tokens, dtype=jnp.int32)
            index = jnp.minimum(index, q.shape[1] - 1)
            prefix_k, prefix_v = (jax.vmap(lambda a, i: a[i])(tokens, index) for tokens in (k, v))  # [B, T, M, K, H]
        past = jnp.zeros((q.shape[0], self.switches.window), jnp.int32)
        return self._branches(
            x, q, k, v, state, segments, jnp.concatenate([past, segments], axis=1), segment_positions(segments),
            prefix_k, prefix_v, segment_ids, None,
        )[0]  # fmt: skip

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
        branches, linear, pairs = self._branches(
            x, q, k, v, state, segments, k_segments, positions,
            None if prefix_k is None else prefix_k[:, None],
            None if prefix_v is None else prefix_v[:, None],
            segments, lengths,
        )  # fmt: skip

        def last(ring: Array, new: Array) -> Array:
            tokens = jnp.concatenate([ring, new], axis=1)
            return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, window))(tokens, lengths)

        ring_k, ring_v = last(state.ring_k, k), last(state.ring_v, v)
        heads = self.combine(branches, q, segments)
        return heads, LizardState(state.position + lengths, ring_k, ring_v, prefix_k, prefix_v, linear, pairs)

    def _branches(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        state: LizardState,
        segments: Int[Array, "B T"],
        k_segments: Int[Array, "B WT"],
        positions: Int[Array, "B T"],
        prefix_k: Float[Array, "B P M K H"] | None,
        prefix_v: Float[Array, "B P M K H"] | None,
        segment_ids: Int[Array, "B T"] | None,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Branches, LinearState | None, KeptPairs | None]:
        """Both branches and the memories after them; ``lengths`` where a state goes on, None for a whole text."""
        switches = self.switches
        all_k = jnp.concatenate([state.ring_k, k], axis=1)
        all_v = jnp.concatenate([state.ring_v, v], axis=1)
        frequencies = inverse_frequencies(self.config.rope, self.config.head_dim) if switches.window_rope else None
        if switches.kept:
            return self._with_pairs(
                x,
                q,
                k,
                v,
                all_k,
                all_v,
                state,
                segments,
                k_segments,
                positions,
                prefix_k,
                prefix_v,
                frequencies,
                lengths,
            )
        near, near_log = sliding_window(
            q, all_k, all_v, segments, k_segments,
            window=switches.window,
            rope_frequencies=frequencies,
            sink=None if self.sink is None else self.sink[...],
            learned_k=None if self.meta_k is None else self.meta_k[...],
            learned_v=None if self.meta_v is None else self.meta_v[...],
            prefix_k=prefix_k,
            prefix_v=prefix_v,
            positions=positions,
        )  # fmt: skip
        if switches.memory == "none":
            return Branches(near, near_log, None, None), None, None
        far, far_log, linear = self._linear(
            x, q, k, v, all_k, all_v, state, segments, k_segments, positions, segment_ids
        )
        return Branches(near, near_log, far, far_log), linear, None

    def _linear(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        all_k: Float[Array, "B WT K H"],
        all_v: Float[Array, "B WT K H"],
        state: LizardState,
        segments: Int[Array, "B T"],
        k_segments: Int[Array, "B WT"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
        """Output (fp32), log-normalizer with the queries' log-scale added back, and the state after the last token."""
        switches, time = self.switches, q.shape[1]
        assert self.phi_q is not None
        assert self.phi_k is not None
        assert self.gate is not None
        assert state.linear is not None
        if switches.memory == "evicted":
            # The token that leaves the window as its W-th successor arrives; the gates stay where they are.
            source_k, source_v, age = all_k[:, :time], all_v[:, :time], switches.window
            present = (k_segments[:, :time] == segments) & (segments != 0)
        else:
            source_k, source_v, age = k, v, 0
            present = segments != 0
        if switches.memory == "evicted" and switches.meta == "prefix":
            present &= positions - age >= switches.meta_tokens
        to_q, to_k = q, source_k
        if switches.linear_rope:
            frequencies = inverse_frequencies(self.config.rope, self.config.head_dim)
            to_q = rotate(q, *cos_sin(frequencies, positions))
            to_k = rotate(source_k, *cos_sin(frequencies, positions - age))
        log_gate = self.gate(x, k)
        k_log_scale = jnp.where(present, 0.0, ABSENT)[..., None].repeat(self.state_heads, -1)
        if time == 1:
            (q_feat, q_log_scale), (k_feat, own) = self.phi_q(to_q), self.phi_k(to_k)
            k_log_scale = jnp.where(present[..., None], own, ABSENT)
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
                k_log_scale=k_log_scale, initial_state=state.linear, segment_ids=segment_ids,
                return_log_normalizer=True, return_final_state=True, chunk=switches.chunk,
            )  # fmt: skip
        return far.astype(accumulation_dtype(q)), far_log, linear

    def _with_pairs(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        all_k: Float[Array, "B WT K H"],
        all_v: Float[Array, "B WT K H"],
        state: LizardState,
        segments: Int[Array, "B T"],
        k_segments: Int[Array, "B WT"],
        positions: Int[Array, "B T"],
        prefix_k: Float[Array, "B P M K H"] | None,
        prefix_v: Float[Array, "B P M K H"] | None,
        frequencies: Float[Array, " H/2"] | None,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Branches, LinearState | None, KeptPairs | None]:
        """``_branches`` where some of what leaves the window stays exact (nn/kept_pairs.py)."""
        switches, (batch, time), wide = self.switches, q.shape[:2], accumulation_dtype(q)
        assert state.pairs is not None
        sizes = Sizes(
            switches.window, switches.chunk, switches.meta_tokens if switches.meta == "prefix" else 0,
            self.config.max_positions,
        )  # fmt: skip
        beside = meta.beside(
            q, segments, positions, window=switches.window, frequencies=frequencies,
            sink=None if self.sink is None else self.sink[...],
            learned=None if self.meta_k is None or self.meta_v is None else (self.meta_k[...], self.meta_v[...]),
            prefix=None if prefix_k is None or prefix_v is None else (prefix_k, prefix_v),
        )  # fmt: skip
        index = jnp.arange(time, dtype=jnp.int32) + state.position[:, None]
        # Of a whole text, documents begin where their positions do; a state has one, that began at 0.
        begins = index - positions
        past = jnp.where(k_segments[:, : switches.window] != 0, 0, -1)
        starts = jnp.concatenate([past, jnp.where(segments != 0, begins, -1)], axis=1)
        asks = segments != 0
        if time == 1 and lengths is not None:
            found, pairs = read_one(
                q, all_k, all_v, starts, asks, state.position, beside[1], state.pairs, frequencies, sizes
            )
            blocks = (x, q, k, all_k, all_v, starts, asks, positions)
            offset = jnp.zeros((batch,), jnp.int32)
        else:
            offset = state.position % sizes.block
            # Where in its block a row goes on is not known beforehand, and may cost a block more.
            slots = -(-time // sizes.block) * sizes.block + (0 if lengths is None else sizes.block)

            def moved(a: Array, size: int) -> Array:
                return filled(a, size) if lengths is None else aligned(a, offset, size)

            moved_x, moved_q, moved_k, moved_asks, moved_positions, other = (
                moved(a, slots) for a in (x, q, k, asks, positions, beside[1])
            )
            moved_all_k, moved_all_v = (moved(a, switches.window + slots) for a in (all_k, all_v))
            moved_starts = moved(starts + 1, switches.window + slots) - 1
            near = jax.vmap(
                lambda row, at: jax.lax.dynamic_update_slice_in_dim(
                    jnp.zeros((row.shape[0], row.shape[1] + sizes.block), row.dtype), row, at, axis=1
                )
            )(state.pairs.near, offset)
            begin = state.position - offset
            found, pairs, near = read(
                moved_q, moved_all_k, moved_all_v, moved_starts, moved_asks, begin, other, state.pairs, near,
                frequencies, sizes,
            )  # fmt: skip
            if lengths is not None:
                # The last W tokens of each row, from the keys of the last block that it reached.
                end = state.position + lengths
                at = end - jnp.where(lengths > 0, (end - 1) // sizes.block * sizes.block, begin)
                near = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, switches.window, axis=1))(
                    near, at
                )
                pairs = KeptPairs(pairs.k, pairs.v, pairs.index, pairs.score, near)
            blocks = (moved_x, moved_q, moved_k, moved_all_k, moved_all_v, moved_starts, moved_asks, moved_positions)
        exact, exact_log = (unaligned(a, offset, time) for a in (found.near, found.near_log))
        near_heads, near_log = meta.merge([beside, (exact.astype(wide), exact_log.astype(wide))], v.dtype)
        near_log = jnp.where(asks[..., None], near_log, ABSENT)
        near_heads = jnp.where(asks[..., None, None], near_heads, jnp.zeros((), near_heads.dtype))
        if switches.memory == "none":
            return Branches(near_heads, near_log, None, None), None, pairs
        far, far_log, linear = self._linear_with_pairs(*blocks, found, state)
        far, far_log = (unaligned(a, offset, time) for a in (far, far_log))
        return Branches(near_heads, near_log, far.astype(wide), far_log), linear, pairs

    def _linear_with_pairs(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        all_k: Float[Array, "B WT K H"],
        all_v: Float[Array, "B WT K H"],
        starts: Int[Array, "B WT"],
        asks: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        found: Read,
        state: LizardState,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
        """``_linear`` over whole blocks, each with the pairs that lost their place in front of it.

        They are tokens that nobody asks from and that forget nothing.
        """
        switches, (batch, time) = self.switches, q.shape[:2]
        window, group = switches.window, self.state_heads // self.config.kv_heads
        assert self.phi_q is not None
        assert self.phi_k is not None
        assert self.gate is not None
        assert state.linear is not None
        own = starts[:, window:]
        present = asks & (starts[:, :time] == own)
        if switches.meta == "prefix":
            present &= positions - window >= switches.meta_tokens
        enters = present[:, None] & ~found.stays  # [B, K, T]
        to_q, to_k, source_v = q, all_k[:, :time], all_v[:, :time]
        count = found.lost_k.shape[1]
        lost_k, lost_v = (jnp.moveaxis(a, 2, 3) for a in (found.lost_k, found.lost_v))  # [B, blocks, L, K, H]
        lost_index = jnp.moveaxis(found.lost_index, 2, 3)
        first = own.reshape(batch, count, -1)[:, :, 0]  # where the document of each block's first query begins
        if switches.linear_rope:
            frequencies = inverse_frequencies(self.config.rope, self.config.head_dim)
            to_q = rotate(q, *cos_sin(frequencies, positions))
            to_k = rotate(to_k, *cos_sin(frequencies, positions - window))
            lost_k = turn(lost_k, *cos_sin(frequencies, lost_index - first[:, :, None, None]))
        log_gate = self.gate(x, k)
        late = (1,) * (log_gate.ndim - 2)
        log_gate = jnp.where(asks.reshape(batch, time, *late), log_gate, 0.0)
        key_scale = jnp.where(jnp.moveaxis(enters, 1, 2), 0.0, ABSENT).repeat(group, -1)
        lost_scale = jnp.where(lost_index >= 0, 0.0, ABSENT).repeat(group, -1)
        maps: dict[str, Any] = {
            "q_map": self.phi_q.kernel[...], "k_map": self.phi_k.kernel[...], "act": switches.act,
            "return_log_normalizer": True, "return_final_state": True, "chunk": switches.chunk,
        }  # fmt: skip
        if time == 1:

            def absorb(linear: LinearState) -> LinearState:
                lost = lost_k.shape[2]
                return mapped_log_gate_attention(
                    jnp.zeros((batch, lost, *q.shape[2:]), q.dtype), lost_k[:, 0], lost_v[:, 0],
                    jnp.zeros((batch, lost, *log_gate.shape[2:]), log_gate.dtype), k_log_scale=lost_scale[:, 0],
                    initial_state=linear, **maps,
                )[2]  # fmt: skip

            linear = jax.lax.cond((lost_index >= 0).any(), absorb, lambda linear: linear, state.linear)
            (q_feat, q_log_scale), (k_feat, scale) = self.phi_q(to_q), self.phi_k(to_k)
            far, far_log, linear = log_gate_step(
                q_feat[:, 0], k_feat[:, 0], source_v[:, 0], log_gate[:, 0],
                k_log_scale=jnp.where(key_scale == 0.0, scale, ABSENT)[:, 0], state=linear,
            )  # fmt: skip
            return far[:, None], far_log[:, None] + q_log_scale, linear

        def in_front(lost: Array, slots: Array) -> Array:
            """The lost pairs of each block before its slots, as one sequence."""
            both = jnp.concatenate([lost, slots.reshape(batch, count, -1, *slots.shape[2:])], axis=2)
            return both.reshape(batch, -1, *both.shape[3:])

        lost = lost_k.shape[2]

        def nothing(slots: Array) -> Array:
            return jnp.zeros((batch, count, lost, *slots.shape[2:]), slots.dtype)

        # A document is known by where it begins; a lost pair is of the one that its block begins in.
        ids = jnp.where(asks, own + 1, 0)
        far, far_log, linear = mapped_log_gate_attention(
            in_front(nothing(to_q), to_q), in_front(lost_k, to_k), in_front(lost_v, source_v),
            in_front(nothing(log_gate), log_gate), k_log_scale=in_front(lost_scale, key_scale),
            initial_state=state.linear,
            segment_ids=in_front(jnp.broadcast_to(ids.reshape(batch, count, -1)[:, :, :1], (batch, count, lost)), ids),
            **maps,
        )  # fmt: skip
        far, far_log = (
            a.reshape(batch, count, -1, *a.shape[2:])[:, :, lost:].reshape(batch, time, *a.shape[2:])
            for a in (far, far_log)
        )
        return far, far_log, linear
