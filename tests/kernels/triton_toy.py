"""A Triton kernel that uses what the interpreter has to get right; a module, for Triton reads source files."""

import triton
import triton.language as tl


@triton.jit
def product(x, y):
    return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))


@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, sums_ptr, scale, C: tl.constexpr):
    program = tl.program_id(0)
    i = tl.arange(0, C)
    at = i[:, None] * C + i[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    out = product(x, y) + scale * program
    tl.store(out_ptr + program * C * C + at, out.to(out_ptr.dtype.element_ty))
    tl.store(sums_ptr + program * C + i, tl.cumsum(tl.max(x, 1), 0))
