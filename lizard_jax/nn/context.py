"""What Lizard attention reads and remembers: a layer's state, the tokens at hand, and what their exact part gave."""

from dataclasses import dataclass

import jax

from lizard_jax.nn.kept_pairs import KeptPairs, Read
from lizard_jax.typing import Array, Bool, Float, Int
from pallas_kernels.log_gate_attention import LinearState


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
class Context:
    """T tokens, and the past that they go on from.

    Attributes:
        q: ``[B, T, N, H]`` and k, v: ``[B, T, K, H]``, unrotated.
        all_k, all_v: ``[B, W + T, K, H]`` the same behind the W tokens before.
        log_gate: ``[B, T, S]`` or ``[B, T, S, F]`` log γ, where there is a memory.
        segments: ``[B, T]`` the document of each token, 0 for padding; ``k_segments`` ``[B, W + T]`` of each key.
        positions: ``[B, T]`` in the document.
        prefix: keys and values of its first tokens, ``[B, 1 or T, M, K, H]``, where the window keeps them.
        state: what was before; empty for a whole text.
        lengths: ``[B]`` how many tokens of each row are real, where a state goes on; None for a whole text.
        segment_ids: ``segments``, or None where there is one document and no padding.
        limits: ``[K]`` how many pairs each key head of a whole text keeps, where some keep less than X.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    all_k: Float[Array, "B WT K H"]
    all_v: Float[Array, "B WT K H"]
    log_gate: Float[Array, "B T S"] | Float[Array, "B T S F"] | None
    segments: Int[Array, "B T"]
    k_segments: Int[Array, "B WT"]
    positions: Int[Array, "B T"]
    prefix: tuple[Float[Array, "B P M K H"], Float[Array, "B P M K H"]] | None
    state: LizardState
    lengths: Int[Array, " B"] | None
    segment_ids: Int[Array, "B T"] | None
    limits: Int[Array, " K"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """The tokens of a ``Context`` in whole blocks, as kept pairs are chosen, and what the choice was.

    Attributes:
        offset: ``[B]`` the slots before each row's first token; U slots in all, W more with the past.
        q, all_k, all_v, positions: as in ``Context``, moved there.
        start: ``[B, W + U]`` where the document of each key begins; -1 where there is no token.
        asks: ``[B, U]`` the slots that hold a token of these.
        found: what was read.
    """

    offset: Int[Array, " B"]
    q: Float[Array, "B U N H"]
    all_k: Float[Array, "B WU K H"]
    all_v: Float[Array, "B WU K H"]
    positions: Int[Array, "B U"]
    start: Int[Array, "B WU"]
    asks: Bool[Array, "B U"]
    found: Read


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Near:
    """The exact part: window, meta memory and kept pairs.

    Attributes:
        heads: ``[B, T, N, H]`` its output, and log: ``[B, T, N]`` its log-normalizer.
        pairs: what is kept after the last token, and blocks: how it came to be; None where nothing is kept.
    """

    heads: Float[Array, "B T N H"]
    log: Float[Array, "B T N"]
    pairs: KeptPairs | None = None
    blocks: Blocks | None = None
