"""The growing memory of softmax attention: keys and values of every token so far, in a buffer of fixed capacity."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from lizard_jax.errors import UserError
from lizard_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys and values, of which each row's first ``position`` entries along T are filled."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    position: Int[Array, " B"]

    @staticmethod
    def empty(batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> "KVCache":
        shape = (batch, capacity, kv_heads, head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def with_room(self, capacity: int) -> "KVCache":
        """The same cache in a buffer that holds at least ``capacity`` tokens."""
        more = [(0, 0), (0, max(0, capacity - self.capacity)), (0, 0), (0, 0)]
        return KVCache(jnp.pad(self.k, more), jnp.pad(self.v, more), self.position)

    def append(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], lengths: Int[Array, " B"]
    ) -> tuple["KVCache", Bool[Array, " B"]]:
        """The cache with each row's first ``lengths`` new entries behind its old, and which rows no longer hold theirs.

        Raises:
            UserError: they do not fit, where that is known before running: when more tokens arrive than the whole
                capacity, and outside ``jax.jit`` in every case. Inside it the position is not known, and the caller
                must act on the returned flags: what did not fit is not there.
        """
        count = k.shape[1]
        known = not (isinstance(self.position, Tracer) or isinstance(lengths, Tracer))
        filled, arriving = (int(self.position.max()), int(lengths.max())) if known else (0, 0)
        if filled + arriving > self.capacity or (count > self.capacity and not known):
            raise UserError(
                f"the key/value cache holds {self.capacity} tokens, {filled} are filled and {arriving or count} more "
                "arrive; call init_state with a larger max_length"
            )
        row = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
        place = jnp.arange(count, dtype=jnp.int32)
        index = jnp.where(place < lengths[:, None], self.position[:, None] + place, self.capacity)
        cache = KVCache(
            self.k.at[row, index].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[row, index].set(v.astype(self.v.dtype), mode="drop"),
            self.position + lengths,
        )
        return cache, cache.position > self.capacity
