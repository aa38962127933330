"""A layer whose key heads have different budgets: a few keep softmax attention, the rest a window and a memory.

A tenth of a model's key heads carries what it retrieves from far back (docs/attention.md, Budgets by key head). Heads
of a class run together: each class is one call of its mixer, over its own heads alone.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.config import ModelConfig
from lizard_jax.nn.cache import KVCache
from lizard_jax.nn.context import LizardState
from lizard_jax.nn.lizard_attention import LizardMixer
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitState:
    """The states of both classes of heads.

    Attributes:
        short: of the linearized heads.
        long: of the exact ones: a cache that grows, or with ``retrieval_window`` a long ring of fixed size.
    """

    short: LizardState
    long: KVCache | LizardState


def of_heads(config: ModelConfig, kv_heads: int, **attention: object) -> ModelConfig:
    """The configuration of that many of a layer's key heads, with their query heads, and with these switches."""
    assert config.attention is not None
    switches = dataclasses.replace(config.attention, softmax_layers=(), softmax_heads=(), **attention)  # type: ignore[arg-type]
    group = config.num_heads // config.kv_heads
    return dataclasses.replace(config, num_heads=kv_heads * group, kv_heads=kv_heads, attention=switches)


def ring_of(config: ModelConfig, kv_heads: int) -> ModelConfig:
    """The configuration of that many exact key heads that see ``retrieval_window`` tokens and the first few."""
    assert config.attention is not None
    return of_heads(
        config, kv_heads, memory="none", combine="joint", meta="prefix", window=config.attention.retrieval_window,
        retrieval_window=0, kept=0,
    )  # fmt: skip


class SplitMixer(nnx.Module):
    """Exact attention for the key heads ``exact``, Lizard attention for the others; same interface as either.

    ``short`` is the ``LizardMixer`` of the others and holds all parameters. With ``retrieval_window`` 0 the exact heads
    are the teacher's, and their cache grows; else they see their last ``retrieval_window`` tokens and the first
    ``meta_tokens`` of their document, and their state has one size.
    """

    def __init__(self, config: ModelConfig, layer_index: int, exact: tuple[int, ...], *, rngs: nnx.Rngs):
        assert config.attention is not None
        others = tuple(head for head in range(config.kv_heads) if head not in exact)
        group = config.num_heads // config.kv_heads
        self.kv_short, self.kv_long = others, exact
        self.q_short, self.q_long = (
            tuple(head * group + i for head in heads for i in range(group)) for heads in (others, exact)
        )
        both = (*self.q_short, *self.q_long)
        self.order = tuple(both.index(head) for head in range(config.num_heads))
        self.short = LizardMixer(of_heads(config, len(others)), rngs=rngs)
        self.whole = SoftmaxMixer(of_heads(config, len(exact)), layer_index)
        bounded = config.attention.retrieval_window > 0
        self.ring = nnx.data(LizardMixer(ring_of(config, len(exact)), rngs=rngs) if bounded else None)

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
        short = self.short(x, *self.short_part(q, k, v), segment_ids=segment_ids)
        # Where no text outgrows the ring, exact heads are plain softmax, which has a quicker form of its own.
        long_mixer = self.whole if self.ring is None or q.shape[1] <= self.ring.switches.window else self.ring
        long = long_mixer(x, *self.long_part(q, k, v), segment_ids=segment_ids)
        return self._together(short, long)

    def init_state(self, batch: int, max_length: int | None, dtype: DTypeLike) -> SplitState:
        """The empty past. ``max_length`` is needed where the exact heads' cache grows.

        Raises:
            UserError: it is needed and None.
        """
        long = self.whole if self.ring is None else self.ring
        return SplitState(
            self.short.init_state(batch, max_length, jnp.dtype(dtype)),
            long.init_state(batch, max_length, jnp.dtype(dtype)),
        )

    def extend(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        state: SplitState,
        lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], SplitState]:
        """Head outputs of each row's first ``lengths`` tokens after those seen, and the state after them."""
        short, short_state = self.short.extend(x, *self.short_part(q, k, v), state.short, lengths)
        parts = self.long_part(q, k, v)
        if self.ring is None:
            assert isinstance(state.long, KVCache)
            long, long_state = self.whole.extend(x, *parts, state.long, lengths)
        else:
            assert isinstance(state.long, LizardState)
            long, long_state = self.ring.extend(x, *parts, state.long, lengths)
        return self._together(short, long), SplitState(short_state, long_state)

    def short_part(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """The linearized heads of q, k, v."""
        return _take(q, self.q_short), _take(k, self.kv_short), _take(v, self.kv_short)

    def long_part(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """The exact heads of q, k, v."""
        return _take(q, self.q_long), _take(k, self.kv_long), _take(v, self.kv_long)

    def _together(self, short: Float[Array, "B T Ns H"], long: Float[Array, "B T Nl H"]) -> Float[Array, "B T N H"]:
        return _take(jnp.concatenate([short, long], axis=2), self.order)


def _take(x: Float[Array, "B T N H"], heads: tuple[int, ...]) -> Float[Array, "B T heads H"]:
    return jnp.take(x, jnp.asarray(heads, jnp.int32), axis=2)


@dataclass(frozen=True)
class Student:
    """The part of a layer's mixer that is trained, seen from the whole layer's heads.

    Attributes:
        mixer: the Lizard attention.
        path: where it lies below the layer's mixer.
        split: what it is a part of, where it is not all of the layer.
    """

    mixer: LizardMixer
    path: tuple[str, ...] = ()
    split: SplitMixer | None = None

    def part(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Its heads of the layer's q, k, v."""
        return (q, k, v) if self.split is None else self.split.short_part(q, k, v)

    def heads(self, all_heads: Float[Array, "B T N H"]) -> Float[Array, "B T Ns H"]:
        """Its heads of the layer's."""
        return all_heads if self.split is None else _take(all_heads, self.split.q_short)


def student_of(mixer: nnx.Module) -> Student | None:
    """What of a layer's mixer learns; None where nothing does."""
    if isinstance(mixer, LizardMixer):
        return Student(mixer) if mixer.switches.adds_modules else None
    return Student(mixer.short, ("short",), mixer) if isinstance(mixer, SplitMixer) else None
