"""Read the calibration batches: the tokens that enter blocks, and for the linears of a block a
sample of their input, its range, and the sums that a method works from.

No input of a linear is kept. Whoever reads it runs the block again, batch by batch, up to that
linear.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from marrq.distributed import Processes
from marrq.methods.exact_sums import TokenWeights, Units
from marrq.methods.statistics import ResidualStatistics
from marrq.models.blocks import Block
from marrq.pipeline.block_inputs import Batch, BlockInputs, Store, TokenBatches
from marrq.pipeline.copies import on_device
from marrq.pipeline.full_precision import FullPrecisionInputs
from marrq.pipeline.kept_outputs import KeptOutputs


class Images(Protocol):
    """Preprocessed images [images, channels, height, width]: a tensor, or an object that reads
    images when it is sliced (Pixels in marrq/models/images/)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class TokenSource:
    """A model and the calibration images: computes the tokens that enter any block.

    module: the model, on `device`.
    batches: the batches of this process.
    store: keeps the tokens.
    """

    module: nn.Module
    images: Images
    device: torch.device
    batches: list[Batch]
    store: Store

    def entering(self, block: Block) -> TokenBatches:
        """The tokens that enter a block, by running the model up to that block."""
        return self.store(
            block.input_from(self.module, self.images[batch.rows].to(self.device))
            for batch in self.batches
        )

    def after(
        self, block: Block, kept: KeptOutputs | None, following: Block, tokens: TokenBatches
    ) -> TokenBatches:
        """The tokens that enter the following block.

        kept: of `block`; what it holds is used up.
        tokens: what enters `block`. If the following block's input is not this block's output, they
            are not used, and the model is run up to the following block.
        """
        # MobileViT convolves between its transformers: the tokens have to come through the model.
        if not following.follows:
            return self.entering(following)

        def outputs() -> Iterator[Tensor]:
            # The store takes batch by batch, so that one batch at a time is on the device.
            for batch, entering in zip(self.batches, on_device(tokens, self.device), strict=True):
                with _used(kept, batch, None):
                    output = block(entering)
                yield output

        return self.store(outputs())


@dataclass(frozen=True)
class BlockPair:
    """A block on both paths, and the tokens that enter it.

    quantized: the block of the model; its linears are replaced group by group.
    original: the same block in full precision.
    device: where both are.
    keeps: whether outputs of the block's parts are kept in memory. The codes do not depend on it.
    """

    quantized: Block
    original: Block
    inputs: BlockInputs
    device: torch.device
    processes: Processes
    keeps: bool = False

    @cached_property
    def kept_quantized(self) -> KeptOutputs | None:
        """The outputs of parts on the quantized path, None if none are kept."""
        return KeptOutputs(self.quantized, True) if self._can_keep else None

    @cached_property
    def kept_original(self) -> KeptOutputs | None:
        """The same on the full-precision path."""
        return KeptOutputs(self.original, False) if self._can_keep else None

    @property
    def _can_keep(self) -> bool:
        # First and last layers have the whole model for a module.
        return self.keeps and self.quantized.kind == "block"

    @cached_property
    def first_quantized(self) -> Tensor:
        """The tokens of the very first batch on the quantized path, on the device."""
        return self.inputs.first_quantized.to(self.device, non_blocking=True)

    def quantized_inputs(self, linear: str, most: int) -> Iterator[tuple[Batch, Tensor]]:
        """The linear's input x [..., n] on the quantized path, for at most `most` batches of all
        processes."""
        for batch, tokens in self._sampled(most, self.inputs.quantized):
            with _used(self.kept_quantized, batch, linear):
                x = self.quantized.input_of(linear, tokens)
            yield batch, x

    def original_inputs(self, linear: str, most: int) -> Iterator[tuple[Batch, Tensor]]:
        """The linear's input x̃ [..., n] on the full-precision path, for as many batches."""
        # Nothing is kept: the balance reads these inputs and then changes the block.
        for batch, tokens in self._sampled(most, self.inputs.original):
            yield batch, self.original.input_of(linear, tokens)

    def tokens(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Every batch of this process, with its tokens on the quantized and on the full-precision
        path, on the device."""
        quantized, original = (
            on_device(tokens, self.device)
            for tokens in (self.inputs.quantized, self.inputs.original)
        )
        # Strict: a store with fewer batches than this process has would lose images silently.
        return zip(self.inputs.own, quantized, original, strict=True)

    @contextmanager
    def kept(self, batch: Batch, linear: str) -> Iterator[None]:
        """Inside, both paths run on the batch, and parts give what was kept; see KeptOutputs."""
        with _used(self.kept_quantized, batch, linear), _used(self.kept_original, batch, linear):
            yield

    def _sampled(self, most: int, tokens: TokenBatches) -> Iterator[tuple[Batch, Tensor]]:
        """The sampled batches with their tokens on the device."""
        batches = [batch for batch, _ in self.inputs.sampled(most)]
        read = (tokens[place] for _, place in self.inputs.sampled(most))
        return zip(batches, on_device(read, self.device), strict=True)


@dataclass(frozen=True)
class Paths:
    """Both paths through the model, for the tokens that enter block after block.

    quantized: the model as quantized so far.
    original: the model in full precision.
    batches: the batches of all processes.
    """

    quantized: TokenSource
    original: TokenSource
    batches: list[Batch]
    processes: Processes

    @classmethod
    def of(
        cls, source: TokenSource, blocks: list[Block], batches: list[Batch], processes: Processes
    ) -> "Paths":
        """Both paths of a model that is not quantized yet.

        source: the model, whose blocks are `blocks`.
        """
        # A copy of the model takes memory. The full-precision path needs the whole model only if
        # the input of some block has to be computed from the images.
        is_chain = all(block.follows for block in blocks[1:])
        original = source if is_chain else replace(source, module=copy.deepcopy(source.module))
        return cls(source, original, batches, processes)

    def start(self, block: Block) -> BlockInputs:
        """The inputs of the first block, the same on both paths."""
        # Nothing is quantized yet: one list of tokens serves both paths.
        tokens = self.quantized.entering(block)
        return BlockInputs.of(self.batches, tokens, tokens, self.processes)

    def after(
        self, pair: BlockPair, following: Block, shared: FullPrecisionInputs | None
    ) -> BlockInputs:
        """The inputs of the block that follows the pair's.

        shared: has the tokens of the full-precision path, or takes them.
        """

        def compute() -> TokenBatches:
            return self.original.after(
                pair.original, pair.kept_original, following, pair.inputs.original
            )

        # If an earlier run has left the tokens, `compute` is not called.
        original = compute() if shared is None else shared.entering(following, compute)
        quantized = self.quantized.after(
            pair.quantized, pair.kept_quantized, following, pair.inputs.quantized
        )
        return BlockInputs.of(self.batches, original, quantized, self.processes)


def sample_inputs(pair: BlockPair, linear: str, most: int, count: int) -> Tensor:
    """At most `count` tokens of the linear's input on the quantized path, evenly spaced, of at most
    `most` batches: [tokens, n], the same in every process. One batch at a time is in memory."""
    # Only the shape is used: how many tokens this linear sees of an image. It differs from block to
    # block in a Swin.
    first = pair.quantized.input_of(linear, pair.first_quantized[:1]).flatten(0, -2)
    tokens_per_image = len(first)  # [tokens of an image, n]
    sampled = [batch for batch in pair.inputs.batches if batch.is_among(most)]
    # Images of sampled batches before each of them: the token numbering runs over these images.
    images_before = list(accumulate(map(len, sampled), initial=0))
    total = tokens_per_image * images_before.pop()
    start = {
        batch.index: tokens_per_image * images
        for batch, images in zip(sampled, images_before, strict=True)
    }
    # Evenly spaced over all sampled tokens, whichever process has them.
    rows = torch.linspace(0, total - 1, min(count, total), device=first.device).long()
    sample = first.new_zeros(len(rows), first.shape[1])
    for batch, x in pair.quantized_inputs(linear, most):
        x = x.flatten(0, -2)  # [tokens of the batch, n]
        # Positions of the wanted tokens within this batch; tokens of other batches lie outside.
        place = rows - start[batch.index]
        here = (place >= 0) & (place < len(x))
        # `where` and `clamp` instead of a mask: nothing waits for the device.
        sample = torch.where(here[:, None], x[place.clamp(0, len(x) - 1)], sample)
    # Each token comes from one process, the other processes have zeros in its place.
    pair.processes.all_reduce(sample)
    return sample


BatchDrift = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the tokens of a batch on the quantized and on the full-precision path to the linear's input
x [..., n] and the drift: dx [..., n], or e [..., m] (marrq/methods/statistics.py)."""


def sum_statistics(
    pair: BlockPair,
    linear: str,
    drift_of: BatchDrift,
    importance: Tensor | None,
    weights: Tensor | None = None,
) -> tuple[ResidualStatistics, ResidualStatistics]:
    """The sums over all batches of all processes, for each half of the calibration set.

    linear: path of the linear whose inputs are summed.
    drift_of: computes x and the drift of a batch.
    importance: [m] if the drift is e; None if it is dx.
    weights: [tokens of an image] float64 on the CPU; None if all tokens count alike.
    """
    in_features = pair.quantized.linear(linear).in_features
    halves: list[ResidualStatistics] = []
    for batch, quantized, original in pair.tokens():
        with pair.kept(batch, linear):
            x, drift = drift_of(quantized, original)
        # Tokens of all images in a row: sums over them know no images.
        x, drift = x.reshape(-1, in_features), drift.reshape(-1, drift.shape[-1])  # [tokens, ·]
        of_batch = None if weights is None else TokenWeights.of_images(weights, len(batch), x)
        # The first batch gives the units, so both halves are made here.
        if not halves:
            units = _common_units(pair, x, drift, len(x) // len(batch), of_batch)
            halves = [
                ResidualStatistics.zeros(in_features, pair.device, importance, units)
                for _ in range(2)
            ]
        # The two halves judge each other: α is found on one half by the error on the other.
        halves[batch.half].add(x, drift, of_batch)
    # Before this line a process has the sums of its own batches, after it those of all.
    first, second = (half.pooled_(pair.processes) for half in halves)
    return first, second


@contextmanager
def _used(kept: KeptOutputs | None, batch: Batch, reading: str | None) -> Iterator[None]:
    """See KeptOutputs.used; nothing happens without them."""
    if kept is None:
        yield
        return
    with kept.used(batch.index, reading):
        yield


def _common_units(
    pair: BlockPair, x: Tensor, drift: Tensor, tokens_per_image: int, weights: TokenWeights | None
) -> Units:
    """The units that the very first batch gives, in every process: sums add exactly if their units
    are the same.

    x, drift, weights: of this process's first batch, [tokens, n] and [tokens, n or m].
    """
    images = sum(map(len, pair.inputs.batches))
    # The number of tokens in all, about the sum of their weights, bounds how large the sums can
    # become.
    own = Units.of(x, drift, tokens_per_image * images, weights)
    return replace(
        own,
        inputs=pair.processes.broadcast(own.inputs),
        drift=pair.processes.broadcast(own.drift),
    )
