"""How the op's arrays lie in memory and are cut into blocks: one grid step is one chunk of a few state heads.

The grid is ``(B, K/kv_heads, chunks, turns)``. Chunks follow one another, for each starts from the state that the last
one left in VMEM; the ``P = S/K`` state heads of a key/value head take turns inside a chunk, so that its values are
fetched once. A step has several state heads because one alone is a chain of operations that wait for each other.
Token arrays are seen as ``[B, T, heads·width]``: a block is ``C`` tokens of the heads that share a state. Gates, key
scales and log normalizers are rows, ``[B, heads, chunks, 1, C]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.numerics import EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from pallas_kernels.log_gate_attention.problem import Act, Problem
    from pallas_kernels.target import Target

LANES = 128
LARGEST_CHUNK = 128
# Of a core's VMEM, 16 MiB on v4 and at least 64 MiB later, what a kernel may have beside XLA.
VMEM = {"v4": 12 * 2**20}
LARGE_VMEM = 48 * 2**20
CORES = {"v4": 2, "v5p": 2}  # that share the grid's first two axes; of other chips one


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a call; axis letters as in ``log_gate_attention``.

    Attributes:
        F: width of the features in memory, a multiple of 128; the rest of ``features`` are zeros.
        H: width of the values in memory, a multiple of 128.
        X: width of queries and keys in memory, a multiple of 128: ``F``, or that of raw ones where ``act`` is given.
        C: tokens of a chunk.
        M: state heads of a grid step, of one key/value head or of as many.
        act: the feature map to compute inside.
        vmem: bytes of VMEM that a kernel may use.
    """

    B: int
    T: int
    N: int
    S: int
    K: int
    F: int
    H: int
    X: int
    C: int
    M: int
    features: int
    dtype: jnp.dtype
    normalize: bool
    act: Act | None
    vmem: int
    interpret: bool

    @property
    def P(self) -> int:
        """State heads of a key/value head."""
        return self.S // self.K

    @property
    def R(self) -> int:
        """Query heads of a state head."""
        return self.N // self.S

    @property
    def G(self) -> int:
        """Query heads of a key/value head."""
        return self.N // self.K

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a grid step."""
        return self.M if self.P == 1 else 1

    @property
    def turns(self) -> int:
        """Grid steps that a chunk takes for the state heads of its key/value heads."""
        return self.P * self.kv_heads // self.M

    @property
    def chunks(self) -> int:
        return -(-self.T // self.C)

    @property
    def needs(self) -> int:
        """Bytes of VMEM that the backward kernel takes, the largest of them, judged from what the compiler reports.

        Its token blocks, two of each, what it holds for all chunks, and intermediate results of a step's state heads.
        """
        itemsize = jnp.dtype(self.dtype).itemsize
        tokens = 2 * self.C * self.M * self.R * (2 * self.X + self.H) * itemsize
        states = (self.turns + 18 + 4 * itemsize) * self.M * self.F * self.H * 4
        maps = self.kv_heads * (self.G + self.P) * self.X * self.F * (itemsize + 4) if self.act else 0
        return 5 * tokens // 2 + states + maps + 2**20

    def shape(self, *shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)


def plan_call(problem: Problem, target: Target, normalize: bool, chunk: int) -> Plan | None:
    """How to compute a problem; None where even the shortest chunk needs more VMEM than there is.

    A chunk has 128 tokens, the width of a matrix unit, if the sequence and the hint ``chunk`` are no shorter and VMEM
    has the room. Hints of 64 and more stand for 128: shorter chunks take as many passes of the matrix unit. Up to four
    state heads, with up to 16 query heads, take a step together while every core of the chip has work; more would gain
    little, by the compiler's schedules.
    """
    width = problem.F if problem.width is None else problem.width
    largest = min(LARGEST_CHUNK if 2 * chunk >= LARGEST_CHUNK else round_up(chunk, 16), round_up(problem.T, 16))
    plan = Plan(
        B=problem.B, T=problem.T, N=problem.N, S=problem.S, K=problem.K,
        F=round_up(problem.F, LANES), H=round_up(problem.H, LANES), X=round_up(width, LANES), C=largest, M=1,
        features=problem.F, dtype=problem.dtype, normalize=normalize, act=problem.act,
        vmem=VMEM.get(target.chip or "", LARGE_VMEM), interpret=target.interpret,
    )  # fmt: skip
    cores = CORES.get(target.chip or "", 1)
    for C in sorted({round_up(largest >> halved, 16) for halved in range(4)}, reverse=True):
        for M in (4, 3, 2, 1):
            fitting = dataclasses.replace(plan, C=C, M=M)
            divides = (plan.K if plan.P == 1 else plan.P) % M == 0
            busy = plan.B * plan.K // fitting.kv_heads >= cores
            if fitting.needs <= plan.vmem and (M == 1 or (divides and busy and M * plan.R <= 16)):
                return fitting
    return None


def widen(x: Float[Array, "B T heads width"], width: int) -> Float[Array, "B T lanes"]:
    """Heads side by side, each filled with zeros to ``width``."""
    B, T, heads, given = x.shape
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - given))).reshape(B, T, heads * width)


def narrow(x: Float[Array, "B T lanes"], heads: int, width: int) -> Float[Array, "B T heads width"]:
    """What ``widen`` was given."""
    return x.reshape(*x.shape[:2], heads, -1)[..., :width]


def widen_features(plan: Plan, x: Float[Array, "B S features *rest"]) -> Float[Array, "B S F *rest"]:
    """What a state holds of each feature, filled with zeros; mapped features have two halves, filled each."""
    halves = 2 if plan.act else 1
    x = x.reshape(*x.shape[:2], halves, plan.features // halves, *x.shape[3:])
    x = jnp.pad(x, [(0, (plan.F - plan.features) // halves if axis == 3 else 0) for axis in range(x.ndim)])
    return x.reshape(*x.shape[:2], plan.F, *x.shape[4:])


def narrow_features(plan: Plan, x: Float[Array, "B S F *rest"]) -> Float[Array, "B S features *rest"]:
    """What ``widen_features`` was given."""
    halves = 2 if plan.act else 1
    x = x.reshape(*x.shape[:2], halves, plan.F // halves, *x.shape[3:])[:, :, :, : plan.features // halves]
    return x.reshape(*x.shape[:2], plan.features, *x.shape[4:])


def turned(plan: Plan, weights: Float[Array, "heads X E"]) -> Float[Array, "heads half wide"]:
    """Feature maps with features as rows, filled with zeros to ``[heads, F/2, X]``."""
    _, X, E = weights.shape
    return jnp.pad(jnp.moveaxis(weights, 1, 2), ((0, 0), (0, plan.F // 2 - E), (0, plan.X - X)))


def turned_back(weights: Float[Array, "heads half wide"], X: int, E: int) -> Float[Array, "heads X E"]:
    """What ``turned`` was given."""
    return jnp.moveaxis(weights, 1, 2)[:, :X, :E]


def to_rows(x: Float[Array, "B T heads"], chunk: int, fill: float) -> Float[Array, "B heads chunks 1 C"]:
    """One row of ``chunk`` numbers for each head and chunk; ``fill`` goes behind the last token."""
    B, T, heads = x.shape
    x = jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, -T % chunk)), constant_values=fill)
    return x.reshape(B, heads, -1, 1, chunk)


def from_rows(x: Float[Array, "B heads chunks 1 C"], T: int) -> Float[Array, "B T heads"]:
    """What ``to_rows`` was given."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1), 1, 2)[:, :T]


def gate_rows(plan: Plan, g: Float[Array, "B T S"], c: Float[Array, "B T S"]):
    """Rows of gates and key scales; behind the last token nothing is forgotten and no key is there."""
    return to_rows(g, plan.C, 0.0), to_rows(c, plan.C, EMPTY)


class Blocks:
    """What a grid step ``(batch, key/value heads, chunk, turn)`` reads or writes of each kind of array.

    ``reverse`` goes from the last chunk to the first.
    """

    def __init__(self, plan: Plan, reverse: bool = False) -> None:
        self._plan = plan
        self._reverse = reverse

    def _spec(self, shape: tuple[int, ...], index: Callable) -> pl.BlockSpec:
        last, turns = self._plan.chunks - 1, self._plan.turns

        def place(b, k, i, turn):
            return index(b, k, last - i if self._reverse else i, k * turns + turn)

        return pl.BlockSpec(shape, place)

    def of_state_heads(self, width: int) -> pl.BlockSpec:
        """The chunk's tokens, of ``[B, T, S·width]``."""
        return self._spec((1, self._plan.C, self._plan.M * width), lambda b, k, i, s: (b, i, s))

    def of_kv_heads(self, width: int) -> pl.BlockSpec:
        """The chunk's tokens, of ``[B, T, K·width]``."""
        return self._spec((1, self._plan.C, self._plan.kv_heads * width), lambda b, k, i, s: (b, i, k))

    def rows(self, heads: int) -> pl.BlockSpec:
        """The chunk's rows, of ``[B, S·heads, chunks, 1, C]``."""
        return self._spec((1, self._plan.M * heads, 1, 1, self._plan.C), lambda b, k, i, s: (b, s, i, 0, 0))

    def each_chunk(self, *shape: int) -> pl.BlockSpec:
        """What state heads have for each chunk, of ``[B, S, chunks, *shape]``."""
        return self._spec((1, self._plan.M, 1, *shape), lambda b, k, i, s: (b, s, i, 0, 0))

    def at_start(self, *shape: int) -> pl.BlockSpec:
        """What state heads have once, of ``[B, S, *shape]``, held while the first chunk is computed.

        The block stays where it was afterwards, so that it is not fetched again.
        """
        turns = self._plan.turns

        def place(b, k, i, turn):
            return b, k * turns + jnp.where(i == 0, turn, turns - 1), 0, 0

        return pl.BlockSpec((1, self._plan.M, *shape), place)

    def at_end(self, *shape: int) -> pl.BlockSpec:
        """The same, held while the last chunk is computed, and before that where the first heads' will be written."""
        turns, last = self._plan.turns, self._plan.chunks - 1

        def place(b, k, i, turn):
            return b, k * turns + jnp.where(i == last, turn, 0), 0, 0

        return pl.BlockSpec((1, self._plan.M, *shape), place)

    def maps(self, heads: int) -> pl.BlockSpec:
        """The feature maps of key/value heads, of ``[K·heads, F/2, X]``, held for all chunks."""
        plan = self._plan
        return pl.BlockSpec((plan.kv_heads * heads, plan.F // 2, plan.X), lambda b, k, i, turn: (k, 0, 0))

    def map_gradients(self, heads: int) -> pl.BlockSpec:
        """The same of ``[B, K·heads, F/2, X]``."""
        plan = self._plan
        return pl.BlockSpec((1, plan.kv_heads * heads, plan.F // 2, plan.X), lambda b, k, i, turn: (b, k, 0, 0))


def call(plan: Plan, kernel: Callable, inputs: dict, in_specs: dict, outputs: dict, out_specs: dict, scratch: dict):
    """Run ``kernel(inputs, outputs, scratch)``, each a dict of refs, over the grid; a dict of what it wrote."""
    (written,) = pl.pallas_call(
        kernel,
        grid=(plan.B, plan.K // plan.kv_heads, plan.chunks, plan.turns),
        in_specs=({name: in_specs[name] for name in inputs},),
        out_specs=(out_specs,),
        out_shape=(outputs,),
        scratch_shapes=[{name: pltpu.VMEM(shape, jnp.float32) for name, shape in scratch.items()}],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        interpret=plan.interpret,
        name=getattr(kernel, "func", kernel).__name__,
    )(inputs)
    return written
