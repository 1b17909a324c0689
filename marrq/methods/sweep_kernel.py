"""The columns of one block of the sweep as a kernel in the Triton language (the compiler), for
GPUs: what methods/gptq.py has in its inner loop, with the same formulas. It runs where the weight
is float32 on CUDA and the package triton is installed.

In torch each column takes a handful of launches, one after the other, whatever the size of the GPU.
Here a program has a tile of rows, whose columns of the block stay on the chip while it goes through
them. Out go the rounded steps, and the terms that multiply the kernels, for the product beyond the
block, which stays a matrix product of torch's. Rows know nothing of each other, so tiles do not
either.

Against the loop only the order of sums differs, and whether a product and its sum are rounded once
or twice."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from marrq.quantizers.affine import ColumnGrid

ROWS = 32
"""Rows of a tile: with 128 columns, 16 kB on the chip."""
OPTIONS = {
    "enable_fp_fusion": True
}  # said, since what Triton does when it is not changes with 3.10, and 3.9 warns of it
HALFWAY = 12582912.0
"""1.5 · 2²³: a float32 of at most 2²² that it is added to loses its fraction, to the nearest, half
to even."""


@triton.jit
def _columns(
    w, kernels, scales, lowest, highest, originals, alphas, steps, terms, rows, width,
    TERMS: tl.constexpr, PER_COLUMN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HALFWAY: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    tile = tl.load(
        w + column[:, None] * rows + row[None, :],
        mask=(column < width)[:, None] & there[None, :],
        other=0.0,
    )
    alpha = tl.load(alphas + row, mask=there, other=0.0)
    for j in range(width):
        grid = row + (j * rows if PER_COLUMN else 0)
        scale = tl.load(scales + grid, mask=there, other=1.0)
        low, high = (
            tl.load(lowest + grid, mask=there, other=0.0),
            tl.load(highest + grid, mask=there, other=0.0),
        )
        x = tl.sum(tl.where((column == j)[:, None], tile, 0.0), 0)
        # The grid's ends are small whole numbers: clamped first, every ratio is small enough for
        # HALFWAY, and rounds to the same step.
        ratio = tl.clamp(tl.div_rn(x, scale), low, high, propagate_nan=tl.PropagateNan.ALL)
        step = (ratio + HALFWAY) - HALFWAY
        tl.store(steps + j * rows + row, step, mask=there)
        after = (column > j) & (column < width)
        first = x - step * scale
        tl.store(terms + j * TERMS * rows + row, first, mask=there)
        kernel = kernels + (j * width + column) * TERMS
        tile += tl.load(kernel, mask=after, other=0.0)[:, None] * first[None, :]
        if TERMS > 1:
            second = x * alpha
            tl.store(terms + (j * TERMS + 1) * rows + row, second, mask=there)
            tile += tl.load(kernel + 1, mask=after, other=0.0)[:, None] * second[None, :]
        if TERMS > 2:
            third = (tl.load(originals + j * rows + row, mask=there, other=0.0) - x) * alpha
            tl.store(terms + (j * TERMS + 2) * rows + row, third, mask=there)
            tile += tl.load(kernel + 2, mask=after, other=0.0)[:, None] * third[None, :]


def sweep_columns(
    w: Tensor,
    kernels: Tensor,
    grids: Sequence[ColumnGrid],
    original: Tensor,
    alpha: float | Tensor,
    steps: Tensor,
    terms: Tensor,
) -> None:
    """What gptq.round_columns does, in one launch, on contiguous float32 tensors; w is left as it
    was."""
    width, rows = w.shape
    one = all(grid is grids[0] for grid in grids)
    scales, lowest, highest = (
        _joined(grids[:1] if one else grids, part) for part in ("scale", "lowest", "highest")
    )
    alphas = alpha.to(w).contiguous() if isinstance(alpha, Tensor) else w.new_full((rows,), alpha)
    tensors = (w, kernels, scales, lowest, highest, original, alphas, steps, terms)
    sizes: dict[str, Any] = {
        "TERMS": terms.shape[1],
        "PER_COLUMN": not one,
        "WIDTH": triton.next_power_of_2(width),
        "ROWS": ROWS,
    }
    with torch.cuda.device_of(w):  # a kernel starts on the current device, wherever its tensors are
        _columns[(triton.cdiv(rows, ROWS),)](
            *tensors, rows, width, **sizes, HALFWAY=HALFWAY, **OPTIONS
        )


def _joined(grids: Sequence[ColumnGrid], part: str) -> Tensor:
    """One part of the grids, [grids, m] in float32."""
    return torch.stack([getattr(grid, part) for grid in grids]).float()
