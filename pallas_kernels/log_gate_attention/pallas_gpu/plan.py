"""A problem as the kernels see it: padded sizes, and how they are cut."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.log_gate_attention.problem import Act

# Matmuls that feed each other get one layout from Triton: where results are wider than high, it splits their columns
# over the warps, and otherwise their rows, of which a chunk has few. So the last of each chain is wide, by these sizes.
CHUNK, MAPPED_CHUNK = 32, 16  # tokens
BLOCK = 32  # values of a head, in the kernels that carry a state
PIECE = 64  # features that one matmul takes, where they are given
SUM_PIECE, STATE_PIECE = 16, 16  # raw features of a map's cotangent, and values of a state, that one matmul takes
RUN = 8  # chunks whose cotangents of a feature map are summed in registers


@dataclasses.dataclass(frozen=True)
class Plan:
    """A problem as the kernels see it: padded sizes, and how they are cut.

    Attributes:
        half: features of a half of the map before padding; 0 where features are given.
    """

    B: int
    T: int
    N: int
    S: int
    K: int
    H: int
    C: int
    parts: int
    width: int
    half: int
    X: int
    act: Act | None
    normalize: bool
    dtype: Any
    interpret: bool

    @property
    def count(self) -> int:
        return -(-self.T // self.C)

    @property
    def block(self) -> int:
        """Values of a head that one program of the first three kernels does."""
        return min(self.H, BLOCK)

    @property
    def run(self) -> int:
        return 1 if self.act is None else min(RUN, self.count)

    @property
    def raw_piece(self) -> int:
        """Raw values that one matmul takes; found by compiling without spills."""
        return 64 if self.width > 64 else 32

    @property
    def cuts(self) -> int:
        """Programs that share the cotangents of a map between them; together their registers hold the sums."""
        return 4 if self.width > 64 and self.X >= 64 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the feature axis of a state."""
        return self.parts, self.width
