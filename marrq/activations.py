"""Quantization of a linear's input: one grid for the tensor, found in calibration, or one grid per token, found at run time.

The range is searched, not taken as seen: clipping a few outliers buys a finer grid for the rest. Of a range [c · min, c · max] the factor c
is chosen that does least harm to the outputs of the linears that read the input,

    c = argmin ‖(q_c(x) - x) Wᵀ‖²

over a sample of tokens, so that no layer's inputs are kept. min and max are those of the tensor over all calibration tokens, or, with one
grid per token, those of the token at hand: then c alone is found in calibration.
"""

import torch
from torch import Tensor, nn

from marrq.affine import Grid, grid_from_range
from marrq.schemes import ActivationSpec

TOKENS_PER_BATCH = 64
CLIP_FACTORS = tuple(0.95**i for i in range(40))


class ActivationQuantizer(nn.Module):
    """x to the nearest values of its grid, in floating point, as the integer kernel will see them."""

    scale: Tensor
    zero_point: Tensor
    clip: Tensor

    def __init__(self, spec: ActivationSpec, grid: Grid | Tensor) -> None:
        """grid: the static one; for per-token activations the factor c, a scalar, since their grids are found anew for every x."""
        super().__init__()
        self.spec = spec
        if isinstance(grid, Grid):
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)
        else:
            self.register_buffer("clip", grid)

    def grid(self, x: Tensor) -> Grid:
        """The grid for x: static [], or per token [..., 1]."""
        if self.spec.strategy == "per-token":
            return grid_from_range(x.amin(-1, keepdim=True) * self.clip, x.amax(-1, keepdim=True) * self.clip, self.spec.code_range)
        return Grid(self.scale, self.zero_point, *self.spec.code_range)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., n]."""
        return self.grid(x).nearest(x)


class RangeObserver:
    """Sees a linear's input batch by batch; then gives the quantizer for it."""

    def __init__(self) -> None:
        self._minimum: list[Tensor] = []
        self._maximum: list[Tensor] = []
        self._sample: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        """Take the range of a batch and an evenly spaced sample of its tokens. x: [..., n]."""
        tokens = x.reshape(-1, x.shape[-1])
        self._minimum.append(tokens.amin())
        self._maximum.append(tokens.amax())
        rows = torch.linspace(0, len(tokens) - 1, min(TOKENS_PER_BATCH, len(tokens)), device=x.device).long()
        self._sample.append(tokens[rows])

    def quantizer(self, spec: ActivationSpec, weight: Tensor) -> ActivationQuantizer:
        """The quantizer with the least error in the outputs. weight: [m, n], of all linears that read the input."""
        minimum, maximum = torch.stack(self._minimum).amin(), torch.stack(self._maximum).amax()
        sample = torch.cat(self._sample)

        def clipped(factor: float) -> ActivationQuantizer:
            static = spec.strategy == "per-tensor"
            return ActivationQuantizer(
                spec, grid_from_range(minimum * factor, maximum * factor, spec.code_range) if static else minimum.new_tensor(factor)
            )

        quantizers = [clipped(factor) for factor in CLIP_FACTORS]
        errors = torch.stack([((quantizer(sample) - sample) @ weight.T).square().sum() for quantizer in quantizers])
        return quantizers[int(errors.argmin())]
