"""The loop over the blocks of a model: quantize them one after the other; nothing is trained.

Two paths run through the blocks side by side, on the same calibration images in the same order:

    x̃    the full-precision path, through the original blocks
    x    the quantized path, through the blocks as quantized so far

Each turn of the loop has one block on both paths (`BlockPair`) and the tokens that enter it. It
balances the block (balance.py), quantizes the linears group by group (group.py), and computes the
tokens that enter the next block. Only the tokens that enter a block are kept, never the input of a
linear. If a block's input is not the previous block's output, it is recomputed by running the model
up to that block: the model as quantized so far, and an untouched copy of it.

With `rotation` the model is rotated first (marrq/transforms/rotation.py). Rotation and balance
change the weights but not the function, and the changed model is the full-precision one. If the
scheme quantizes patch embedding and head, they are a block before the others and a block after them
(marrq/models/first_last.py).

README.md in this folder has the loop as a picture, and how processes share it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from marrq.distributed import ONE_PROCESS, Processes
from marrq.errors import MarrqError
from marrq.methods.registry import method_named
from marrq.models.blocks import Block, find_blocks
from marrq.models.first_last import with_outer_layers
from marrq.models.load import VisionModel, weights_sha256
from marrq.pipeline.balance import balance
from marrq.pipeline.block_inputs import Store, cut, in_memory, share_of
from marrq.pipeline.collect import BlockPair, Images, Paths, TokenSource
from marrq.pipeline.full_precision import FullPrecisionInputs, FullPrecisionKey
from marrq.pipeline.group import GroupCalibration, quantize_group
from marrq.pipeline.token_weights import token_weights
from marrq.quantized_model import ModuleReport, QuantizationSettings, QuantizedModel
from marrq.schemes import Scheme
from marrq.transforms.rotation import rotate

BlockDone = Callable[[int, int, Sequence[ModuleReport]], None]
"""Called after each block with the number of blocks done, the number of all blocks, and the reports
of the block's linears."""


class Checkpoint(Protocol):
    """Keeps finished blocks, so that a run can go on (marrq/artifact/checkpoint.py)."""

    def restore(self, index: int, block: Block) -> list[ModuleReport] | None:
        """Put the quantized linears of a finished block in their places, and return their reports.
        None if the block is not finished."""
        ...

    def keep(self, index: int, block: Block, reports: list[ModuleReport]) -> None:
        """Keep a finished block."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """How a run is done. The codes depend on none of these but the device.

    device: blocks run and statistics are summed there.
    processes: the processes that quantize this model together, each with the same arguments.
    store: keeps the tokens that enter a block, in memory or in files.
    checkpoint: gives the blocks that an earlier run has finished, and keeps those of this run.
    shared: full-precision tokens that several runs have in common.
    block_done: called after each block.
    """

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
    """Quantize `model` in place: its linears are replaced, and its module is the module of the
    model that is returned.

    images: preprocessed calibration images [samples, channels, height, width], in random order, at
        least two. Each image is read once; some are read again for the weights of tokens, the first
        two for the trial forwards, and all images for each block whose input is not the previous
        block's output.
    Raises MarrqError if there are fewer than two images, if the model has no blocks that can be
        quantized, if groups do not divide the inputs of a linear, if an input or a weight is not
        finite, or if `run.shared` is of other settings.
    """
    if len(images) < 2:
        raise MarrqError(f"calibration needs at least 2 images: got {len(images)}; raise --samples")
    # Before the model is touched: a wrong key must not leave a model half changed.
    if run.shared is not None:
        run.shared.check(FullPrecisionKey.of(model, settings, run.device))
    # The full name of the method, not its alias, goes into the record.
    settings = replace(
        settings, method=replace(settings.method, name=method_named(settings.method.name))
    )
    module = model.module.to(run.device)
    blocks = chain_of(module, images[:2].to(run.device), settings)
    check_groups(blocks, settings.scheme)
    check_widths(blocks, settings.widths)
    batches = cut(len(images), settings.calibration.batch_size)
    own = share_of(batches, run.processes)
    source = TokenSource(module, images, run.device, own, run.store)
    # Before the first block is quantized: from here on the model changes.
    weights = (
        token_weights(source, blocks, model, settings.method, run.processes)
        if settings.method.token_weights
        else {}
    )
    paths = Paths.of(source, blocks, batches, run.processes)
    inputs = paths.start(blocks[0])
    reports: list[ModuleReport] = []
    for index, block in enumerate(blocks):
        # The copy is the full-precision block. It is made when its turn comes, so that one block at
        # a time is in memory twice.
        # Who keeps tokens in files has no memory to spare for outputs of parts.
        keeps = run.store is in_memory
        pair = BlockPair(block, block.copied(), inputs, run.device, run.processes, keeps)
        # A restored block is balanced too: the full-precision path goes through its balanced copy.
        balanced = balance(pair, settings)
        in_block = None if run.checkpoint is None else run.checkpoint.restore(index, block)
        if in_block is None:
            in_block = _quantize_block(pair, settings, balanced, weights)
            if run.checkpoint is not None:
                run.checkpoint.keep(index, block, in_block)
        # The tokens after the last block are the outputs, which nobody reads.
        if index + 1 < len(blocks):
            inputs = paths.after(pair, blocks[index + 1], run.shared)
        reports += in_block
        run.block_done(index + 1, len(blocks), in_block)
    return QuantizedModel(
        module=module,
        source=model.source,
        preprocessing=model.preprocessing,
        labels=model.labels,
        outputs=model.outputs,
        scheme=settings.scheme,
        method=settings.method,
        calibration=settings.calibration,
        reports=tuple(reports),
        widths=settings.widths,
    )


def check_groups(blocks: Sequence[Block], scheme: Scheme) -> None:
    """Raise MarrqError, naming the first linear whose inputs the scheme's groups do not divide."""
    # First and last layers have a scheme of their own, without groups.
    grouped = [block for block in blocks if block.scheme_of(scheme).weight.group_size]
    inputs = {
        block.path_of(name): block.linear(name).in_features
        for block in grouped
        for group in block.groups
        for name in group
    }
    size = scheme.weight.group_size or 1
    for path, count in inputs.items():
        if count % size:
            raise MarrqError(
                f"linear {path} has {count} inputs, which groups of {size} do not divide: choose "
                + _other_groups(scheme, math.gcd(*inputs.values()))
            )


def check_widths(blocks: Sequence[Block], widths: Mapping[str, int]) -> None:
    """Raise MarrqError if the widths of a mixed scheme are not those of the blocks' linears, or if
    linears that share an input differ."""
    if not widths:
        return
    # First and last layers have 8 bits, whatever the blocks have.
    groups = [
        tuple(map(block.path_of, group))
        for block in blocks
        if block.kind == "block"
        for group in block.groups
    ]
    paths = {path for group in groups for path in group}
    for path in sorted(paths ^ widths.keys()):
        what = "has no weight bits" if path in paths else "has weight bits, but is not quantized"
        raise MarrqError(f"linear {path} {what}: give widths that were found for this model")
    for group in groups:
        # One input, one grid of activations, one factorization: a group has one width.
        if len({widths[path] for path in group}) > 1:
            raise MarrqError(
                f"{' and '.join(group)} share an input but not their weight bits: give them one "
                "width"
            )


def _other_groups(scheme: Scheme, common: int) -> str:
    """What to write in place of a scheme's groups.

    common: the greatest common divisor of the inputs of all linears.
    """
    size = scheme.weight.group_size or 1
    if scheme.weight.grid == "mxint":
        return "a scheme without -mxint"
    largest = max(n for n in range(1, min(size, common) + 1) if common % n == 0)
    # A scale for each input would cost more than the codes.
    return f"-g{largest}, or no groups" if largest > 1 else "a scheme without groups"


def chain_of(module: nn.Module, images: Tensor, settings: QuantizationSettings) -> list[Block]:
    """The blocks to quantize, in order of execution, after the rotation if there is one.

    images: two, on the device of the module, for the trial forwards.
    """
    # Before blocks are looked for: the rotation replaces norms, and trial forwards must see the
    # model as it will be quantized.
    if settings.method.rotation is not None:
        rotate(module, images, settings.method.rotation)
    blocks = find_blocks(module, images)
    return with_outer_layers(module, blocks, images) if settings.scheme.outer_layers else blocks


def _quantize_block(
    pair: BlockPair,
    settings: QuantizationSettings,
    balanced: set[str],
    weights: Mapping[str, Tensor],
) -> list[ModuleReport]:
    """Replace the linears of a block, group by group in order of execution.

    balanced: paths of the linears that read balanced inputs.
    weights: of the tokens of an image, by the path in the model of a group's first linear.
    """
    block, processes = pair.quantized, pair.processes
    reports: list[ModuleReport] = []
    for group in block.groups:
        # In order of execution: a group sees the block with all earlier groups quantized.
        # The linears of a group have one width; first and last layers have a scheme of their own.
        first = block.path_of(group[0])
        scheme = block.scheme_of(settings.scheme_of(first))
        method = settings.method_of(scheme)
        # First and last layers have 8 bits, which leave nothing for a low-rank branch.
        if block.kind != "block":
            method = replace(method, lowrank=None)
        calibration = GroupCalibration(pair, group, scheme, method, weights.get(first))
        reports += quantize_group(calibration, balanced=group[0] in balanced)
    # Alone there is nobody to disagree with, and the hash takes time.
    if processes.size > 1:
        processes.check_agreement(weights_sha256(block.module), f"block {block.path!r}")
    return reports
