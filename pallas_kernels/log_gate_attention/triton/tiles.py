"""Triton: tiles of row-major arrays, and fp32 numbers as matrix units read them."""

import triton
import triton.language as tl


@triton.constexpr_function
def covered(width, block):
    """Whether blocks from a multiple of their size on end with the row."""
    return width % block == 0


@triton.jit
def load_tile(ptr, row, column, rows_in, WIDTH: tl.constexpr):
    """``[rows, columns]`` of an array of ``WIDTH`` columns, 0 outside; ``rows_in`` is None where all rows exist."""
    at = row[:, None] * WIDTH + column[None, :]
    if rows_in is None:
        if covered(WIDTH, column.shape[0]):
            out = tl.load(ptr + at)
        else:
            out = tl.load(ptr + at, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        out = tl.load(ptr + at, mask=rows_in[:, None] & (column < WIDTH)[None, :], other=0.0)
    return out


@triton.jit
def load_tile_t(ptr, row, column, rows_in, WIDTH: tl.constexpr):
    """The same, transposed: ``[columns, rows]``."""
    at = row[None, :] * WIDTH + column[:, None]
    if rows_in is None:
        if covered(WIDTH, column.shape[0]):
            out = tl.load(ptr + at)
        else:
            out = tl.load(ptr + at, mask=(column < WIDTH)[:, None], other=0.0)
    else:
        out = tl.load(ptr + at, mask=(column < WIDTH)[:, None] & rows_in[None, :], other=0.0)
    return out


@triton.jit
def store_tile(ptr, row, column, rows_in, x, WIDTH: tl.constexpr):
    at = row[:, None] * WIDTH + column[None, :]
    x = x.to(ptr.dtype.element_ty)
    if covered(WIDTH, column.shape[0]):
        tl.store(ptr + at, x, mask=rows_in[:, None])
    else:
        tl.store(ptr + at, x, mask=rows_in[:, None] & (column < WIDTH)[None, :])


@triton.jit
def in_two(x, dtype: tl.constexpr):
    """Numbers of a narrower ``dtype`` that sum to 16 bits of the fp32 numbers ``x``; the first are cut off."""
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return high.to(dtype), (x - high).to(dtype)


@triton.jit
def in_columns(x, dtype: tl.constexpr):
    """``[L, 16]`` of ``dtype`` whose rows sum to the fp32 numbers ``x``, or to 16 bits of them in bf16."""
    column = tl.arange(0, 16)[None, :]
    if dtype == tl.float32:
        out = tl.where(column == 0, x[:, None], 0.0)
    else:
        high, rest = in_two(x, dtype)
        out = tl.where(column == 0, high[:, None], tl.where(column == 1, rest[:, None], tl.full((1, 1), 0.0, dtype)))
    return out
