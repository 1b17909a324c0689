"""Balance: a change of basis of the values of each attention head, so that rounding does the least
harm [ours].

Attention mixes tokens, not channels. Let V be the values of a head and W the columns of the output
projection that read them. For any invertible T

    W A V = (W T⁻¹) A (T V)

so T is folded into the two linears: exact, and free at run time. QuaRot (arXiv 2404.00456) takes a
rotation for T. A general T does more. Let x be the input of the projection, H = E[x xᵀ] and
K = Wᵀ W, all before the change.

    Rounding T x on one grid for all channels adds noise in proportion to E‖T x‖² = tr(T H Tᵀ).
    W T⁻¹ carries this noise to the outputs in proportion to tr(T⁻ᵀ K T⁻¹).
    Rounding W T⁻¹ does the same with the two parts exchanged.

With P = Tᵀ T the harm is in both cases

    tr(P H) · tr(P⁻¹ K)

which is least at the geometric mean (Cauchy and Schwarz; over all heads at once, so strong heads
are weakened and weak heads strengthened)

    P = H⁻¹ # K = H^-½ (H^½ K H^½)^½ H^-½

The noise was assumed to be the same in all channels. So T = R √P with a random rotation R, which
spreads over the channels of a head what stands out in one of them.

A gated MLP, W (σ(g) ⊙ u), is the same with heads of one channel: T is diagonal, P = √(K / H), and
there is nothing to rotate.

All this is for rounding on fixed grids. A sweep that compensates gains from correlated inputs, and
the new basis removes the correlation. With coarse weights and fine activations it does harm, so it
is then left out.

No family is known by name: a trial forward shows which outputs of which linear are the values, and
how wide a head is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from marrq.distributed import one_thread
from marrq.models.blocks import Block
from marrq.transforms.rotation import random_orthogonal

DAMPING = 0.01
"""Added to H and K of each head, as a share of their mean diagonal. Directions that the sample
hardly knows then stay as they are."""

TRIAL_SEED = 0


@dataclass(frozen=True)
class ValuePath:
    """The way from outputs of one linear to the inputs of another, with channels in groups that do
    not mix.

    source: path within the block of the first linear.
    start: index of the first of its outputs on this way.
    target: path of the linear that reads them, and that nothing else feeds.
    width: channels of a group; for attention the width of a head.
    """

    source: str
    start: int
    target: str
    width: int


def find_value_path(block: Block, target: str, tokens: Tensor) -> ValuePath | None:
    """The value path that leads to a linear of the block, or None if there is none.

    tokens: an input of the block, [images, …]; the first image is used.
    """
    # In float64, so that "the input changes by T" can be told from "almost by T".
    block, tokens = block.in_float64(), tokens[:1].double()
    # The target's inputs unchanged; with T they must be before · Tᵀ. [..., channels]
    channels = block.linear(target).in_features
    before = block.input_of(target, tokens)
    generator = torch.Generator().manual_seed(TRIAL_SEED)

    def follows(source: str, start: int, change: Tensor) -> bool:
        """Whether the inputs of the target change by T if the outputs of the source do."""
        # A nonlinearity, a norm or another linear on the way makes this fail.
        trial = block.copied()
        _change_rows(trial.linear(source), start, change.to(before))
        return torch.allclose(trial.input_of(target, tokens), before @ change.to(before).T)

    for source, start in _candidates(block, target):
        # A diagonal T with distinct entries passes attention whatever the width of a head.
        if not follows(source, start, torch.linspace(0.5, 2, channels).diag()):
            continue
        # Of the widths whose rotations pass too, the largest is the width of a head.
        for width in _divisors(channels):
            rotation = random_orthogonal(width, generator)
            if follows(source, start, torch.block_diag(*[rotation] * (channels // width))):
                return ValuePath(source, start, target, width)
        return ValuePath(source, start, target, 1)
    return None


def balancing_basis(
    inputs: Tensor, weight: Tensor, width: int, generator: torch.Generator
) -> Tensor:
    """T = R √P: float64 [n, n], block-diagonal by groups.

    inputs: a sample of the target's inputs, [tokens, n].
    weight: of the target, [m, n].
    width: channels of a group.
    generator: draws R.
    """
    # T is found for each group alone: the groups do not mix.
    blocks = []
    for x, w in zip(inputs.double().split(width, 1), weight.double().split(width, 1), strict=True):
        # x [tokens, width] and w [m, width] give H = E[x xᵀ] and K = Wᵀ W of one group.
        root = _power(_geometric_mean(_damped(x.T @ x / len(x)), _damped(w.T @ w)), 0.5)  # √P
        # Of all T with Tᵀ T = P the one that spreads an outlier over the group: T = R √P.
        blocks.append(root if width == 1 else random_orthogonal(width, generator).to(root) @ root)
    return cast(Tensor, torch.block_diag(*blocks))


@one_thread()
def fold_basis(block: Block, value_path: ValuePath, change: Tensor) -> None:
    """Fold T into the source and T⁻¹ into the target, in place. The block computes the same.

    change: T, [n, n].
    """
    # The outputs V of the source become T V: both weight and bias change.
    _change_rows(block.linear(value_path.source), value_path.start, change)
    weight = block.linear(value_path.target).weight
    # W T⁻¹ as the solution Y of Tᵀ Yᵀ = Wᵀ, without an explicit inverse.
    weight.data = torch.linalg.solve(change.T, weight.double().T).T.to(weight).contiguous()


def _candidates(block: Block, target: str) -> Iterator[tuple[str, int]]:
    """Linears before the target, with each part of their outputs that is as wide as its input."""
    # In the order of execution; only a linear that runs before the target can feed it.
    names = [name for group in block.groups for name in group]
    channels = block.linear(target).in_features
    for name in names[: names.index(target)]:
        outputs = block.linear(name).out_features
        if outputs % channels == 0:
            # The last part first: in a joined qkv the values come last.
            yield from ((name, start) for start in reversed(range(0, outputs, channels)))


def _divisors(channels: int) -> list[int]:
    """Widths above 1 into which the channels can be divided evenly, the largest first."""
    return [channels // heads for heads in range(1, channels) if channels % heads == 0]


def _change_rows(linear: nn.Linear, start: int, change: Tensor) -> None:
    """W ← T W, bias ← T bias, for the outputs from `start` on, as many as T has rows."""
    # A product in float64, stored in the type of the parameter.
    rows = slice(start, start + len(change))
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            parameter.data[rows] = (change @ parameter.data[rows].to(change)).to(parameter)


def _damped(moment: Tensor) -> Tensor:
    """A second moment [width, width] made invertible. A matrix of zeros becomes the identity."""
    # If all channels are dead, H = 0 has no inverse and every P does as well: take the identity.
    mean = moment.diagonal().mean()
    return moment + torch.where(mean > 0, DAMPING * mean, 1) * torch.eye(len(moment)).to(moment)


def _geometric_mean(inputs: Tensor, weights: Tensor) -> Tensor:
    """H⁻¹ # K = H^-½ (H^½ K H^½)^½ H^-½."""
    # H^-½ from the eigenvalues of H, so no inverse is computed from a rounded root.
    half, inverse = _power(inputs, 0.5), _power(inputs, -0.5)
    return inverse @ _power(half @ weights @ half, 0.5) @ inverse


@one_thread()
def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive definite matrix, from its eigenvalues."""
    # A product of symmetric matrices is symmetric only up to rounding; eigh reads one triangle.
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # Rounding can make a small eigenvalue negative.
    values = values.clamp(min=torch.finfo(values.dtype).tiny)
    return cast(Tensor, (vectors * values**exponent) @ vectors.T)
