"""A layer whose key heads have different budgets: windows and kept pairs of their own, or all of the past.

A tenth of a model's key heads carries what it retrieves from far back, and how much a head needs differs by orders of
magnitude (docs/attention.md, Budgets by key head). Heads of a class run together: each class is one call of its mixer,
over its own heads alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.config import ModelConfig
from lizard_jax.nn.cache import KVCache
from lizard_jax.nn.context import LizardState
from lizard_jax.nn.head_sets import comes_together, of_heads, one_class
from lizard_jax.nn.lizard_attention import LizardMixer
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import target

PADDED = 2.0
"""Of what its heads need of window and pairs, the most that a call of several classes may compute."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitState:
    """The states of all classes of heads.

    Attributes:
        short: of the first class of linearized heads.
        long: of the exact ones, where there are any: a cache that grows, or with ``retrieval_window`` a long ring of
            fixed size.
        more: of the other classes of linearized heads.
    """

    short: LizardState
    long: KVCache | LizardState | None
    more: tuple[LizardState, ...] = ()


def classes(config: ModelConfig, layer_index: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """By window and kept pairs, the linearized key heads of a layer that have them; the usual budget comes first."""
    assert config.attention is not None
    exact, out = config.attention.exact_heads(layer_index), {}
    for head in range(config.kv_heads):
        if head not in exact:
            out.setdefault(config.attention.budget(layer_index, head), []).append(head)
    usual = (config.attention.window, config.attention.kept)
    return {budget: tuple(out[budget]) for budget in sorted(out, key=lambda budget: (budget != usual, budget))}


def ring_of(config: ModelConfig, kv_heads: int, layer: int) -> ModelConfig:
    """The configuration of that many exact key heads that see ``retrieval_window`` tokens and the first few; no more
    than the teacher's own sliding window, where it has one.
    """
    assert config.attention is not None
    reach, own = config.attention.retrieval_window, SoftmaxMixer(config, layer).window
    return of_heads(
        config, kv_heads, memory="none", combine="joint", meta="prefix", window=min(reach, own or reach),
        retrieval_window=0, kept=0,
    )  # fmt: skip


class SplitMixer(nnx.Module):
    """Key heads of several classes, each with a mixer of its own; same interface as any of them.

    ``short`` is the ``LizardMixer`` of the first class of linearized heads and ``more`` those of the others; they hold
    all parameters. Exact heads, where there are any, are the teacher's with a cache that grows; or, with
    ``retrieval_window``, they see as many last tokens (``ring_of``) and the first ``meta_tokens`` of their document,
    and their state has one size.
    """

    def __init__(self, config: ModelConfig, layer_index: int, *, rngs: nnx.Rngs):
        assert config.attention is not None
        found, self.exact = classes(config, layer_index), config.attention.exact_heads(layer_index)
        self.kv_heads = (*found.values(), *((self.exact,) if self.exact else ()))
        group = config.num_heads // config.kv_heads
        self.q_heads = tuple(tuple(head * group + i for head in heads for i in range(group)) for heads in self.kv_heads)
        together = [head for heads in self.q_heads for head in heads]
        self.order = tuple(together.index(head) for head in range(config.num_heads))
        first, *others = (
            LizardMixer(of_heads(config, len(heads), window=window, kept=kept), rngs=rngs)
            for (window, kept), heads in found.items()
        )
        self.short, self.more = first, nnx.List(others)
        self.whole = nnx.data(SoftmaxMixer(of_heads(config, len(self.exact)), layer_index) if self.exact else None)
        bounded = self.exact and config.attention.retrieval_window > 0
        self.ring = nnx.data(LizardMixer(ring_of(config, len(self.exact), layer_index), rngs=rngs) if bounded else None)

    @property
    def linearized(self) -> tuple[LizardMixer, ...]:
        """The mixers of the classes of linearized heads, in the order of ``kv_heads`` and ``q_heads``."""
        return (self.short, *self.more)

    @property
    def long(self) -> SoftmaxMixer | LizardMixer | None:
        """The mixer of the exact heads, which are the last class."""
        return self.whole if self.ring is None else self.ring

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
        # Where no text outgrows the ring, exact heads are plain softmax, which has a quicker form of its own.
        long = self.whole if self.ring is None or q.shape[1] <= self.ring.switches.window else self.ring
        exact = [] if long is None else [long(x, *self.part(-1, q, k, v), segment_ids=segment_ids)]
        return self._together([self.linear_heads(x, q, k, v, segment_ids=segment_ids), *exact])

    def linear_heads(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T Nl H"]:
        """Of the layer's heads the outputs of the linearized ones, class after class."""
        parts: dict[int, Array] = {}
        for numbers in self._calls():
            mixer, limits = self.linearized[numbers[0]], None
            if len(numbers) > 1:
                mixer, limits = one_class([self.linearized[n] for n in numbers])
            q_heads = tuple(head for n in numbers for head in self.q_heads[n])
            own = tuple(head for n in numbers for head in self.kv_heads[n])
            heads = mixer(
                x, _take(q, q_heads), _take(k, own), _take(v, own), segment_ids=segment_ids, limits=limits
            )  # fmt: skip
            at = 0
            for n in numbers:
                parts[n] = heads[:, :, at : at + len(self.q_heads[n])]
                at += len(self.q_heads[n])
        return jnp.concatenate([parts[n] for n in range(len(self.linearized))], axis=2)

    def _calls(self) -> list[list[int]]:
        """The numbers of the linearized classes by the calls that compute them."""
        if not one_call_pays():
            return [[n] for n in range(len(self.linearized))]
        calls: list[list[int]] = []
        order = sorted(range(len(self.linearized)), key=lambda n: -self.linearized[n].switches.kept)
        for n in order:
            if calls and joins([self.linearized[other] for other in calls[-1]], self.linearized[n]):
                calls[-1].append(n)
            else:
                calls.append([n])
        return calls

    @property
    def linear_q_heads(self) -> tuple[int, ...]:
        """The query heads of ``linear_heads``, in its order."""
        return tuple(head for heads in self.q_heads[: len(self.linearized)] for head in heads)

    def init_state(self, batch: int, max_length: int | None, dtype: DTypeLike) -> SplitState:
        """The empty past. ``max_length`` is needed where the exact heads' cache grows.

        Raises:
            UserError: it is needed and None.
        """
        short, *more = (mixer.init_state(batch, max_length, jnp.dtype(dtype)) for mixer in self.linearized)
        long = None if self.long is None else self.long.init_state(batch, max_length, jnp.dtype(dtype))
        return SplitState(short, long, tuple(more))

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
        heads, states = [], []
        for i, (mixer, past) in enumerate(zip(self.linearized, (state.short, *state.more), strict=True)):
            own, after = mixer.extend(x, *self.part(i, q, k, v), past, lengths)
            heads.append(own)
            states.append(after)
        long_state = None
        if self.long is not None:
            own, long_state = self.long.extend(x, *self.part(-1, q, k, v), state.long, lengths)  # type: ignore[arg-type]
            heads.append(own)
        return self._together(heads), SplitState(states[0], long_state, tuple(states[1:]))

    def part(self, number: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """The heads of q, k, v of the class of that number."""
        own = self.kv_heads[number]
        return _take(q, self.q_heads[number]), _take(k, own), _take(v, own)

    def _together(self, heads: Sequence[Float[Array, "B T Nc H"]]) -> Float[Array, "B T N H"]:
        return _take(jnp.concatenate(heads, axis=2), self.order)


def one_call_pays() -> bool:
    """Whether this platform computes a layer's heads in one call sooner than class by class."""
    return target.current().platform != "cpu"


def joins(mixers: Sequence[LizardMixer], less: LizardMixer) -> bool:
    """Whether a class that keeps fewer pairs is computed in one call with others, the first of which keeps most."""
    most = mixers[0].switches
    # Without pairs the first tokens stand elsewhere (docs/attention.md), so that it is another function.
    if less.switches.window != most.window or less.switches.kept == 0 or not comes_together(less):
        return False
    every = [*mixers, less]
    needed = sum(mixer.config.kv_heads * (mixer.switches.window + mixer.switches.kept) for mixer in every)
    return sum(mixer.config.kv_heads for mixer in every) * (most.window + most.kept) <= PADDED * needed


def _take(x: Float[Array, "B T N H"], heads: tuple[int, ...]) -> Float[Array, "B T heads H"]:
    return jnp.take(x, jnp.asarray(heads, jnp.int32), axis=2)


@dataclass(frozen=True)
class Student:
    """A part of a layer's mixer that is trained, seen from the whole layer's heads.

    Attributes:
        mixer: the Lizard attention.
        number: which class of ``split`` it is, where it is not all of the layer.
    """

    mixer: LizardMixer
    number: int = 0
    split: SplitMixer | None = None

    def part(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Its heads of the layer's q, k, v."""
        return (q, k, v) if self.split is None else self.split.part(self.number, q, k, v)

    def heads(self, all_heads: Float[Array, "B T N H"]) -> Float[Array, "B T Ns H"]:
        """Its heads of the layer's."""
        return all_heads if self.split is None else _take(all_heads, self.split.q_heads[self.number])


def students_of(mixer: nnx.Module) -> list[Student]:
    """What of a layer's mixer learns, class by class."""
    if isinstance(mixer, LizardMixer):
        return [Student(mixer)] if mixer.switches.adds_modules else []
    if not isinstance(mixer, SplitMixer) or not mixer.short.switches.adds_modules:
        return []
    return [Student(part, i, mixer) for i, part in enumerate(mixer.linearized)]


def learner_of(mixer: LizardMixer | SplitMixer) -> Callable[..., Float[Array, "B T Nl H"]]:
    """Those heads of a layer that have something to learn, as a function of what the mixer takes, in the order of
    ``taught_heads``."""
    return mixer.linear_heads if isinstance(mixer, SplitMixer) else mixer


def taught_heads(mixer: LizardMixer | SplitMixer, all_heads: Float[Array, "B T N H"]) -> Float[Array, "B T Nl H"]:
    """Of the teacher's outputs of all heads of the layer those that the learner's are compared with."""
    return _take(all_heads, mixer.linear_q_heads) if isinstance(mixer, SplitMixer) else all_heads
