"""Salient columns: a few columns of a weight with two codes for each weight, after SERQ.

SERQ (arXiv 2603.08185) gives the r most salient input channels S two sets of b-bit codes,
R = q(W_S) and Q = q([W_S - R, W_rest]), and computes y = Q x + R x_S: no factor in floating point,
and no intermediate result to be rounded.

Ours is the form in which both sets are one integer. With Δ and z the scale and the zero point of a
row for b-bit codes, e the bits of a second code, δ = Δ / 2^(e-1), and the code of a column

    of the others    c = 2^(e-1) q                    q: b bits, as without salient columns
    of S             c = 2^e r + s + 2^(e-1)          r, s: b and e bits, the two sets

every weight is (c - 2^(e-1) z) δ. So a column of S has steps 2^(e-1) times as fine, over twice the
range. One product of the same size runs both sets, and S needs no columns of its own, and no
channels that lie side by side.

A second code has as many bits as the first, but 3 beside 4. Then all codes c lie in -64 … 63, in
which no sum of two products saturates (runtime/audit/saturation.py); 4 and 4 bits would fill int8.

Differs from the paper: R has the scale 2 Δ of the row where the paper's has a scale of its own.
The grid that is shared costs no accuracy (marrq/methods/README.md has the comparison), because the
sweep comes to the columns of S last (methods/factor.py).
"""

import torch
from torch import Tensor

SECOND_BITS = {2: 2, 3: 3, 4: 3}
"""e: the bits of a second code, by the bits b of the first. Codes c have b + e bits, at most 7."""

MAX_BITS = max(SECOND_BITS)
"""Wider codes leave no room for second ones."""


def stride(num_bits: int) -> int:
    """2^(e-1): the other columns use each so many-th code c."""
    return int(2 ** (SECOND_BITS[num_bits] - 1))


def joint_range(num_bits: int) -> tuple[int, int]:
    """The smallest and the largest c of a salient column."""
    half = int(2 ** (num_bits + SECOND_BITS[num_bits] - 1))
    return -half, half - 1


def strides(salient: Tensor, num_bits: int, columns: int) -> Tensor:
    """By how many codes c a step of each column counts: 1 for a salient one, [columns] float32."""
    steps = torch.full((columns,), float(stride(num_bits)), device=salient.device)
    return steps.index_fill_(0, salient.long(), 1.0)


def split_codes(codes: Tensor, salient: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """The two sets of codes c [m, n]: int8 [m, n] with q and r, and int8 [m, r] with s.

    salient: [r], indices of columns."""
    c, columns = codes.int(), salient.long()
    # c is a multiple of 2^(e-1) in the other columns.
    first = c.div(stride(num_bits), rounding_mode="floor")
    chosen = c.index_select(1, columns)
    # c = 2^e r + s + 2^(e-1): r is the floor, and s the rest, signed.
    shift = SECOND_BITS[num_bits]
    upper = chosen >> shift
    first.index_copy_(1, columns, upper)
    second = chosen - (upper << shift) - stride(num_bits)
    return first.to(torch.int8), second.to(torch.int8)


def join_codes(first: Tensor, second: Tensor, salient: Tensor, num_bits: int) -> Tensor:
    """The inverse of `split_codes`: int8 [m, n]."""
    columns = salient.long()
    codes = first.int() * stride(num_bits)
    upper = first.int().index_select(1, columns) << SECOND_BITS[num_bits]
    codes.index_copy_(1, columns, upper + second.int() + stride(num_bits))
    return codes.to(torch.int8)
