"""Axis letters and array types. Every public signature of the project uses these and no others.

======  =========================================================
letter  axis
======  =========================================================
``B``   batch
``T``   time (positions of the sequence)
``D``   model width
``V``   vocabulary
``N``   query heads
``K``   key/value heads
``G``   query heads per key/value head, ``N / K``
``S``   state heads of the linear branch, ``K`` or ``N``
``H``   head width
``F``   feature width after the feature map (both halves)
``W``   window length
``M``   meta tokens
``C``   chunk length
======  =========================================================

``segment_ids`` is int32 ``[B, T]``: 0 is padding, and each run of equal positive ids is one document that
attention never leaves. ``positions`` is int32 ``[B, T]``, counted from 0 inside each document. An array of one axis is
written with a space, ``Float[Array, " B"]``, so that linters do not take the letter for a name.
"""

from jax import Array
from jaxtyping import Bool, Float, Int, Key, Shaped

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Shaped"]
