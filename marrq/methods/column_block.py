"""One block of columns of the sweep: the input and the output of its rounding.

The loop in torch (methods/gptq.py) and the kernel for GPUs (methods/sweep_kernel.py) both take a
ColumnBlock, so that one can stand in for the other.
"""

from dataclasses import dataclass

from torch import Tensor

from marrq.quantizers.column_grid import ColumnGrid


@dataclass(frozen=True)
class ColumnBlock:
    """Columns of a weight that are rounded one after the other.

    A column of the weight is a row of these tensors, so that its m values lie side by side. Steps
    and terms are written, all else is read."""

    # [width, m], compensated for the blocks before; the loop compensates them further, in place.
    columns: Tensor
    # [width, m], the columns of the weight as given: W0 of ResComp's term.
    original: Tensor
    # [width, width, terms]: influences[j, i, t] is by how much term t of column j moves column i.
    influences: Tensor
    # The grids of the columns.
    grids: ColumnGrid
    # The residual strength: one for all rows, or [m], one for each row.
    alpha: float | Tensor
    # Written, [width, m]: codes minus zero points.
    steps: Tensor
    # Written, [width, terms, m]: the factors of the influences, also behind the block.
    terms: Tensor
