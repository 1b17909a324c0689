"""Quantize a model block by block, without back-propagation.

Two streams of tokens run through the blocks side by side: one through the original blocks (x̃), one
through the blocks as quantized so far (x). In each block, group by group of linears that share an
input: find the static activation grid, sum the statistics of both streams batch by batch, let the
method choose the codes, put the quantized linear in place. Only the tokens that enter a block are
kept, never a layer's inputs. Both streams see the same images in the same order; the first half of
the images fills the first half of the statistics, the rest the second. Where a block does not take
what the one before gave, its tokens come from the model as quantized so far, and from an untouched
copy of it. With `rotation` the model is rotated first (marrq/transforms/rotation.py), a block that
is to be balanced before it is quantized (marrq/transforms/value_basis.py); that model is the
full-precision one. Patch embedding and head, where the scheme quantizes them, are a block before
the others and one behind (marrq/models/first_last.py).

Processes may share the work (marrq/processes.py). A checkpoint takes what a block has become: when
a run goes on, the blocks that are done are put in place, and their tokens computed again."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from marrq.distributed import ONE_PROCESS, Processes
from marrq.errors import MarrqError
from marrq.methods.problem import Problem
from marrq.methods.solve import Solution, solve
from marrq.methods.spec import RESIDUAL_STREAM, MethodSpec, method_named
from marrq.methods.statistics import OutputDrift, ResidualStatistics, Units
from marrq.models.blocks import Block, find_blocks, first_input
from marrq.models.first_last import Edge, Stem, with_edges
from marrq.models.load import VisionModel, weights_sha256
from marrq.models.residual_writers import ResidualWriter, find_residual_writer, read_stream
from marrq.pipeline.block_inputs import Batch, BlockInputs, Store, Tokens, cut, in_memory, share_of
from marrq.quantized_model import ModuleReport, QuantizationSettings, QuantizedModel
from marrq.quantizers.activations import ActivationQuantizer, RangeObserver, smoothed
from marrq.quantizers.linear import QuantizedWeight, QuantLinear
from marrq.schemes import Scheme
from marrq.transforms.equalization import Equalized, equalize, find_norm
from marrq.transforms.rotation import rotate
from marrq.transforms.value_basis import balancing, find_value_path, fold_basis

SAMPLED = 4
"""Every how many-th batch equalization and balance take their samples from."""
EQUALIZING_TOKENS = 2048
BALANCE_SEED = 0

OBSERVED = {"per-tensor": 1, "per-token": 2}
"""Every how many-th batch the range of activations is looked for in: a static range must hold for
all, a factor can be had from some."""


class Images(Protocol):
    """Inputs of a model: a tensor, or something that makes one when it is sliced
    (marrq/models/images.py, Pixels)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class FullPrecisionInputs:
    """The tokens that enter each block but the first on the full-precision path: computed by the
    first run, and kept for later ones."""

    def __init__(self) -> None:
        self._behind: list[Tokens] = []

    def behind(self, index: int, compute: Callable[[], Tokens]) -> Tokens:
        """The tokens for the block after block `index`, by batch; blocks come in order."""
        if index == len(self._behind):
            self._behind.append(compute())
        return self._behind[index]


BlockDone = Callable[[int, int, Sequence[ModuleReport]], None]
"""Called after each block with blocks done, blocks in all, and the block's reports."""


class Checkpoint(Protocol):
    """Keeps what blocks have become, so that a run can go on (marrq/artifact/checkpoint.py)."""

    def restore(self, index: int, block: Block) -> list[ModuleReport] | None:
        """Put the quantized linears of a block in place as they were left, and give their reports;
        None where it was not done."""
        ...

    def keep(self, index: int, block: Block, reports: list[ModuleReport]) -> None:
        """Take what a block has become, for good."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """How a run is done. The codes do not depend on any of the options but the device.

    device: where blocks run and statistics are summed.
    processes: the processes that quantize this model together, each with the same arguments.
    store: keeps the tokens that enter a block, in memory or in files.
    checkpoint: gives the blocks that an earlier run has finished, and takes those of this run.
    shared: full-precision tokens that several runs on the same images have in common.
    block_done: called after each block."""

    device: torch.device
    processes: Processes = ONE_PROCESS
    store: Store = in_memory
    checkpoint: Checkpoint | None = None
    shared: FullPrecisionInputs | None = None
    block_done: BlockDone = lambda done, count, reports: None


@torch.no_grad()
def quantize(
    model: VisionModel, images: Images, settings: QuantizationSettings, run: RunOptions
) -> QuantizedModel:
    """Quantize `model` in place: its linears are replaced, and the model given is the one returned.

    images: preprocessed calibration images [samples, channels, height, width], at least two, in
    random order, each read once but for the first two, and once more for each block that does not
    follow from the one before."""
    device, processes, checkpoint, shared = run.device, run.processes, run.checkpoint, run.shared
    scheme, calibration = settings.scheme, settings.calibration
    if len(images) < 2:
        raise MarrqError(f"calibration needs at least 2 images: got {len(images)}; raise --samples")
    method = replace(settings.method, name=method_named(settings.method.name))
    module = model.module.to(device)
    if method.rotation is not None:
        rotate(module, images[:2].to(device), method.rotation)
    blocks = find_blocks(module, images[:2].to(device))
    if scheme.edges:
        blocks = with_edges(module, blocks, images[:2].to(device))
    in_blocks, at_edges = (
        _Run(scheme, method, device, processes),
        _Run(scheme.of_edges, replace(method, lowrank=None), device, processes),
    )
    batches = cut(len(images), calibration.batch_size)
    source = _Source(module, images, device, share_of(batches, processes), run.store)
    original = (
        source
        if all(block.follows for block in blocks[1:])
        else replace(source, module=copy.deepcopy(module))
    )
    start = source.tokens(blocks[0])
    streams = BlockInputs.of(batches, start, start, processes)
    reports: list[ModuleReport] = []
    for index, block in enumerate(blocks):
        untouched, same = block.copied(), at_edges if isinstance(block, Edge) else in_blocks
        balanced = _balance(block, untouched, streams, same)
        in_block = None if checkpoint is None else checkpoint.restore(index, block)
        if in_block is None:
            in_block = [
                report
                for group in block.groups
                for report in _quantize_group(block, untouched, group, streams, same, balanced)
            ]
            if processes.size > 1:
                processes.check_agreement(weights_sha256(block.module), f"block {block.path!r}")
            if checkpoint is not None:
                checkpoint.keep(index, block, in_block)
        if index + 1 < len(blocks):
            following = blocks[index + 1]
            compute = partial(_behind, untouched, following, streams.original, original)
            full_precision = compute() if shared is None else shared.behind(index, compute)
            streams = BlockInputs.of(
                batches,
                full_precision,
                _behind(block, following, streams.quantized, source),
                processes,
            )
        reports += in_block
        run.block_done(index + 1, len(blocks), in_block)
    return QuantizedModel(
        module,
        model.source,
        model.preprocessing,
        model.labels,
        scheme,
        method,
        calibration,
        tuple(reports),
    )


@dataclass(frozen=True)
class _Run:
    """What stays the same through the blocks, or at the edges, of one run."""

    scheme: Scheme
    method: MethodSpec
    device: torch.device
    processes: Processes


@dataclass(frozen=True)
class _Source:
    """A model and the images, from which tokens can be had for any block; batches: of this process;
    keep: where tokens are kept."""

    module: nn.Module
    images: Images
    device: torch.device
    batches: list[Batch]
    keep: Store

    def tokens(self, block: Block) -> Tokens:
        """What enters a block, by batch: tokens, or before the stem the images."""
        images = (self.images[batch.rows] for batch in self.batches)
        if isinstance(block, Stem):
            return self.keep(images)
        return self.keep(
            first_input(self.module, block, pixels.to(self.device)) for pixels in images
        )


def _behind(block: Block, following: Block, tokens: Tokens, source: _Source) -> Tokens:
    """The tokens that enter the following block, by batch: those behind this one, or the
    source's."""
    if not following.follows:
        return source.tokens(following)
    return source.keep(block(batch.to(source.device, non_blocking=True)) for batch in tokens)


def _balance(block: Block, untouched: Block, streams: BlockInputs, run: _Run) -> list[str]:
    """Balance the block on both paths, by the full-precision tokens, so that all methods start from
    the same weights; names of the linears that read what was balanced."""
    if isinstance(block, Edge) or not run.method.balances(run.scheme):
        return []
    first, generator = (
        streams.first_original.to(run.device),
        torch.Generator().manual_seed(BALANCE_SEED),
    )
    found = [
        find_value_path(untouched, group[0], first) for group in block.groups if len(group) == 1
    ]
    value_paths = [value_path for value_path in found if value_path is not None]
    for value_path in value_paths:
        sampled = streams.every(SAMPLED, streams.original)
        inputs = [
            untouched.input_of(value_path.target, tokens.to(run.device)).flatten(0, -2)
            for _, tokens in sampled
        ]
        features = untouched.linear(value_path.target).in_features
        sample = run.processes.gather(torch.cat([first.new_zeros(0, features), *inputs]))
        if not sample.isfinite().all():
            return []  # the statistics will name the layer where that begins
        change = balancing(
            sample, untouched.linear(value_path.target).weight, value_path.width, generator
        )
        fold_basis(untouched, value_path, change)
        fold_basis(block, value_path, change)
    return [value_path.target for value_path in value_paths]


def _quantize_group(
    block: Block,
    untouched: Block,
    group: tuple[str, ...],
    streams: BlockInputs,
    run: _Run,
    balanced: list[str],
) -> list[ModuleReport]:
    """Replace the linears of one group, which share an input, in the block. balanced: names of
    linears whose inputs are so already."""
    equalized = (
        _equalize(block, group, streams, run)
        if run.method.equalize and group[0] not in balanced
        else None
    )
    quantizer = _input_quantizer(block, group, streams, run, equalized)
    halves = _statistics(block, untouched, group, quantizer, streams, run, equalized)
    problem = Problem.of(halves, run.scheme.weight, run.method, run.processes)
    reports = []
    try:
        for name in group:
            linear = block.linear(name)
            solution = solve(linear.weight, problem, run.method)
            report = _report(
                block.path_of(name), linear.weight, solution, problem, equalized is not None
            )
            reports.append(replace(report, edge=isinstance(block, Edge), balanced=name in balanced))
            _replace(block.module, name, _quant_linear(linear, solution, quantizer, run.scheme))
    except MarrqError as error:
        raise MarrqError(f"{block.path_of(group[len(reports)])}: {error}") from error
    return reports


def _equalize(
    block: Block, group: tuple[str, ...], streams: BlockInputs, run: _Run
) -> Equalized | None:
    """Give the linears of a group scales per channel on the quantized path, where that pays. The
    full-precision path stays as it is."""
    norm = find_norm(block, group, streams.first_quantized.to(run.device))
    if norm is None and not run.scheme.has_coarse_activations:
        return None
    sample = _sample(block, group[0], streams, run)
    if not sample.isfinite().all():
        return None  # the statistics will name the layer where that begins
    return equalize(block, group, norm, sample, run.scheme)


def _sample(block: Block, linear: str, streams: BlockInputs, run: _Run) -> Tensor:
    """Evenly spaced tokens of a linear's input on the quantized path, [tokens, n]; of the others no
    more is held than a batch."""
    first = block.input_of(linear, streams.first_quantized.to(run.device)).flatten(0, -2)
    per_image = len(first) // len(streams.first_quantized)
    sampled = [batch for batch in streams.cut if batch.index % SAMPLED == 0]
    starts = dict(
        zip(
            (batch.index for batch in sampled),
            accumulate(map(len, sampled), initial=0),
            strict=False,
        )
    )
    count = per_image * sum(map(len, sampled))
    rows = torch.linspace(0, count - 1, min(EQUALIZING_TOKENS, count), device=first.device).long()
    sample = first.new_zeros(len(rows), first.shape[1])
    for batch, tokens in streams.every(SAMPLED, streams.quantized):
        x = block.input_of(linear, tokens.to(run.device)).flatten(0, -2)
        place = rows - per_image * starts[batch.index]
        sample = torch.where(
            ((place >= 0) & (place < len(x)))[:, None], x[place.clamp(0, len(x) - 1)], sample
        )
    run.processes.all_reduce(
        sample
    )  # each token comes from one process, the others have zeros there
    return sample


def _input_quantizer(
    block: Block,
    group: tuple[str, ...],
    streams: BlockInputs,
    run: _Run,
    equalized: Equalized | None,
) -> ActivationQuantizer | None:
    """The activation quantizer of a group, from the quantized path, on which it will be used."""
    if run.scheme.activation is None:
        return None
    observer = RangeObserver(None if equalized is None else equalized.smoothing, run.processes)
    for _, tokens in streams.every(OBSERVED[run.scheme.activation.strategy], streams.quantized):
        observer.observe(block.input_of(group[0], tokens.to(run.device)))
    return observer.quantizer(
        run.scheme.activation, torch.cat([block.linear(name).weight for name in group])
    )


def _statistics(
    block: Block,
    untouched: Block,
    group: tuple[str, ...],
    quantizer: ActivationQuantizer | None,
    streams: BlockInputs,
    run: _Run,
    equalized: Equalized | None,
) -> tuple[ResidualStatistics, ResidualStatistics]:
    """The sums over the inputs of a group on both paths, scaled alike, for each half of the
    calibration set; for a writer over the stream too, where the method aims at that. All processes
    sum in the units of the first batch, and have the sums of all batches in the end."""
    features = block.linear(group[0]).in_features
    change = quantizer or nn.Identity()
    writer = None
    if run.method.wants == RESIDUAL_STREAM and len(group) == 1:
        writer = find_residual_writer(block, group[0], streams.first_quantized.to(run.device))
    importance = None if writer is None else writer.gain.square()
    halves: list[ResidualStatistics] = []
    for batch, original, quantized in zip(
        streams.batches, streams.original, streams.quantized, strict=True
    ):
        original, quantized = (
            tokens.to(run.device, non_blocking=True) for tokens in (original, quantized)
        )
        if writer is None:
            x = change(block.input_of(group[0], quantized))
            drift = (
                smoothed(
                    untouched.input_of(group[0], original),
                    None if equalized is None else 1 / equalized.scale,
                )
                - x
            )
        else:
            x, drift = _shortfall(block, untouched, writer, change, quantized, original)
        x, drift = x.reshape(-1, features), drift.reshape(-1, drift.shape[-1])
        if not halves:
            own = Units.of(x, drift, len(x) // len(batch) * sum(map(len, streams.cut)))
            units = replace(
                own,
                inputs=run.processes.broadcast(own.inputs),
                drift=run.processes.broadcast(own.drift),
            )
            halves = [
                ResidualStatistics.zeros(features, run.device, importance, units) for _ in range(2)
            ]
        halves[batch.half].add(x, drift)
    first, second = (half.pooled_(run.processes) for half in halves)
    return first, second


def _shortfall(
    block: Block,
    untouched: Block,
    writer: ResidualWriter,
    change: nn.Module,
    quantized: Tensor,
    original: Tensor,
) -> tuple[Tensor, Tensor]:
    """The input of a writer on the quantized path, and what the stream behind it falls short of, in
    units of the writer's output."""
    x, stream = read_stream(block, writer, quantized, change)
    _, stream_float = read_stream(untouched, writer, original, nn.Identity())
    return x, torch.where(writer.gain == 0, 0, (stream_float - stream) / writer.gain)


def _report(
    path: str, weight: Tensor, solution: Solution, problem: Problem, equalized: bool
) -> ModuleReport:
    rounding = solution.rounding
    grid = rounding.grid.spread(weight.shape[1])
    lowest, highest = (
        grid.dequantize(torch.full_like(weight, code)) for code in (grid.low, grid.high)
    )
    clipped = ((weight < lowest) | (weight > highest)).float().mean().item()
    statistics = problem.whole.statistics
    mse = solution.error / (statistics.tokens * len(weight))
    return ModuleReport(
        path,
        solution.error,
        solution.relative_error,
        mse,
        rounding.alpha,
        rounding.trajectory,
        solution.damping,
        solution.lowrank_damping,
        clipped,
        rounding.fallback,
        isinstance(statistics.drift, OutputDrift),
        equalized,
    )


def _quant_linear(
    linear: nn.Linear, solution: Solution, quantizer: ActivationQuantizer | None, scheme: Scheme
) -> QuantLinear:
    grid = solution.rounding.grid
    bias = None if linear.bias is None else linear.bias.detach().clone()
    if solution.bias_shift is not None:
        bias = solution.bias_shift if bias is None else bias + solution.bias_shift
    weight = QuantizedWeight.on_grid(scheme.weight, solution.rounding.codes, grid)
    return QuantLinear(weight, bias, quantizer, solution.lowrank)


def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)
