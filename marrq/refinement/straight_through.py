"""Rounding to a grid, with a gradient.

    q(x) = (clamp(round(x / s) + z, low, high) - z) · s = c · s

The derivative of rounding is 0 almost everywhere, so nothing could be learned behind it. The
straight-through estimator takes round(u) for u (arXiv 1308.3432); inside the grid then q(x) = x,
and at its ends q(x) = c · s with a fixed c. So

    ∂q/∂x = 1            inside the grid, else 0
    ∂q/∂s = c - x / s    inside the grid, else c

The second line is that of learned step sizes (LSQ, arXiv 1902.08153): inside, the rounding error in
steps. The zero point z is an integer and gets no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from marrq.quantizers.affine import Grid


class _Nearest(torch.autograd.Function):
    """Grid.nearest with the gradients above. scale: [] or [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, ends: Any) -> Tensor:
        # The codes are those of the simulation, of the artifact and of the ONNX graph.
        codes = Grid(scale, zero_point, *ends).quantize(x).sub_(zero_point)
        ctx.save_for_backward(x, scale, codes)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, codes = ctx.saved_tensors
        steps = x / scale
        # 1 inside, 0 outside: clamping moves x by half a step or more, rounding by less. A mask of
        # numbers, since a product with a mask of bools takes ten times as long on a CPU.
        moved = (codes - steps).abs_()
        inside = torch.le(moved, 0.5, out=moved)
        by_scale = torch.addcmul(codes, steps, inside, value=-1).mul_(gradient)
        # Summed over what shares a scale: a token's channels, or everything.
        summed = by_scale.sum(-1, keepdim=True) if scale.dim() else by_scale.sum()
        return inside.mul_(gradient), summed, None, None


class _WholeStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1).round_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def whole_step(x: Tensor) -> Tensor:
    """The nearest of -1, 0 and 1, with the derivative 1 in x of any shape."""
    found: Tensor = _WholeStep.apply(x)
    return found


def nearest(grid: Grid, x: Tensor) -> Tensor:
    """`grid.nearest(x)`, differentiable in x and in the scale of the grid.

    x: [..., n]. The scale of the grid is [] or [..., 1].
    """
    found: Tensor = _Nearest.apply(x, grid.scale, grid.zero_point, (grid.low, grid.high))
    return found
