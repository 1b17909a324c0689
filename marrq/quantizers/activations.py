"""Quantization of a linear's input: one static grid per tensor, or one dynamic grid per token.

    per-tensor    [min, max] is taken over all calibration tokens; the grid is fixed in calibration
    per-token     [min, max] is taken over the token at hand; the grid is found at run time

A symmetric grid, which is static, spans [-m, m] with m = max |x|, so that its zero point is 0.

The range is clipped to [c · min, c · max]: to lose a few outliers buys a finer grid for the rest.
Calibration chooses the c that changes the outputs of the linears which read x the least,

    c = argmin ‖(q_c(x) - x) Wᵀ‖²

over a sample of tokens, so that no linear's inputs need to be kept. With per-token grids c is the
only thing that calibration finds.

If the channels of x differ much in size and no norm can even them out, x is first multiplied by a
factor per channel, its `smoothing` (marrq/transforms/equalization.py). All ranges and grids above
are then those of the smoothed x.
"""

import torch
from torch import Tensor, nn

from marrq.distributed import ONE_PROCESS, Processes
from marrq.quantizers.affine import Grid, grid_from_range, symmetric_grid
from marrq.quantizers.chunks import candidate_shares, items_at_once
from marrq.schemes import ActivationSpec

TOKENS_PER_BATCH = 64
"""Tokens of each calibration batch in the sample."""

FIRST_TOKENS = 128
"""Tokens of the sample by which the search tells the candidates that cannot win."""

ACTIVATION_CLIP_FACTORS = tuple(0.95**i for i in range(40))
"""Values of c that calibration tries: 1, 0.95, … 0.135."""


class ActivationQuantizer(nn.Module):
    """Smooths x and rounds it to the nearest grid values, in floating point.

    The result holds the values that the integer kernel works with.
    """

    scale: Tensor
    zero_point: Tensor
    clip: Tensor
    smoothing: Tensor | None

    def __init__(
        self, spec: ActivationSpec, grid: Grid | Tensor, smoothing: Tensor | None = None
    ) -> None:
        """Build a quantizer from what calibration found.

        grid: the static grid; for per-token activations the clip factor c, a scalar tensor.
        smoothing: [n], factors of the channels, or None.
        """
        super().__init__()
        self.spec = spec
        self.register_buffer("smoothing", smoothing)
        # The names of the buffers tell a static quantizer from a dynamic one in a state dict.
        if isinstance(grid, Grid):
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point)
        else:
            self.register_buffer("clip", grid)

    def grid(self, x: Tensor) -> Grid:
        """The grid of an x that is smoothed already: scales [] per tensor, [..., 1] per token."""
        if self.spec.is_static:
            return Grid(self.scale, self.zero_point, *self.spec.code_range)
        # Each token has its own range [..., 1]; c is the same for all tokens.
        # Two passes: `aminmax` over one dimension takes seven times as long on a CPU.
        minimum, maximum = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return grid_from_range(minimum * self.clip, maximum * self.clip, self.spec.code_range)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized x. x: [..., n]."""
        # Smoothing comes first: the grid is one for the smoothed channels.
        x = smoothed(x, self.smoothing)
        return self.grid(x).nearest(x)


def smoothed(x: Tensor, smoothing: Tensor | None) -> Tensor:
    """Channels of x [..., n] multiplied by `smoothing` [n]; x itself if `smoothing` is None."""
    return x if smoothing is None else x * smoothing


class Smoothing(nn.Module):
    """What is left of an ActivationQuantizer if activations stay in floating point.

    The weights are those for smoothed channels, so the smoothing stays.
    """

    smoothing: Tensor

    def __init__(self, smoothing: Tensor) -> None:
        """smoothing: [n], factors of the channels."""
        super().__init__()
        self.register_buffer("smoothing", smoothing)

    def forward(self, x: Tensor) -> Tensor:
        """The smoothed x. x: [..., n]."""
        return smoothed(x, self.smoothing)


def _grid(spec: ActivationSpec, minimum: Tensor, maximum: Tensor) -> Grid:
    """The grid of a clipped range."""
    if spec.symmetric:
        return symmetric_grid(torch.maximum(-minimum, maximum), spec.code_range)
    return grid_from_range(minimum, maximum, spec.code_range)


def _output_errors(sample: Tensor, grids: Grid, weight: Tensor) -> Tensor:
    """‖(q_c(x) - x) Wᵀ‖² over a sample [tokens, n] for each candidate c: [candidates]. On a CPU it
    is infinite for a candidate that some tokens have shown to be worse than the best.

    weight: [m, n].
    """
    # ‖E Wᵀ‖² = ⟨E, E Wᵀ W⟩: the smaller product of the two.
    gram = weight.T @ weight if len(weight) > weight.shape[1] else None

    def of_tokens(tokens: slice, grid: Grid) -> Tensor:
        """The errors of some tokens, [candidates, tokens]. Summed in two steps, so that the order
        of addition is fixed: over a token's channels here, over tokens by the caller."""
        x = sample[tokens]
        error = grid.of_tokens(tokens).nearest(x).sub_(x)
        if gram is None:
            return (error @ weight.T).square_().sum(-1)
        return (error @ gram).mul_(error).sum(-1)

    candidates = list(grids.split(1))
    if sample.device.type != "cpu":
        # All at once, as many as memory allows: a GPU has tried them sooner than it answers.
        chunks = grids.split(items_at_once(len(candidates), sample, sample.device))
        return torch.cat([of_tokens(slice(None), chunk).sum(-1) for chunk in chunks])
    # Every token adds to an error. The candidate that is best on the first tokens bounds the least
    # error: whoever exceeds the bound on some of the tokens is out.
    first, rest = slice(0, FIRST_TOKENS), slice(FIRST_TOKENS, None)
    begun = [of_tokens(first, grid) for grid in candidates]
    partial = torch.cat(begun).sum(-1)
    errors = torch.full_like(partial, torch.inf)
    for index in partial.argsort(stable=True).tolist():
        # By a margin far above rounding.
        if float(partial[index]) <= 1.001 * float(errors.amin()):
            behind = of_tokens(rest, candidates[index])
            errors[index] = torch.cat([begun[index], behind], 1).sum()
    return errors


class RangeObserver:
    """Sees a linear's input batch by batch, then gives the quantizer for this input.

    smoothing: see ActivationQuantizer.
    processes: the processes that see consecutive batches each.
    """

    def __init__(self, smoothing: Tensor | None = None, processes: Processes = ONE_PROCESS) -> None:
        self._smoothing, self._processes = smoothing, processes
        self._minimum: list[Tensor] = []
        self._maximum: list[Tensor] = []
        self._sample: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        """Record the range of a batch and an evenly spaced sample of its tokens. x: [..., n]."""
        # [tokens, n]; only two numbers and a few tokens of each batch are kept.
        tokens = smoothed(x, self._smoothing).reshape(-1, x.shape[-1])
        minimum, maximum = tokens.aminmax()
        self._minimum.append(minimum)
        self._maximum.append(maximum)
        # Evenly spaced and not random: the sample holds every part of an image and is the same in
        # every run.
        rows = torch.linspace(
            0, len(tokens) - 1, min(TOKENS_PER_BATCH, len(tokens)), device=x.device
        ).long()
        self._sample.append(tokens[rows])

    def quantizer(self, spec: ActivationSpec, weight: Tensor) -> ActivationQuantizer:
        """The quantizer that changes the outputs of the linears the least.

        weight: [m, n], the weights of all linears that read the input, stacked. They must take the
            smoothed input.
        """
        # The empty tensor lets a process without batches take part in the gathering.
        sample = torch.cat([weight.new_zeros(0, weight.shape[1]), *self._sample])
        sample = self._processes.all_gather(sample)  # [tokens, n], of all processes
        minimum, maximum = self._ranges(spec, sample)
        shares = candidate_shares(ACTIVATION_CLIP_FACTORS, sample)
        # Scales [candidates, 1, 1] for a static grid, else [candidates, tokens, 1].
        grids = _grid(spec, minimum * shares, maximum * shares)
        errors = _output_errors(sample, grids, weight)
        # argmin takes the first of equals, the widest range: nothing is clipped without a gain. An
        # index of one element and not a number: nothing waits for the device.
        best = errors.argmin()[None]
        factor = shares.index_select(0, best).reshape(())
        if not spec.is_static:
            return ActivationQuantizer(spec, factor, self._smoothing)
        scale, zero_point = (
            part.index_select(0, best).reshape(()) for part in (grids.scale, grids.zero_point)
        )
        static = Grid(scale, zero_point, grids.low, grids.high)
        return ActivationQuantizer(spec, static, self._smoothing)

    def _ranges(self, spec: ActivationSpec, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum before clipping: [] for a static grid, else [tokens, 1]."""
        if not spec.is_static:
            # The ranges that the tokens of the sample would get at run time.
            return sample.amin(1, keepdim=True), sample.amax(1, keepdim=True)
        # A static range covers every token that was seen, not the sample alone.
        seen = zip(self._minimum, self._maximum, strict=True)
        own = torch.stack([sample.new_zeros(2), *map(torch.stack, seen)])[1:]  # [batches, 2]
        ranges = self._processes.all_gather(own)
        return ranges[:, 0].amin(), ranges[:, 1].amax()
