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
    """Rotated keys and values, of which the first ``position`` entries along T are filled."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    position: Int[Array, ""]

    @staticmethod
    def empty(batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> "KVCache":
        shape = (batch, capacity, kv_heads, head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> tuple["KVCache", Bool[Array, ""]]:
        """The cache with new keys and values behind the old, and whether they no longer fit.

        Raises:
            UserError: they do not fit, where that is known before running: always when more tokens arrive than the
                whole capacity, and outside ``jax.jit`` in every case. Inside it the position is not known, and the
                caller must act on the returned flag: the buffer then holds garbage.
        """
        count = k.shape[1]
        filled = None if isinstance(self.position, Tracer) else int(self.position)
        if (filled or 0) + count > self.capacity:
            raise UserError(
                f"the key/value cache holds {self.capacity} tokens, {filled or 0} are filled and {count} more arrive; "
                "call init_state with a larger max_length"
            )
        start = (0, self.position, 0, 0)
        cache = KVCache(
            jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), start),
            jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), start),
            self.position + count,
        )
        return cache, cache.position > self.capacity
