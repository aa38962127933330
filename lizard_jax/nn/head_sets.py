"""The same attention over other key heads: some of a layer's, several classes together, each device's own, or some
twice."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lizard_jax.config import ModelConfig
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import partition
from pallas_kernels.partition import BATCH, HEADS, TOKENS

if TYPE_CHECKING:
    from lizard_jax.nn.lizard_attention import LizardMixer


def of_heads(config: ModelConfig, kv_heads: int, **attention: object) -> ModelConfig:
    """The configuration of that many of a layer's key heads, with their query heads, and with these switches."""
    assert config.attention is not None
    usual: dict[str, object] = {"softmax_layers": (), "softmax_heads": (), "budgets": ()}
    switches = replace(config.attention, **usual | attention)  # type: ignore[arg-type]
    group = config.num_heads // config.kv_heads
    return replace(config, num_heads=kv_heads * group, kv_heads=kv_heads, attention=switches)


@functools.cache
def _shapes(kind: type["LizardMixer"], config: ModelConfig) -> tuple[nnx.GraphDef["LizardMixer"], nnx.State]:
    """A mixer of these heads, without numbers."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))


def _head_axis(a: Any, b: Any) -> int | None:
    """Along which axis a parameter has heads, seen in two numbers of them; None where it is one of all."""
    return next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)


def comes_together(mixer: "LizardMixer") -> bool:
    """Whether all its parameters are of one head each, so that classes of heads can be put together."""
    _, wider = _shapes(type(mixer), of_heads(mixer.config, mixer.config.kv_heads + 1))
    leaves = zip(jax.tree.leaves(nnx.state(mixer)), jax.tree.leaves(wider), strict=True)
    return all(_head_axis(a, b) is not None for a, b in leaves)


def one_class(mixers: Sequence["LizardMixer"]) -> tuple["LizardMixer", Int[Array, " K"]]:
    """Classes that differ in their kept pairs alone as one mixer of the largest, and how many each key head keeps.

    The same numbers from one call in place of many, at the price of pairs that no head has.
    """
    kept, kv_heads = [mixer.switches.kept for mixer in mixers], [mixer.config.kv_heads for mixer in mixers]
    graph, wanted = _shapes(type(mixers[0]), of_heads(mixers[0].config, sum(kv_heads), kept=max(kept)))

    def joined(wide: jax.ShapeDtypeStruct, *parts: Array) -> Array:
        axis = _head_axis(wide, parts[0])
        assert axis is not None
        return jnp.concatenate(parts, axis=axis)

    state = jax.tree.map(joined, wanted, *(nnx.state(mixer) for mixer in mixers))
    limits = [count for count, heads in zip(kept, kv_heads, strict=True) for _ in range(heads)]
    return nnx.merge(graph, state), jnp.asarray(limits, jnp.int32)


def repeated(x: Array, size: int, axis: int) -> Array:
    """An array of heads with its first ones again behind the last, so many in all."""
    return jnp.take(x, jnp.arange(size, dtype=jnp.int32) % x.shape[axis], axis=axis)


def with_repeats(mixer: "LizardMixer", kv_heads: int) -> "LizardMixer":
    """The mixer with its first key heads again behind the last, so many in all: it takes ``repeated`` q, k and v."""
    graph, wanted = _shapes(type(mixer), of_heads(mixer.config, kv_heads))

    def more(wide: jax.ShapeDtypeStruct, a: Array) -> Array:
        axis = _head_axis(wide, a)
        return a if axis is None else repeated(a, wide.shape[axis], axis)

    return nnx.merge(graph, jax.tree.map(more, wanted, nnx.state(mixer)))


def for_devices(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> tuple[Array, Array, Array]:
    """What attention reads as the devices that share a text take it: their own tokens, and heads that they divide."""
    kv_heads = partition.spread_heads(k.shape[2])
    if kv_heads > k.shape[2]:
        q, k, v = (repeated(a, kv_heads * a.shape[2] // k.shape[2], 2) for a in (q, k, v))
    return partition.heads_by_tokens(q), partition.heads_by_tokens(k), partition.heads_by_tokens(v)


def on_devices(mixer: "LizardMixer", *arrays: Array | None) -> Float[Array, "B T N H"]:
    """``mixer.heads(*arrays)`` on the mesh of ``partition.over``: each device for its rows and its heads alone.

    Choosing pairs is a loop over a text; nothing of it may wait for a link.
    """
    if partition.mesh() is None:
        return mixer.heads(*arrays)  # type: ignore[arg-type]
    heads, kv_heads = mixer.config.num_heads, mixer.config.kv_heads
    graph, _ = _shapes(type(mixer), of_heads(mixer.config, kv_heads // partition.head_parts(kv_heads)))
    _, other = _shapes(type(mixer), of_heads(mixer.config, kv_heads + 1))

    def role(a: Any, b: Any) -> PartitionSpec:
        axis = _head_axis(a, b)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "heads")

    def run(state: nnx.State, *arrays: Any) -> Array:
        return nnx.merge(graph, state).heads(*arrays)

    state = nnx.state(mixer)
    roles = [None if a is None else one for one, a in zip((*(TOKENS,) * 4, BATCH, HEADS), arrays, strict=True)]
    parameters = jax.tree.map(role, state, other)
    assert arrays[1] is not None
    rows = arrays[1].shape[0]
    return partition.spread(run, (parameters, *roles), TOKENS, rows, (heads, kv_heads))(state, *arrays)
