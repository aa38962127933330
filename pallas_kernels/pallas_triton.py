"""What the Pallas kernels for GPUs share, whatever the op; Triton compiles them, and nothing but JAX is needed.

Of Pallas' two GPU backends this is the Triton one, for it alone covers Ampere as well as Hopper (Mosaic GPU's matmuls
are Hopper's and Blackwell's), multiplies fp32 as fp32 and runs in the plain interpreter. JAX 0.11 warns that it is to
go, which is why JAX below 0.12 is pinned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float

WARPS = 8


class Plan(Protocol):
    """A problem as an op's kernels see it."""

    @property
    def interpret(self) -> bool:
        """Run in Pallas' interpreter."""
        ...


def power_of_two(size: int) -> int:
    """What an axis of this size is padded to."""
    return max(16, 1 << (size - 1).bit_length())


def dot(a: Float[Array, "_ _"], b: Float[Array, "_ _"], axes: tuple[int, int] = (1, 0)) -> Float[Array, "_ _"]:
    """Product in fp32 over an axis of each; fp32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def launch(kernel: Callable, plan: Plan, grid: tuple[int, ...], inputs: Any, outputs: Any) -> Any:
    """Run a kernel over a grid; references come first, and the plan by name."""

    # XLA finds a kernel by its function's name.
    def run(*refs):
        kernel(*refs, plan=plan)

    run.__name__ = run.__qualname__ = kernel.__name__.strip("_")
    call = pl.pallas_call(
        run, grid=grid, out_shape=outputs, interpret=plan.interpret, name=run.__name__,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return call(*inputs)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An output of a kernel."""
    return jax.ShapeDtypeStruct(shape, dtype)
