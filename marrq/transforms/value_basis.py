"""Balance the channels between two linears: another basis for the values of each head, in which
rounding does the least harm [ours].

Attention mixes tokens, not channels. So with V the values of a head and W the columns of the output
projection that read it,

    W A V = (W T⁻¹) A (T V)        for any invertible T,        folded into the two linears: exact, and free at run time

QuaRot (arXiv 2404.00456) takes a rotation for T. A general T can do more. With x the input of the
projection in the new basis, rounding x on one grid for all channels adds noise in proportion to
E‖x‖² = tr(T H Tᵀ), which W carries to the outputs as tr(T⁻ᵀ M T⁻¹); H = E[x xᵀ] and M = Wᵀ W before
the change. Rounding W does the same with the parts exchanged. Either way the harm is, with P = Tᵀ
T,

    tr(P H) · tr(P⁻¹ M),        least at the geometric mean        P = H⁻¹ # M = H^-½ (H^½ M H^½)^½ H^-½

(Cauchy and Schwarz; for all heads at once, so that strong heads are weakened and weak ones
strengthened). T = R √P with a random rotation R, which spreads over the channels of a head what
stands out in one: that the noise is the same in all channels was assumed above.

A gated MLP, W (σ(g) ⊙ u), is the same with heads of one channel: T is then diagonal, P = √(M / H),
and there is nothing to rotate.

That is for rounding on fixed grids. A sweep that compensates profits from inputs that are
correlated, which the new basis undoes: where weights are coarse and activations are not, balance
does harm (methods/problem.py, `balances`).

Nothing here knows a family by name: a trial forward must show which outputs of which linear are the
values, and how wide a head is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from marrq.distributed import one_thread
from marrq.models.blocks import Block
from marrq.transforms.rotation import random_orthogonal

DAMPING = 0.01
"""What is added to H and M of each head, as a share of their mean diagonal: directions that the
sample hardly knows stay as they are."""
TRIAL_SEED = 0


@dataclass(frozen=True)
class ValuePath:
    """The way from the outputs of one linear to the inputs of another, on which groups of channels
    stay to themselves.

    source: path within the block of the first linear; start: the first of its outputs on that way;
    target: path of the linear that reads them, and nothing else; width: channels of a group, as
    many as a head has."""

    source: str
    start: int
    target: str
    width: int


def find_value_path(block: Block, target: str, tokens: Tensor) -> ValuePath | None:
    """The way that leads to a linear of the block, or None where there is none. tokens: some that
    enter the block; one image is enough."""
    block, tokens = block.in_float64(), tokens[:1].double()
    channels = block.linear(target).in_features
    before = block.input_of(target, tokens)
    generator = torch.Generator().manual_seed(TRIAL_SEED)

    def follows(source: str, start: int, change: Tensor) -> bool:
        """Whether the target's inputs change by T when the source's outputs do."""
        trial = block.copied()
        _change_rows(trial.linear(source), start, change.to(before))
        return torch.allclose(trial.input_of(target, tokens), before @ change.to(before).T)

    widths = [channels // heads for heads in range(1, channels) if channels % heads == 0]
    for source, start in _candidates(block, target):
        if follows(source, start, torch.linspace(0.5, 2, channels).diag()):
            rotations = (
                (width, [random_orthogonal(width, generator)] * (channels // width))
                for width in widths
            )
            wide = (
                width
                for width, parts in rotations
                if follows(source, start, torch.block_diag(*parts))
            )
            return ValuePath(source, start, target, next(wide, 1))
    return None


def balancing(inputs: Tensor, weight: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """T, block-diagonal by groups: float64 [n, n]. inputs: a sample of the target's, [tokens, n];
    weight: [m, n]; generator: draws R."""
    blocks = []
    for x, w in zip(inputs.double().split(width, 1), weight.double().split(width, 1), strict=True):
        root = _power(_geometric_mean(_damped(x.T @ x / len(x)), _damped(w.T @ w)), 0.5)
        blocks.append(root if width == 1 else random_orthogonal(width, generator).to(root) @ root)
    return cast(Tensor, torch.block_diag(*blocks))


@one_thread()
def fold_basis(block: Block, value_path: ValuePath, change: Tensor) -> None:
    """Take T into the source and T⁻¹ into the target, in place: the block computes what it did."""
    _change_rows(block.linear(value_path.source), value_path.start, change)
    weight = block.linear(value_path.target).weight
    weight.data = torch.linalg.solve(change.T, weight.double().T).T.to(weight).contiguous()


def _candidates(block: Block, target: str) -> Iterator[tuple[str, int]]:
    """Linears before the target, with each part of their outputs that is as wide as its input; the
    last part first: it mostly is V."""
    names, channels = (
        [name for group in block.groups for name in group],
        block.linear(target).in_features,
    )
    for name in names[: names.index(target)]:
        outputs = block.linear(name).out_features
        if outputs % channels == 0:
            yield from ((name, start) for start in reversed(range(0, outputs, channels)))


def _change_rows(linear: nn.Linear, start: int, change: Tensor) -> None:
    """W ← T W, bias ← T bias, for as many outputs as T has."""
    rows = slice(start, start + len(change))
    for parameter in (linear.weight, linear.bias):
        if parameter is not None:
            parameter.data[rows] = (change @ parameter.data[rows].to(change)).to(parameter)


def _damped(moment: Tensor) -> Tensor:
    """A moment matrix that can be inverted; one of zeros becomes the identity."""
    mean = moment.diagonal().mean()
    return moment + torch.where(mean > 0, DAMPING * mean, 1) * torch.eye(len(moment)).to(moment)


def _geometric_mean(inputs: Tensor, weights: Tensor) -> Tensor:
    """H⁻¹ # M."""
    half, inverse = _power(inputs, 0.5), _power(inputs, -0.5)
    return inverse @ _power(half @ weights @ half, 0.5) @ inverse


@one_thread()
def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return cast(
        Tensor, (vectors * values.clamp(min=torch.finfo(values.dtype).tiny) ** exponent) @ vectors.T
    )
