"""Triton: tiles of row-major arrays, and fp32 numbers as matrix units read them."""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, row, column, rows_in, WIDTH: tl.constexpr):
    """``[rows, columns]`` of an array of ``WIDTH`` columns, 0 outside."""
    at = row[:, None] * WIDTH + column[None, :]
    return tl.load(ptr + at, mask=rows_in[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def load_tile_t(ptr, row, column, rows_in, WIDTH: tl.constexpr):
    """The same, transposed: ``[columns, rows]``."""
    at = row[None, :] * WIDTH + column[:, None]
    return tl.load(ptr + at, mask=(column < WIDTH)[:, None] & rows_in[None, :], other=0.0)


@triton.jit
def store_tile(ptr, row, column, rows_in, x, WIDTH: tl.constexpr):
    at = row[:, None] * WIDTH + column[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=rows_in[:, None] & (column < WIDTH)[None, :])


@triton.jit
def in_columns(x, dtype: tl.constexpr):
    """``[L, 16]`` of ``dtype`` whose rows sum to the fp32 numbers ``x``: a matrix unit reads them without rounding."""
    column = tl.arange(0, 16)[None, :]
    if dtype == tl.float32:
        out = tl.where(column == 0, x[:, None], 0.0)
    else:
        high = x.to(dtype).to(tl.float32)
        middle = (x - high).to(dtype).to(tl.float32)
        low = x - high - middle
        out = tl.where(column == 0, high[:, None], tl.where(column == 1, middle[:, None], 0.0))
        out = tl.where(column == 2, low[:, None], out).to(dtype)
    return out
