"""Quantize a model block by block, without back-propagation.

Two streams of tokens run through the blocks side by side: one through the original blocks (x̃), one through the blocks as quantized so
far (x). In each block, group by group of linears that share an input: find the static activation grid, sum the statistics of both
streams batch by batch, let the method choose the codes, put the quantized linear in place. Only the tokens that enter a block are kept,
never a layer's inputs. Both streams see the same images in the same order; the first half of the images fills the first half of the
statistics, the rest the second.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marrq.activations import ActivationQuantizer, RangeObserver
from marrq.blocks import Block, find_blocks, first_input
from marrq.errors import MarrqError
from marrq.methods import method_named
from marrq.methods.problem import MethodSpec, Problem, Solution, Step
from marrq.models import ModelSource, VisionModel
from marrq.modules import QuantLinear
from marrq.preprocessing import Preprocessing
from marrq.schemes import Scheme
from marrq.statistics import ResidualStatistics

BATCH_SIZE = 32


@dataclass(frozen=True)
class CalibrationSet:
    """Which images calibrated: enough to draw them again."""

    data: str
    samples: int
    seed: int
    files_sha256: str


@dataclass(frozen=True)
class ModuleReport:
    """How one linear was quantized.

    error: J over the calibration tokens; mse: J / (tokens · outputs); clipped: share of weights outside their grid; seconds: the method's
    time, without the statistics; alpha, trajectory, damping, fallback: see methods/problem.py.
    """

    path: str
    error: float
    mse: float
    alpha: float | None
    trajectory: tuple[Step, ...]
    damping: float
    clipped: float
    fallback: str | None
    seconds: float


@dataclass(frozen=True)
class QuantizedModel:
    """A model with QuantLinear in place of every linear of its blocks, and the record of how it came about.

    module, preprocessing, labels: as in VisionModel; source: the float model it was made from; reports: one a linear.
    """

    module: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationSet
    reports: tuple[ModuleReport, ...]


BlockDone = Callable[[int, int, Sequence[ModuleReport]], None]
"""Called after each block with blocks done, blocks in all, and the block's reports."""


@torch.no_grad()
def quantize(
    model: VisionModel,
    images: Tensor,
    calibration: CalibrationSet,
    scheme: Scheme,
    method: MethodSpec,
    device: torch.device,
    block_done: BlockDone = lambda done, count, reports: None,
) -> QuantizedModel:
    """Quantize `model` in place: its linears are replaced, and the model given is the one returned.

    images: preprocessed calibration images [samples, channels, height, width], at least two, in random order.
    """
    if len(images) < 2:
        raise MarrqError(f"calibration needs at least 2 images: got {len(images)}; raise --samples")
    method_named(method.name)
    module = model.module.to(device)
    blocks = find_blocks(module, images[:2].to(device))
    run = _Run(scheme, method, device)
    streams = _start(module, blocks[0], images, device)
    reports: list[ModuleReport] = []
    for index, block in enumerate(blocks):
        untouched = block.copied()
        in_block = [report for group in block.groups for report in _quantize_group(block, untouched, group, streams, run)]
        streams = streams.advanced(untouched, block, device)
        reports += in_block
        block_done(index + 1, len(blocks), in_block)
    return QuantizedModel(module, model.source, model.preprocessing, model.labels, scheme, method, calibration, tuple(reports))


@dataclass(frozen=True)
class _Run:
    """What stays the same through one run."""

    scheme: Scheme
    method: MethodSpec
    device: torch.device


@dataclass(frozen=True)
class _Streams:
    """The tokens that enter a block on both paths, by batch, on the CPU; halves: the half of the calibration set each batch belongs to."""

    halves: list[int]
    original: list[Tensor]
    quantized: list[Tensor]

    def advanced(self, untouched: Block, block: Block, device: torch.device) -> "_Streams":
        """The tokens after a block."""
        original = [untouched(tokens.to(device)).cpu() for tokens in self.original]
        return _Streams(self.halves, original, [block(tokens.to(device)).cpu() for tokens in self.quantized])


def _start(module: nn.Module, block: Block, images: Tensor, device: torch.device) -> _Streams:
    """Both paths at the first block, where they are one."""
    batches = [(half, batch) for half, part in enumerate(images.tensor_split(2)) for batch in part.split(BATCH_SIZE)]
    tokens = [first_input(module, block, batch.to(device)).cpu() for _, batch in batches]
    return _Streams([half for half, _ in batches], tokens, tokens)


def _quantize_group(block: Block, untouched: Block, group: tuple[str, ...], streams: _Streams, run: _Run) -> list[ModuleReport]:
    """Replace the linears of one group, which share an input, in the block."""
    quantizer = _input_quantizer(block, group[0], streams, run)
    problem = Problem(_statistics(block, untouched, group[0], quantizer, streams, run), run.scheme.weight.code_range, run.method)
    reports = []
    for name in group:
        start = time.perf_counter()
        linear = block.linear(name)
        try:
            solution = method_named(run.method.name)(linear.weight, problem, run.method)
        except MarrqError as error:
            raise MarrqError(f"{block.path}.{name}: {error}") from error
        seconds = time.perf_counter() - start
        reports.append(_report(f"{block.path}.{name}", linear.weight, solution, problem, seconds))
        _replace(block.module, name, _quant_linear(linear, solution, quantizer, run.scheme))
    return reports


def _input_quantizer(block: Block, linear: str, streams: _Streams, run: _Run) -> ActivationQuantizer | None:
    """The activation quantizer of a group; a static grid comes from the quantized path, on which it will be used."""
    spec = run.scheme.activation
    if spec is None:
        return None
    if spec.strategy == "per-token":
        return ActivationQuantizer(spec, None)
    observer = RangeObserver()
    for tokens in streams.quantized:
        observer.observe(block.input_of(linear, tokens.to(run.device)))
    return ActivationQuantizer(spec, observer.grid(spec))


def _statistics(
    block: Block, untouched: Block, linear: str, quantizer: ActivationQuantizer | None, streams: _Streams, run: _Run
) -> tuple[ResidualStatistics, ResidualStatistics]:
    """The sums over the inputs of a linear on both paths, for each half of the calibration set."""
    features = block.linear(linear).in_features
    sums = [ResidualStatistics.zeros(features, run.device) for _ in range(2)]
    for half, original, quantized in zip(streams.halves, streams.original, streams.quantized, strict=True):
        x = block.input_of(linear, quantized.to(run.device))
        x = x if quantizer is None else quantizer(x)
        x_float = untouched.input_of(linear, original.to(run.device))
        sums[half] = sums[half].with_batch(x.reshape(-1, features), x_float.reshape(-1, features))
    return sums[0], sums[1]


def _report(path: str, weight: Tensor, solution: Solution, problem: Problem, seconds: float) -> ModuleReport:
    values = solution.grid.dequantize(torch.tensor([solution.grid.low, solution.grid.high], device=weight.device))  # [m, 2]
    clipped = ((weight < values[:, :1]) | (weight > values[:, 1:])).float().mean().item()
    mse = solution.error / (problem.whole.statistics.tokens * len(weight))
    return ModuleReport(
        path, solution.error, mse, solution.alpha, solution.trajectory, solution.damping, clipped, solution.fallback, seconds
    )


def _quant_linear(linear: nn.Linear, solution: Solution, quantizer: ActivationQuantizer | None, scheme: Scheme) -> QuantLinear:
    grid, bias = solution.grid, linear.bias
    return QuantLinear(
        scheme.weight,
        solution.codes.to(torch.int8),
        grid.scale,
        grid.zero_point.to(torch.int8),
        None if bias is None else bias.detach().clone(),
        quantizer,
    )


def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)
