"""The grids of single columns of a weight, as the column sweep takes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from marrq.quantizers.salient import joint_range, stride


@dataclass(frozen=True)
class ColumnGrid:
    """The grids of columns of a weight, counted in steps from their zeros.

        steps = code - zero_point,  value = steps · scale

    Steps need half as many operations as codes and give the same integers.

    scale, lowest, highest: [columns, m], or [1, m] if all columns share one grid; `lowest` and
        `highest` are `low` and `high` minus the zero point.
    """

    scale: Tensor
    lowest: Tensor
    highest: Tensor

    @property
    def is_shared(self) -> bool:
        """Whether all columns have one grid."""
        return len(self.scale) == 1

    def __getitem__(self, columns: slice) -> "ColumnGrid":
        """The grids of some columns."""
        if self.is_shared:
            return self
        return ColumnGrid(self.scale[columns], self.lowest[columns], self.highest[columns])

    def each(self, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scale, lowest and highest step of each of `count` columns, [m] each."""
        parts = (self.scale, self.lowest, self.highest)
        # One view serves all columns that share a grid.
        scales, lowest, highest = (
            repeat(part[0], count) if self.is_shared else part.unbind() for part in parts
        )
        return zip(scales, lowest, highest, strict=True)

    def widened(self, wide: Tensor, low: int, num_bits: int) -> "ColumnGrid":
        """The same grids, but for some columns those of two codes for each weight: finer steps over
        twice the range (quantizers/salient.py).

        wide: [columns], whether a column is such a one. low: the smallest of the b-bit codes.
        """
        chosen, steps = wide[:, None], stride(num_bits)
        # Steps of a salient column are c - 2^(e-1) z, for each c of two codes.
        zero_point = (low - self.lowest) * steps
        ends = [end - zero_point for end in joint_range(num_bits)]
        return ColumnGrid(
            torch.where(chosen, self.scale / steps, self.scale),
            torch.where(chosen, ends[0], self.lowest),
            torch.where(chosen, ends[1], self.highest),
        )
