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
    if rows_in is None:
        if covered(WIDTH, column.shape[0]):
            tl.store(ptr + at, x)
        else:
            tl.store(ptr + at, x, mask=(column < WIDTH)[None, :])
    elif covered(WIDTH, column.shape[0]):
        tl.store(ptr + at, x, mask=rows_in[:, None])
    else:
        tl.store(ptr + at, x, mask=rows_in[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _cut(x):
    """The bf16 numbers next to the fp32 numbers ``x`` towards 0."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def in_two(x, dtype: tl.constexpr):
    """Numbers of ``dtype``, bf16, that sum to 16 bits of the fp32 numbers ``x``."""
    high = _cut(x)
    return high.to(dtype), (x - high).to(dtype)


@triton.jit
def in_columns(x, dtype: tl.constexpr):
    """``[L, 16]`` of ``dtype`` whose rows sum to the fp32 numbers ``x``: a matrix unit reads them without rounding."""
    column = tl.arange(0, 16)[None, :]
    if dtype == tl.float32:
        out = tl.where(column == 0, x[:, None], 0.0)
    else:
        high = _cut(x)
        middle = _cut(x - high)
        rest = tl.where(column == 1, middle[:, None], tl.where(column == 2, (x - high - middle)[:, None], 0.0))
        out = tl.where(column == 0, high[:, None], rest).to(dtype)
    return out
