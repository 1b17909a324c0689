"""Quantization of a linear's input: one grid for the tensor, found in calibration, or one grid per token, found at run time.

The static range is searched, not taken as seen: clipping a few outliers buys a finer grid for the rest. The search needs the exact
range and a sample of the values, so no layer's inputs are kept.
"""

import torch
from torch import Tensor, nn

from marrq.affine import Grid, per_token_grid, search_tensor_grid
from marrq.schemes import ActivationSpec

SAMPLE_PER_BATCH = 65_536


class RangeObserver:
    """Sees a tensor batch by batch; then gives the static grid for it."""

    def __init__(self) -> None:
        self._minimum: list[Tensor] = []
        self._maximum: list[Tensor] = []
        self._sample: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        """Take the range of a batch and an evenly spaced sample of its values. x: any shape."""
        values = x.reshape(-1)
        self._minimum.append(values.amin())
        self._maximum.append(values.amax())
        # An odd stride: a stride that divides the number of features would see only some of them.
        self._sample.append(values[:: max(1, len(values) // SAMPLE_PER_BATCH) | 1].clone())

    def grid(self, spec: ActivationSpec) -> Grid:
        """The clipped range with the least square error; scale and zero point are scalars."""
        minimum, maximum = torch.stack(self._minimum).amin(), torch.stack(self._maximum).amax()
        return search_tensor_grid(minimum, maximum, torch.cat(self._sample), spec.code_range)


class ActivationQuantizer(nn.Module):
    """x to the nearest values of its grid, in floating point, as the integer kernel will see them."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: ActivationSpec, grid: Grid | None) -> None:
        """grid: the static one; None for per-token activations, whose grids are found anew for every x."""
        super().__init__()
        self.spec = spec
        if grid is not None:
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)

    def grid(self, x: Tensor) -> Grid:
        """The grid for x: static [], or per token [..., 1]."""
        if self.spec.strategy == "per-token":
            return per_token_grid(x, self.spec.code_range)
        return Grid(self.scale, self.zero_point, *self.spec.code_range)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., n]."""
        return self.grid(x).nearest(x)
