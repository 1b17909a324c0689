"""Quantize one group: the linears of a block that share an input.

    sample          tokens of the input x on the quantized path
    channel scales  s: x / s and W diag(s) lose less by rounding (marrq/transforms/equalization.py)
    grid            of the input, from its range and its effect on the outputs (static per-tensor),
                    or the share of each token's range to clip to (dynamic per-token)
    statistics      H = Σ x xᵀ and the sums of the drift, for both halves of the calibration set
                    (marrq/methods/statistics.py); x is the rounded input
    solve           the method chooses the codes, linear by linear (marrq/methods/solve.py)
    replace         each linear of the block by a QuantLinear

The first four steps read the calibration batches on the block as quantized so far. So the input
that is measured is the input that the linears will get.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.methods.problem import Problem
from marrq.methods.registry import RESIDUAL_STREAM
from marrq.methods.solve import Solution, solve
from marrq.methods.spec import MethodSpec
from marrq.methods.statistics import OutputDrift, ResidualStatistics
from marrq.models.residual_writers import ResidualWriter, find_residual_writer, read_stream
from marrq.pipeline.collect import BatchDrift, BlockPair, sample_inputs, sum_statistics
from marrq.quantized_model import ModuleReport
from marrq.quantizers.activations import ActivationQuantizer, RangeObserver, smoothed
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import QuantizedWeight, QuantLinear
from marrq.schemes import Scheme, WeightSpec
from marrq.transforms.equalization import Equalized, equalize, find_norm

SAMPLE_BATCHES = 4
"""Channel scales and balance sample so many batches at most, evenly spaced."""
EQUALIZATION_TOKENS = 2048
RANGE_BATCHES = {"per-tensor": 16, "per-token": 8}
"""The range of activations is observed in so many: a static range must hold for all tokens, a clip
factor is an average. Further images change neither, and would cost a forward pass each."""


@dataclass(frozen=True)
class GroupCalibration:
    """What calibration does for one group of linears, in the order of the methods.

    pair: the block on both paths.
    linears: paths of the group's linears within the block.
    scheme: bits and grids of these linears.
    weights: of the tokens of an image, [tokens of an image]; None if all tokens count alike.
    """

    pair: BlockPair
    linears: tuple[str, ...]
    scheme: Scheme
    method: MethodSpec
    weights: Tensor | None = None

    def channel_scales(self) -> Equalized | None:
        """Scale the channels of the input and of the weights, in place, on the quantized path. None
        if no scale is worth its cost. The full-precision path stays as it is."""
        block = self.pair.quantized
        # Scales that a norm takes up are free at run time.
        norm = find_norm(block, self.linears, self.pair.first_quantized[:1])
        # Without a norm the scale costs a multiplication at run time: not even tried unless
        # rounding the activations hurts.
        if norm is None and not self.scheme.has_coarse_activations:
            return None
        sample = sample_inputs(self.pair, self.linears[0], SAMPLE_BATCHES, EQUALIZATION_TOKENS)
        # The statistics will raise an error that names the linear.
        if not sample.isfinite().all():
            return None
        scales = equalize(block, self.linears, norm, sample, self.scheme)
        # A norm that has taken up 1/s gives other outputs than those that were kept.
        if scales is not None and scales.norm is not None and self.pair.kept_quantized is not None:
            self.pair.kept_quantized.forget(scales.norm)
        return scales

    def input_quantizer(self, scales: Equalized | None) -> ActivationQuantizer | None:
        """The quantizer of the group's input, None for activations in floating point."""
        activation, block = self.scheme.activation, self.pair.quantized
        if activation is None:
            return None
        # The grid is that of the input as the kernel will see it, after the scaling.
        smoothing = None if scales is None else scales.smoothing
        observer = RangeObserver(smoothing, self.pair.processes)
        most = RANGE_BATCHES[activation.strategy]
        # On the quantized path: the grid has to hold what the quantized model really gives.
        for _, x in self.pair.quantized_inputs(self.linears[0], most):
            observer.observe(x)
        # One grid for all linears of the group: the error of all their outputs decides.
        weights = torch.cat([block.linear(name).weight for name in self.linears])
        return observer.quantizer(activation, weights)

    def statistics(
        self, scales: Equalized | None, quantizer: ActivationQuantizer | None
    ) -> tuple[ResidualStatistics, ResidualStatistics]:
        """The sums over the inputs on both paths, for each half of the calibration set. If the
        method aims at the residual stream, a writer's drift is that of the stream."""
        # A writer's own output is not what counts: errors of earlier writers are in the stream
        # already, and this linear can make up for them.
        writer = self._writer()
        rounding: nn.Module = quantizer or nn.Identity()
        drift: BatchDrift
        if writer is None:
            # The weights hold W diag(s) now, so the full-precision input is divided by s as well.
            inverse = None if scales is None else 1 / scales.scale
            drift = partial(self._input_drift, rounding, inverse)
            importance = None
        else:
            drift = partial(self._stream_drift, rounding, writer)
            # An error of the writer's output enters the stream multiplied by γ.
            importance = writer.gain.square()
        return sum_statistics(self.pair, self.linears[0], drift, importance, self.weights)

    def _writer(self) -> ResidualWriter | None:
        """How the group's only linear writes to the residual stream, if the method asks for it."""
        if self.method.wants != RESIDUAL_STREAM or len(self.linears) > 1:
            return None
        # Linears that share an input are q, k and v or gates: none of them writes alone.
        [linear] = self.linears
        return find_residual_writer(self.pair.quantized, linear, self.pair.first_quantized)

    def _input_drift(
        self, rounding: nn.Module, inverse: Tensor | None, quantized: Tensor, original: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The input x and dx = x̃ - x, [..., n] each, for the tokens of a batch on both paths."""
        # The rounded input, as the kernel has it: the codes then make up for its rounding too.
        x = rounding(self.pair.quantized.input_of(self.linears[0], quantized))
        x_float = smoothed(self.pair.original.input_of(self.linears[0], original), inverse)
        return x, x_float - x

    def _stream_drift(
        self, rounding: nn.Module, writer: ResidualWriter, quantized: Tensor, original: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The input x [..., n], and e = (s̃ - s) / γ [..., m] with s the residual stream after the
        writer: what s lacks, in units of the writer's output. A channel with γ = 0 cannot be
        mended: its e is 0."""
        # The writer runs with its float weight on the rounded input: e has all errors but those of
        # its own codes, which are still to be chosen.
        x, stream = read_stream(self.pair.quantized, writer, quantized, rounding)
        _, stream_float = read_stream(self.pair.original, writer, original, nn.Identity())
        return x, torch.where(writer.gain == 0, 0, (stream_float - stream) / writer.gain)


def quantize_group(calibration: GroupCalibration, balanced: bool) -> list[ModuleReport]:
    """Replace the linears of a group in the block, in place.

    balanced: whether the group's input is in a balanced basis already; then it gets no scales.
    Raises MarrqError with the path of the linear if its input or its weight is not finite.
    """
    pair, method = calibration.pair, calibration.method
    block, weight_spec = pair.quantized, calibration.scheme.weight
    scales = calibration.channel_scales() if method.equalize and not balanced else None
    quantizer = calibration.input_quantizer(scales)
    halves = calibration.statistics(scales, quantizer)
    # One problem for the group: the factorization of H depends on the input alone and serves all of
    # its linears.
    problem = Problem.of(halves, weight_spec, method, pair.processes)
    reports = []
    for name in calibration.linears:
        linear, path = block.linear(name), block.path_of(name)
        try:
            solution = solve(linear.weight, problem, method)
        except MarrqError as error:
            raise MarrqError(f"{path}: {error}") from error
        # The statistics of centred tokens if the bias takes up the mean; J is the error that is
        # left then.
        statistics, rounding = problem.whole.statistics, solution.rounding
        report = ModuleReport(
            path=path,
            num_bits=weight_spec.num_bits,
            error=solution.error,
            relative_error=solution.relative_error,
            mse=solution.error / (statistics.tokens * linear.out_features),
            alpha=rounding.alpha,
            trajectory=rounding.trajectory,
            damping=solution.damping,
            lowrank_damping=solution.lowrank_damping,
            target_damping=solution.target_damping,
            clipped=_clipped_share(solution.rounded, rounding.grid),
            fallback=rounding.fallback,
            writes_stream=isinstance(statistics.drift, OutputDrift),
            equalized=scales is not None,
            is_outer=block.kind != "block",
            balanced=balanced,
            weighted=calibration.weights is not None,
        )
        reports.append(report)
        # From here on the quantized path runs with the codes.
        block.module.set_submodule(name, _quant_linear(linear, solution, quantizer, weight_spec))
    return reports


def _clipped_share(weight: Tensor, grid: Grid) -> float:
    """The share of weights outside the range of their grid, 0 … 1."""
    # The ends of each column in the units of the weight: [n, m] or [1, m] beside [n, m].
    columns = grid.columns(torch.arange(weight.shape[1], device=weight.device))
    lowest, highest = columns.lowest * columns.scale, columns.highest * columns.scale
    by_column = weight.T
    return ((by_column < lowest) | (by_column > highest)).float().mean().item()


def _quant_linear(
    linear: nn.Linear, solution: Solution, quantizer: ActivationQuantizer | None, spec: WeightSpec
) -> QuantLinear:
    """The quantized linear; its bias takes up the mean error of the outputs if the method says
    so."""
    # A copy: the original block shares nothing with the quantized one.
    bias = None if linear.bias is None else linear.bias.detach().clone()
    if solution.bias_shift is not None:
        bias = solution.bias_shift if bias is None else bias + solution.bias_shift
    weight = QuantizedWeight.on_grid(spec, solution.rounding.codes, solution.rounding.grid)
    return QuantLinear(weight, bias, quantizer, solution.lowrank)
