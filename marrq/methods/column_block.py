"""One block of columns of the sweep: what its rounding reads and what it writes.

The loop in torch (methods/gptq.py) and the kernel for GPUs (methods/sweep_kernel.py) both take a
ColumnBlock, so that one can stand in for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from marrq.quantizers.affine import ColumnGrid


@dataclass(frozen=True)
class ColumnBlock:
    """Columns of a weight that are rounded one after the other. A column is a row of these tensors,
    so that its m values lie side by side.

    columns: [width, m], compensated for the blocks before; the loop compensates them further in
    place; original: [width, m], the columns of the weight as given; kernels: [width, width, terms],
    kernels[j, i, t] tells by how much of term t of column j column i moves; grids: of each column;
    alpha: the residual strength, one for all rows or [m], one for each row.
    Written: steps, [width, m], codes minus zero points; terms, [width, terms, m], which multiply
    the kernels."""

    columns: Tensor
    original: Tensor
    kernels: Tensor
    grids: Sequence[ColumnGrid]
    alpha: float | Tensor
    steps: Tensor
    terms: Tensor
