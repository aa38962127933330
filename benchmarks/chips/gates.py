"""What must compile: every kernel, each pass, for each chip it is for, at the attention shape of Llama-3-8B.

Heads come and go side by side in one axis, as projections hand them over and take them. A TPU lays an axis of heads out
otherwise: called alone, on arrays that have one, the ops would pay for moving every argument and result first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.chips import cost
from benchmarks.chips.compilers import Compiled, compile_for
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.log_gate_attention import empty_state, log_gate_attention, mapped_log_gate_attention
from pallas_kernels.log_gate_attention.problem import Act
from pallas_kernels.log_gate_attention.problem import Problem as LogGateProblem
from pallas_kernels.sliding_window import sliding_window
from pallas_kernels.sliding_window.problem import Problem as WindowProblem

TPUS, GPUS = ("v5e", "v5p", "v6e"), ("sm_80", "sm_90")
CHIPS = {"pallas_tpu": TPUS, "triton": GPUS, "pallas_gpu": GPUS}
OPS = ("log_gate_attention", "sliding_window")
T, N, K, H, W = 2048, 32, 8, 128, 128
FULL = 16  # sequences that fill a card: outputs and states come from one pass there
CHUNK = 128  # of the TPU kernels at this shape
# Of a v5e, whose peak is that of four matrix units of 128×128. Of other TPUs it is not as plain what a schedule's cycle
# may hold.
CLOCK = cost.CHIPS["v5e"].flops / (4 * 2 * 128 * 128)

Pass = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Gate:
    """One thing that must compile, in bf16.

    Attributes:
        F: features; None for ``sliding_window``, which has none.
        act: the feature map inside the kernel; None where features are given.
        B: sequences.
    """

    op: str
    implementation: str
    which: Pass
    chip: str
    F: int | None = None
    act: Act | None = None
    B: int = 1

    @property
    def most_spills(self) -> int | None:
        """Bytes that a kernel may spill; None for any number, which the schedule tells the cost of.

        A pass over whole sequences holds so much on a GPU that tiles which spill nothing take more instructions; the
        window's fastest tiles on an H200, by measurement, spill 24.
        """
        if self.chip in TPUS:
            return None
        window = 24 if (self.op, self.implementation, self.chip) == ("sliding_window", "triton", "sm_90") else 0
        return window if self.B == 1 else 320

    @property
    def most_over_roofline(self) -> float | None:
        """What ``over_roofline`` may be, so that a schedule full of spills fails; None where nothing tells."""
        if self.chip != "v5e":
            return None
        return 1.75 if self.which == "forward" else 3.0

    def over_roofline(self, compiled: Compiled) -> float | None:
        """Cycles of the schedules of the pass over those of its roofline; None but on a v5e.

        What the cost model's backward pass leaves out, the window's forward pass that its kernels run again, is added.
        """
        if self.chip != "v5e" or any(kernel.bundles is None for kernel in compiled.kernels):
            return None
        cycles = sum((kernel.bundles or 0) * (kernel.steps or 0) for kernel in compiled.kernels)
        return cycles / CLOCK / self._cost().roofline(cost.CHIPS["v5e"])

    def _cost(self) -> cost.Cost:
        dtype = jnp.dtype(jnp.bfloat16)
        if self.F is None:
            window = WindowProblem(self.B, T, N, K, H, W, dtype, rope=True)
            forward = cost.window_forward(window, CHUNK)
            return forward if self.which == "forward" else forward + cost.window_backward(window, CHUNK)
        width = None if self.act is None else H
        problem = LogGateProblem(self.B, T, N, K, K, self.F, H, dtype, act=self.act, width=width)
        return cost.forward(problem, CHUNK) if self.which == "forward" else cost.backward(problem, CHUNK)

    @property
    def passes(self) -> str:
        return f"{self.act}-mapped {self.which}" if self.act else self.which

    def __str__(self) -> str:
        batch = None if self.B == 1 else f"B{self.B}"
        named = (self.op, self.implementation, self.passes, self.F, batch, self.chip)
        return "-".join(str(x) for x in named if x is not None)

    def compile(self) -> Compiled:
        """Raises ``CannotCompile`` or what the compiler raises."""
        function, arguments = _OPS[self.op](self)
        if self.which == "forward":
            return compile_for(self.chip, function, *arguments)

        def backward(arguments, cotangents):
            return jax.vjp(function, *arguments)[1](cotangents)

        # The cotangents of a forward pass are shaped like its results, which no kernel is needed to know.
        return compile_for(self.chip, backward, arguments, self._results())

    def _results(self) -> Any:
        y, n = _array(self.B, T, N * H), _array(self.B, T, N, dtype=jnp.float32)
        return (y, n) if self.F is None else (y, n, _state(self.B, self.F))


def gates() -> Iterator[Gate]:
    """All of them."""
    for op in OPS:
        kernels = [name for name in IMPLEMENTATIONS if name in CHIPS]
        maps = ((None, None),) if op == "sliding_window" else itertools.product((128, 256), (None, "exp", "softmax"))
        for implementation, (F, act), which in itertools.product(kernels, maps, ("forward", "backward")):
            for chip in CHIPS[implementation]:
                yield Gate(op, implementation, which, chip, F, act)
                if implementation == "triton" and F is not None and which == "forward":
                    yield Gate(op, implementation, which, chip, F, act, FULL)


def _heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


def _side_by_side(y: jax.Array, *rest: Any) -> Any:
    return y.reshape(*y.shape[:2], -1), *rest


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _state(B: int, F: int) -> Any:
    return jax.eval_shape(lambda: empty_state(B, K, F, H))


def _log_gate(gate: Gate) -> tuple[Callable, tuple]:
    """All that the op takes and gives: key scales, a state to start from, log normalizer and final state."""
    assert gate.F is not None
    act, B = gate.act, gate.B
    flags = {"return_log_normalizer": True, "return_final_state": True, "implementation": gate.implementation}
    scalars = _array(B, T, K, dtype=jnp.float32), _array(B, T, K, dtype=jnp.float32), _state(B, gate.F)
    v = _array(B, T, K * H)
    if act is None:

        def attend(q, k, v, g, c, state):
            heads = _heads(q, N), _heads(k, K), _heads(v, K)
            return _side_by_side(*log_gate_attention(*heads, g, k_log_scale=c, initial_state=state, **flags))

        return attend, (_array(B, T, N * gate.F), _array(B, T, K * gate.F), v, *scalars)

    def attend_mapped(q, k, v, g, c, state, q_map, k_map):
        heads, maps = (_heads(q, N), _heads(k, K), _heads(v, K)), {"q_map": q_map, "k_map": k_map}
        return _side_by_side(
            *mapped_log_gate_attention(*heads, g, **maps, act=act, k_log_scale=c, initial_state=state, **flags)
        )

    maps = (_array(heads, H, gate.F // 2, dtype=jnp.float32) for heads in (N, K))
    return attend_mapped, (_array(B, T, N * H), _array(B, T, K * H), v, *scalars, *maps)


def _window(gate: Gate) -> tuple[Callable, tuple]:
    """With rotation and a sink; other meta memory is not the kernels' work."""
    B = gate.B

    def attend(q, k, v, frequencies, sink):
        segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, W + T), jnp.int32)
        heads, implementation = (_heads(q, N), _heads(k, K), _heads(v, K)), gate.implementation
        return _side_by_side(
            *sliding_window(
                *heads, *segments, window=W, rope_frequencies=frequencies, sink=sink, implementation=implementation
            )
        )

    scalars = _array(H // 2, dtype=jnp.float32), _array(N, dtype=jnp.float32)
    return attend, (_array(B, T, N * H), _array(B, W + T, K * H), _array(B, W + T, K * H), *scalars)


_OPS = {"log_gate_attention": _log_gate, "sliding_window": _window}
