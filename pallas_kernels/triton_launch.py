"""Run a Triton kernel from JAX: through jax-triton on a GPU, or in Triton's interpreter where the target says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pallas_kernels import target

if TYPE_CHECKING:
    from jaxtyping import Array


def capability(chip: str | None) -> int | None:
    """``80`` of ``sm_80``; None, which leaves the choice to jax-triton, where the chip is not known."""
    return int(chip.removeprefix("sm_")) if chip else None


def launch(
    kernel: Any,
    *arrays: Array,
    out_shape: Any,
    grid: tuple[int, int, int],
    num_warps: int = 4,
    num_stages: int = 2,
    **parameters: Any,
) -> Any:
    """Outputs of one launch of ``kernel``, a function under ``triton.jit``.

    The kernel's parameters are pointers to ``arrays`` in order, then pointers to the outputs in order, then scalars and
    constants, which are given by name. Arrays are dense and row-major. There is no derivative and no ``vmap``: callers
    write a ``custom_vjp`` and put the batch in the grid.

    Args:
        out_shape: a pytree of ``jax.ShapeDtypeStruct``; the outputs come back in it. Memory that the kernel does not
            write is undefined.
        grid: counts of programs, three of them.
        num_warps, num_stages: warps of a program, and depth of the software pipeline of its loops.
        parameters: scalars and ``tl.constexpr`` parameters of the kernel.
    """
    aim = target.current()
    if aim.interpret:
        return _interpret(kernel, arrays, out_shape, grid, parameters)

    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_type=out_shape,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=capability(aim.chip),
        **parameters,
    )


def _interpret(kernel, arrays, out_shape, grid, parameters):
    shapes, tree = jax.tree.flatten(out_shape)

    def run(*inputs):
        from pallas_kernels import triton_interpreter

        held = [np.ascontiguousarray(x) for x in inputs]
        outputs = [np.empty(x.shape, x.dtype) for x in shapes]
        triton_interpreter.run(kernel, [*held, *outputs], grid, parameters)
        return outputs

    return jax.tree.unflatten(tree, jax.pure_callback(run, shapes, *arrays))
