"""The columns of one block of the sweep as a kernel in the Triton language (the compiler), for
GPUs: the inner loop of methods/gptq.py with the same formulas, for float32 weights on CUDA.

In torch each column takes a handful of launches, one after the other, however large the GPU. Here
one program has a tile of rows. The columns of the block stay on the chip while the program goes
through them. It writes the rounded steps, and the terms that multiply the influences. The product
on the columns behind the block stays a matrix product of torch. Rows do not depend on each other,
and so tiles do not either.

Differs from the loop in the order of sums, and in whether a product and its sum are rounded once or
twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from marrq.methods.column_block import ColumnBlock

ROWS = 32
"""Rows of a tile: with 128 columns, 16 kB on the chip."""
KERNEL_OPTIONS = {"enable_fp_fusion": True}
"""Fused multiply-add, said explicitly: Triton's default changes with 3.10, and 3.9 warns of it."""
LEAST_WIDTH = 128
"""Columns of a tile, of which a narrow block fills a part. The last block of a linear, often
narrower than the others, then runs the kernel that is compiled already: one kernel for each number
of terms, with grids per column or shared."""
HALFWAY = 12582912.0
"""1.5 · 2²³: a float32 of at most 2²² to which it is added loses its fraction, rounded to the
nearest whole number, half to even."""


@triton.jit(do_not_specialize=["width"])
def _columns(
    w, influences, scales, lowest, highest, originals, alphas, steps, terms, rows, width,
    TERMS: tl.constexpr, PER_COLUMN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    HALFWAY: tl.constexpr,
):  # fmt: skip
    # A program works on ROWS rows of the weight; every tensor has a column as its row, [·, rows].
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    # The tile: [WIDTH, ROWS] of w [width, rows], zeros where it hangs over the edge.
    tile = tl.load(
        w + column[:, None] * rows + row[None, :],
        mask=(column < width)[:, None] & there[None, :],
        other=0.0,
    )
    alpha = tl.load(alphas + row, mask=there, other=0.0)
    # One column after the other, for all rows of the tile at once.
    for j in range(width):
        # Grids are [1, rows] if all columns share one, else [width, rows].
        grid = row + (j * rows if PER_COLUMN else 0)
        scale = tl.load(scales + grid, mask=there, other=1.0)
        low = tl.load(lowest + grid, mask=there, other=0.0)
        high = tl.load(highest + grid, mask=there, other=0.0)
        # w_j, taken out of the tile: a tile on the chip cannot be indexed.
        x = tl.sum(tl.where((column == j)[:, None], tile, 0.0), 0)
        # The grid's ends are small whole numbers: clamped first, every ratio is small enough for
        # HALFWAY, and rounds to the same step.
        ratio = tl.clamp(tl.div_rn(x, scale), low, high, propagate_nan=tl.PropagateNan.ALL)
        step = (ratio + HALFWAY) - HALFWAY
        tl.store(steps + j * rows + row, step, mask=there)
        # Columns not yet rounded; behind the block torch takes over.
        after = (column > j) & (column < width)
        # GPTQ: the error w_j - q(w_j), onto the columns behind.
        first = x - step * scale
        tl.store(terms + j * TERMS * rows + row, first, mask=there)
        # influences is [width, width, TERMS]: row j, every column.
        influence = influences + (j * width + column) * TERMS
        tile += tl.load(influence, mask=after, other=0.0)[:, None] * first[None, :]
        # GPTAQ: α w_j.
        if TERMS > 1:
            second = x * alpha
            tl.store(terms + (j * TERMS + 1) * rows + row, second, mask=there)
            tile += tl.load(influence + 1, mask=after, other=0.0)[:, None] * second[None, :]
        # ResComp: α (W0_j - w_j).
        if TERMS > 2:
            third = (tl.load(originals + j * rows + row, mask=there, other=0.0) - x) * alpha
            tl.store(terms + (j * TERMS + 2) * rows + row, third, mask=there)
            tile += tl.load(influence + 2, mask=after, other=0.0)[:, None] * third[None, :]


def sweep_columns(block: ColumnBlock) -> None:
    """What gptq.round_columns does, in one launch, on contiguous float32 tensors; block.columns are
    left as they were."""
    w, alpha = block.columns, block.alpha
    width, rows = w.shape
    # Without groups all columns share one grid, which is then loaded once.
    grids = block.grids
    parts = (part.float().contiguous() for part in (grids.scale, grids.lowest, grids.highest))
    # The kernel reads an α for each row.
    alphas = alpha.to(w).contiguous() if isinstance(alpha, Tensor) else w.new_full((rows,), alpha)
    inputs = (w, block.influences, *parts, block.original, alphas)
    sizes: dict[str, Any] = {
        "TERMS": block.terms.shape[1],
        "PER_COLUMN": not grids.is_shared,
        "WIDTH": max(triton.next_power_of_2(width), LEAST_WIDTH),
        "ROWS": ROWS,
    }
    # A kernel starts on the current device, wherever its tensors are.
    with torch.cuda.device_of(w):
        _columns[(triton.cdiv(rows, ROWS),)](
            *inputs,
            block.steps,
            block.terms,
            rows,
            width,
            **sizes,
            HALFWAY=HALFWAY,
            **KERNEL_OPTIONS,
        )
