"""Affine grids: choose one, quantize to its codes, dequantize. The only place in marrq that rounds and clamps.

    code = clamp(round(x / scale) + zero_point, low, high)          value = (code - zero_point) · scale

Rounding is half to even and the division is a division, as in ONNX QuantizeLinear, so that torch and ONNX Runtime give the same codes.
Every grid represents 0 exactly. The weight grid is GPTQ's (arXiv 2210.17323, released code): min/max per output channel, then a search
over clipped ranges with the error |q - w|^2.4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CLIP_FACTORS = tuple(1 - i / 100 for i in range(80))
WEIGHT_ERROR_POWER = 2.4


@dataclass(frozen=True)
class Grid:
    """An affine grid of integers `low` … `high`.

    scale, zero_point: floating-point tensors that broadcast against what is quantized: [m, 1] for weights [m, n] (per channel), [] per
    tensor, [..., 1] per token. The zero point holds an integer between `low` and `high`.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of x, in x's floating-point type; NaN stays NaN."""
        return torch.clamp(torch.round(x / self.scale) + self.zero_point, self.low, self.high)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes, in the type of the scale."""
        return (codes - self.zero_point) * self.scale

    def nearest(self, x: Tensor) -> Tensor:
        """The value of the grid that each x is rounded to."""
        return self.dequantize(self.quantize(x))


def grid_from_range(minimum: Tensor, maximum: Tensor, code_range: tuple[int, int]) -> Grid:
    """The grid that spans [min(minimum, 0), max(maximum, 0)]; an empty range gets scale 1."""
    low, high = code_range
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    scale = (maximum - minimum) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.clamp(torch.round(low - minimum / scale), low, high)
    return Grid(scale, zero_point, low, high)


def search_weight_grid(weight: Tensor, code_range: tuple[int, int]) -> Grid:
    """Per output channel the clipped min/max range, out of 80, with the least Σ |q - w|^2.4. weight: [m, n]; scales: [m, 1]."""
    minimum, maximum = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    best = grid_from_range(minimum, maximum, code_range)
    scale, zero_point = best.scale.clone(), best.zero_point.clone()
    least = torch.full_like(scale, torch.inf)
    for factor in CLIP_FACTORS:
        grid = grid_from_range(minimum * factor, maximum * factor, code_range)
        error = (grid.nearest(weight) - weight).abs_().pow_(WEIGHT_ERROR_POWER).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero_point = torch.where(better, grid.scale, scale), torch.where(better, grid.zero_point, zero_point)
    return Grid(scale, zero_point, *code_range)


def search_tensor_grid(minimum: Tensor, maximum: Tensor, sample: Tensor, code_range: tuple[int, int]) -> Grid:
    """The clipped range with the least square error, for a tensor seen only through its range (scalars) and a sample of its values."""

    def error(factor: float) -> float:
        grid = grid_from_range(minimum * factor, maximum * factor, code_range)
        return (grid.nearest(sample) - sample).square().sum().item()

    factor = min(CLIP_FACTORS, key=error)
    return grid_from_range(minimum * factor, maximum * factor, code_range)


def per_token_grid(x: Tensor, code_range: tuple[int, int]) -> Grid:
    """One min/max grid per token, over the last dimension. x: [..., n]; scales: [..., 1]."""
    return grid_from_range(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), code_range)
