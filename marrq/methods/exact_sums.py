"""Sums over tokens that add exactly, batch by batch.

**Exact sums** [ours, after the pre-rounded sums of Demmel and Nguyen, 10.1109/ARITH.2013.9]. Sums
add over batches, over halves of the calibration set and over processes. What a batch adds is first
rounded to a multiple of a unit so coarse that all sums to come fit into the 53 bits of float64
(`Units`). The unit is far below what float32 products resolve. So no later addition rounds, and
neither the order of batches nor the number of processes leaves a trace.

**Products without means.** The matrix product of a batch runs in the type of the tokens, without
their means; the share of the means is put back in float64. If the mean of an input is a thousand
times its deviation, a float32 product would lose the deviation, which is all that centred sums
keep.

**Weighted sums.** Tokens may have weights w, so that Σ w l rᵀ is summed. A product then gets rows
multiplied by √w, after the means are taken off.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from marrq.quantizers.chunks import items_at_once

UNIT_FLOOR = 1 / 128
"""Smallest size of a channel, as a share of the rms over all channels: a channel that is dead in
the first batch may come alive."""
HEADROOM = 2**8
"""Safety factor over the first batch: either channel of a product may become 16 times stronger
(16 · 16 = 2⁸). Beyond that, float64 rounds as it always does; nothing else is lost."""

GRAM_TILE = 192
"""Columns of a block of a symmetric product on a CPU. Smaller blocks take other kernels, with other
orders of sums."""


@dataclass(frozen=True)
class Units:
    """The multiples to which sums are rounded before they are added.

    With t the number of tokens, rounded up to a power of two, and uᵢ the size of channel i,

        (c + R) - R,     R = ¾ · HEADROOM · t · uᵢ uⱼ

    rounds c in float64 to a multiple of 2⁻⁵³ · HEADROOM · t · uᵢ uⱼ: R is so large that the last
    bit of c + R is that multiple.

    inputs: u of x, [n]; drift: u of dx or e, [n or m]; both powers of two in float64. tokens: t."""

    inputs: Tensor
    drift: Tensor
    tokens: int

    @classmethod
    def of(
        cls, x: Tensor, drift: Tensor, tokens: int, weights: "TokenWeights | None" = None
    ) -> "Units":
        """The units by a first batch.

        x: [batch tokens, n]; drift: dx or e, [batch tokens, n or m]; tokens: how many there will
        be in all batches together, or the sum of their weights; weights: of the batch's tokens."""
        # A power of two of tokens keeps R, like u, free of rounding.
        inputs, drifts = (_sizes(scaled(values, weights)) for values in (x, drift))
        return cls(inputs, drifts, 1 << (tokens - 1).bit_length())

    @property
    def shift(self) -> float:
        """R / uᵢ uⱼ."""
        # ¾ of a power of two: c + R then stays in one binade whether c is positive or negative.
        return 0.75 * HEADROOM * self.tokens

    def round_outer_(self, sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Round sums of products [p, q] in place; left [p], right [q]: the sizes of the factors."""
        # R = shift · uᵢ uⱼ is exact, so that the same R is added and taken off.
        return sums.addr_(left, right, alpha=self.shift).addr_(left, right, alpha=-self.shift)

    def round(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """Sums [p] of tokens, or of their squares, rounded; sizes [p]: of a token or a square."""
        return sums.add(sizes, alpha=self.shift).sub_(sizes, alpha=self.shift)


def _sizes(tokens: Tensor) -> Tensor:
    """The rms of each channel of [tokens, p], rounded up to a power of two; 1 if there is none."""
    # A batch can miss a channel that others have: no size is below a floor.
    squares = tokens.double().square().mean(0)
    rms = torch.maximum(squares, UNIT_FLOOR**2 * squares.mean()).sqrt()
    # Powers of two: multiplying by them rounds nothing, so that uᵢ uⱼ t is exact.
    _, exponent = torch.frexp(rms)
    return torch.where((rms > 0) & rms.isfinite(), torch.ldexp(torch.ones_like(rms), exponent), 1)


class TokenWeights:
    """The weights w of the tokens of a batch.

    values: [tokens, 1] float64, multiples of a power of two, so that their sum is exact.
    roots: √w, [tokens, 1] in the type of the tokens.
    total: Σ w."""

    def __init__(self, values: Tensor, total: float, kind: torch.dtype) -> None:
        """values: [tokens] float64; total: their sum; kind: the type of the tokens."""
        self.values, self.total = values[:, None], total
        self.roots = self.values.sqrt().to(kind)

    @classmethod
    def of_images(cls, weights: Tensor, images: int, x: Tensor) -> "TokenWeights":
        """Of the tokens x [tokens, n] of some images, one image after the other.

        weights: of the tokens of an image, float64 on the CPU."""
        # The sum is taken before the weights go to the device, which nobody waits for.
        total = images * float(weights.sum())
        return cls(weights.repeat(images).to(x.device, non_blocking=True), total, x.dtype)


def scaled(values: Tensor, weights: TokenWeights | None) -> Tensor:
    """Rows of tokens [tokens, p] times √w; the tokens themselves without weights."""
    return values if weights is None else values * weights.roots


class BatchTokens:
    """One factor of the products of a batch, with what each product asks of it.

    values: [tokens, p].
    sizes: the units of its channels, [p] float64.
    weights: of the tokens; None: all are 1.
    """

    def __init__(self, values: Tensor, sizes: Tensor, weights: TokenWeights | None = None) -> None:
        self.values, self.sizes, self.weights = values, sizes, weights

    @property
    def count(self) -> float:
        """The number of tokens, or Σ w."""
        return len(self.values) if self.weights is None else self.weights.total

    @cached_property
    def mean(self) -> Tensor:
        """Of each channel, [p], up to rounding."""
        return self.values.mean(0)

    @cached_property
    def centred(self) -> Tensor:
        """The tokens without the mean, times √w: [tokens, p]."""
        return scaled(self.values - self.mean, self.weights)

    @cached_property
    def sum(self) -> Tensor:
        """Σ w x of each channel, [p] in float64."""
        if self.weights is None:
            return self.values.sum(0, dtype=torch.float64)
        return (self.values * self.weights.values).sum(0)

    @cached_property
    def squares(self) -> Tensor:
        """Σ w x² of each channel, [p] in float64."""
        squares = self.values.double().square()
        return (squares if self.weights is None else squares * self.weights.values).sum(0)


def add_products_(total: Tensor, left: BatchTokens, right: BatchTokens, units: Units) -> None:
    """Add Σ w l rᵀ over the tokens of a batch to `total` [p, q] float64, rounded to units."""
    # [tokens, p]ᵀ × [tokens, q], in the type of the tokens.
    product = _gram(left.centred) if left is right else left.centred.T @ right.centred
    # Σ w (l - a)(r - b)ᵀ = Σ w l rᵀ - a (Σ w r - k b)ᵀ - (Σ w l) bᵀ with k = Σ w, for any a and b:
    # it matters not that a and b are means only up to rounding, and of tokens without weights.
    left_mean, right_mean = left.mean.double(), right.mean.double()
    of_left = torch.stack([left_mean, left.sum], 1)
    of_right = torch.stack([right.sum - right.count * right_mean, right_mean])
    # Five passes over [p, q]: on a CPU some rows at a time, which stay in the cache.
    count = items_at_once(len(total), total[:1], total.device)
    for start in range(0, len(total), count):
        rows = slice(start, start + count)
        part = product[rows].double().addmm_(of_left[rows], of_right)
        total[rows] += units.round_outer_(part, left.sizes[rows], right.sizes)


def _gram(x: Tensor) -> Tensor:
    """xᵀ x, [p, p], for [tokens, p]."""
    size = x.shape[1]
    # A GPU multiplies faster than it is told to.
    if x.device.type != "cpu" or size % GRAM_TILE:
        return x.T @ x
    # The blocks on and above the diagonal; the others are their mirror images.
    product = x.new_empty(size, size)
    for start in range(0, size, GRAM_TILE):
        rows = slice(start, start + GRAM_TILE)
        torch.mm(x.T[rows], x[:, start:], out=product[rows, start:])
        product[start + GRAM_TILE :, rows] = product[rows, start + GRAM_TILE :].T
    return product
