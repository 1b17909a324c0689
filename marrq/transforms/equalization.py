"""Equalization: a scale per input channel of a linear, so that rounding does less harm.

    y = W x = (W diag(s)) (diag(1/s) x)

Where the input comes straight from a norm, 1/s goes into the norm's weight and bias: free at run
time. Elsewhere the input is multiplied by 1/s before it is rounded (`smoothing` in
marrq/quantizers/activations.py). That costs a pass over it and is done only where activations are
coarse and it pays. On a ViT that is fc2: what GELU gives differs from channel to channel by an
order of magnitude, and no linear before it could take a scale through GELU.

SmoothQuant (arXiv 2211.10438) takes s = max|x|^a / max|W|^(1-a) before norms, AWQ (arXiv
2306.00978) rms(x)^a. Ours has candidates,

    s = rms(x)^a · rms(W)^-b

and the least error of the outputs that is to be expected decides, the bits of inputs and weights
being what they are:

    Σ_j ω_j v_j  +  Σ_ij e_ij² (d_j / s_j² + v_j)        ω_j = ‖W_:j s_j‖²,   v_j = E (q(x_j / s_j) - x_j / s_j)²

The first term is what rounding x does, the errors of channels taken for independent. The second is
what a sweep does to W diag(s): e² is Δ² / 12, Δ being the step of the grid, as compensation leaves
no weight where it was, and what lies outside of the grid, squared. Of the variance of an input it
leaves what the inputs that are swept after it do not tell: d_j = 1 / U_jj², the pivots of E[x xᵀ].
They scale as x does, so that one factorization serves all candidates and none is swept [ours]."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from marrq.methods.statistics import factorize
from marrq.models.blocks import Block, hooked
from marrq.quantizers.affine import Grid, clipped_weight_grids, grid_from_range
from marrq.schemes import ActivationSpec, Scheme

CANDIDATES = tuple(product((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5)))
"""Exponents (a, b) of s = rms(x)^a · rms(W)^-b; the first leaves all as it is."""
LEAST_STRENGTH = 1e-3
"""Of a channel, as a share of the rms of all: one that the sample hardly knows must not become
strong when it comes alive."""
CLIP_FACTORS = (1.0, 0.8, 0.6, 0.45)
"""Ranges of inputs and of weights that the estimate tries; the ranges that are used are searched
more finely, afterwards."""
DAMPING = 0.01
WORTH_A_PASS = 0.7
"""Share of the error without a scale that must be left at most for one that has to be applied at
run time."""


@dataclass(frozen=True)
class Equalized:
    """s, [n], and the path within the block of the norm that took 1/s in; None where it is applied
    to the input at run time."""

    scale: Tensor
    norm: str | None

    @property
    def smoothing(self) -> Tensor | None:
        """What the input is multiplied by at run time, [n], or None."""
        return 1 / self.scale if self.norm is None else None


def equalize(
    block: Block, group: Sequence[str], norm: str | None, sample: Tensor, scheme: Scheme
) -> Equalized | None:
    """Take s into the weights of a group of linears, and 1/s into the norm before them, if there is
    one: together with the `smoothing` that is left the block computes what it did. None where no
    scale is worth it; then the block is as it was.

    norm: see find_norm; sample: of the group's input, [tokens, n].
    """
    linears = [block.linear(name) for name in group]
    scale, left = choose_scale(sample, torch.cat([linear.weight for linear in linears]), scheme)
    if not left < (1 if norm is not None else WORTH_A_PASS):
        return None
    if norm is not None:
        module = block.module.get_submodule(norm)
        for parameter in (module.weight, getattr(module, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.data = parameter.data / scale
    for linear in linears:
        linear.weight.data = linear.weight.data * scale
    return Equalized(scale, norm)


def find_norm(block: Block, group: Sequence[str], tokens: Tensor) -> str | None:
    """The path of the affine norm whose output the linears of a group read, if nothing else reads
    it; else None."""
    outputs: dict[str, Tensor] = {}
    readers: dict[str, list[str]] = {}

    def leave(path: str) -> Any:
        return lambda module, arguments, output: outputs.update({path: output})

    def enter(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for norm, output in outputs.items():
                if arguments and arguments[0] is output:
                    readers.setdefault(norm, []).append(path)

        return hook

    named = dict(block.module.named_modules())
    handles = [
        module.register_forward_hook(leave(path))
        for path, module in named.items()
        if _is_affine_norm(module)
    ]
    handles += [
        module.register_forward_pre_hook(enter(path))
        for path, module in named.items()
        if not list(module.children())
    ]
    with hooked(handles):
        block(tokens)
    return next((norm for norm, found in readers.items() if sorted(found) == sorted(group)), None)


def choose_scale(sample: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, float]:
    """s, [n], of the candidates the one with the least expected error, and that error as a share of
    the one without a scale. sample: of the input, [tokens, n]; weight: of all linears of the group,
    [m, n]."""
    of_inputs, of_weights = _strengths(sample), _strengths(weight)
    candidates = [of_inputs**a * of_weights**-b for a, b in CANDIDATES]
    candidates = [scale / scale.log().mean().exp() for scale in candidates]
    pivots = pivots_of(sample)
    errors = torch.stack(
        [
            expected_error(sample / scale, weight * scale, pivots / scale.square(), scheme)
            for scale in candidates
        ]
    )
    best = int(errors.argmin())
    return candidates[best], float(errors[best] / errors[0])


def _strengths(values: Tensor) -> Tensor:
    """The rms of each column, [n]."""
    squares = values.square().mean(0)
    least = LEAST_STRENGTH * squares.mean().sqrt()
    return squares.sqrt().clamp(min=torch.finfo(values.dtype).tiny).maximum(least)


def pivots_of(x: Tensor) -> Tensor:
    """d, [n]: the variance of each input given those that a sweep comes to after it; 0 for a dead
    one. x: [tokens, n]."""
    factor = factorize((x.T @ x).double() / len(x), DAMPING, act_order=True)
    pivots = torch.empty_like(factor.upper[0])
    pivots[factor.order] = factor.upper.diagonal() ** -2
    return pivots.to(x) * (x.abs().amax(0) > 0)


def expected_error(x: Tensor, weight: Tensor, pivots: Tensor, scheme: Scheme) -> Tensor:
    """Of the outputs, per token, for inputs, weight and pivots that are scaled already."""
    noise = (
        torch.zeros_like(pivots)
        if scheme.activation is None
        else _rounding_noise(x, weight, scheme.activation)
    )
    grids = (
        grid.spread(weight.shape[1])
        for grid in clipped_weight_grids(weight, scheme.weight, CLIP_FACTORS)
    )
    of_rows = torch.stack([_sweep_noise(weight, grid) @ (pivots + noise) for grid in grids])
    return (weight.square().sum(0) * noise).sum() + of_rows.amin(0).sum()


def _sweep_noise(weight: Tensor, grid: Grid) -> Tensor:
    """e², [m, n]."""
    lowest, highest = (
        grid.dequantize(torch.full_like(weight, code)) for code in (grid.low, grid.high)
    )
    return grid.scale.square() / 12 + (weight - weight.clamp(lowest, highest)).square()


def _rounding_noise(x: Tensor, weight: Tensor, spec: ActivationSpec) -> Tensor:
    """v, [n], with the range clipped as serves the outputs best. A static grid is taken for one of
    the sample."""
    minimum, maximum = x.aminmax() if spec.is_static else x.aminmax(dim=1, keepdim=True)
    grids = [
        grid_from_range(minimum * factor, maximum * factor, spec.code_range)
        for factor in CLIP_FACTORS
    ]
    noises = torch.stack([(grid.nearest(x) - x).square().mean(0) for grid in grids])
    return noises[int((noises @ weight.square().sum(0)).argmin())]


def _is_affine_norm(module: nn.Module) -> bool:
    """LayerNorm and RMSNorm, by what they have: no children, and a weight with one number per
    channel."""
    weight = getattr(module, "weight", None)
    return (
        not list(module.children())
        and "norm" in type(module).__name__.lower()
        and isinstance(weight, Tensor)
        and weight.dim() == 1
    )
