"""Quantization of a linear's input: one grid for the tensor, found in calibration, or one grid per
token, found at run time.

The range is searched, not taken as seen: clipping a few outliers buys a finer grid for the rest. Of
a range [c · min, c · max] the factor c is chosen that does least harm to the outputs of the linears
that read the input,

    c = argmin ‖(q_c(x) - x) Wᵀ‖²

over a sample of tokens, so that no layer's inputs are kept. min and max are

    per-tensor    those of the tensor over all calibration tokens
    per-token     those of the token at hand

and with the latter c alone is found in calibration. Where channels differ much in size and nothing
before the linear can even them out, x is first multiplied by a number per channel, its smoothing
(marrq/transforms/equalization.py), and the grid is one for what comes of that."""

import torch
from torch import Tensor, nn

from marrq.distributed import ONE_PROCESS, Processes
from marrq.quantizers.affine import Grid, grid_from_range
from marrq.schemes import ActivationSpec

TOKENS_PER_BATCH = 64
CLIP_FACTORS = tuple(0.95**i for i in range(40))


class ActivationQuantizer(nn.Module):
    """x, smoothed, to the nearest values of its grid, in floating point, as the integer kernel will
    see them."""

    scale: Tensor
    zero_point: Tensor
    clip: Tensor
    smoothing: Tensor | None

    def __init__(
        self, spec: ActivationSpec, grid: Grid | Tensor, smoothing: Tensor | None = None
    ) -> None:
        """grid: the static one; for dynamic activations the factor c, a scalar, since their grids
        are found anew for every x. smoothing: [n], by which x is multiplied first, or None."""
        super().__init__()
        self.spec = spec
        self.register_buffer("smoothing", smoothing)
        if isinstance(grid, Grid):
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)
        else:
            self.register_buffer("clip", grid)

    def grid(self, x: Tensor) -> Grid:
        """The grid for x, smoothed already: per tensor [], or per token [..., 1]."""
        if self.spec.is_static:
            return Grid(self.scale, self.zero_point, *self.spec.code_range)
        minimum, maximum = x.aminmax(dim=-1, keepdim=True)
        return grid_from_range(minimum * self.clip, maximum * self.clip, self.spec.code_range)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., n]."""
        x = smoothed(x, self.smoothing)
        return self.grid(x).nearest(x)


def smoothed(x: Tensor, smoothing: Tensor | None) -> Tensor:
    """The input with its channels multiplied, where there is something to multiply them by."""
    return x if smoothing is None else x * smoothing


class RangeObserver:
    """Sees a linear's input batch by batch; then gives the quantizer for it. smoothing: see
    ActivationQuantizer; processes: the processes that see consecutive batches each."""

    def __init__(self, smoothing: Tensor | None = None, processes: Processes = ONE_PROCESS) -> None:
        self._smoothing, self._team = smoothing, processes
        self._minimum: list[Tensor] = []
        self._maximum: list[Tensor] = []
        self._sample: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        """Take the range of a batch and an evenly spaced sample of its tokens. x: [..., n]."""
        tokens = smoothed(x, self._smoothing).reshape(-1, x.shape[-1])
        self._minimum.append(tokens.amin())
        self._maximum.append(tokens.amax())
        rows = torch.linspace(
            0, len(tokens) - 1, min(TOKENS_PER_BATCH, len(tokens)), device=x.device
        ).long()
        self._sample.append(tokens[rows])

    def quantizer(self, spec: ActivationSpec, weight: Tensor) -> ActivationQuantizer:
        """The quantizer with the least error in the outputs. weight: [m, n], of all linears that
        read the input, for what smoothing makes of it."""
        sample = self._team.gather(torch.cat([weight.new_zeros(0, weight.shape[1]), *self._sample]))
        minimum, maximum = self._ranges(spec, sample)
        grids = [
            grid_from_range(minimum * factor, maximum * factor, spec.code_range)
            for factor in CLIP_FACTORS
        ]
        errors = torch.stack(
            [((grid.nearest(sample) - sample) @ weight.T).square().sum(1).sum() for grid in grids]
        )
        best = int(errors.argmin())
        return ActivationQuantizer(
            spec,
            grids[best] if spec.is_static else sample.new_tensor(CLIP_FACTORS[best]),
            self._smoothing,
        )

    def _ranges(self, spec: ActivationSpec, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value that the grid of each token of the sample spans: [], or
        [tokens, 1]."""
        if not spec.is_static:
            return sample.amin(1, keepdim=True), sample.amax(1, keepdim=True)
        seen = zip(self._minimum, self._maximum, strict=True)
        ranges = self._team.gather(torch.stack([sample.new_zeros(2), *map(torch.stack, seen)])[1:])
        return ranges[:, 0].amin(), ranges[:, 1].amax()
