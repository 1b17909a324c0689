"""Equalization: a scale per input channel of a linear, so that rounding does less harm.

    y = W x = (W diag(s)) (diag(1/s) x)

If the input comes straight from a norm, 1/s goes into the norm's weight and bias, free at run time.
Otherwise the input is multiplied by 1/s before it is rounded (`smoothing` in
marrq/quantizers/activations.py). This costs a pass over the input, so it is done only if
activations are coarse and the gain is large. On a ViT the input is that of fc2: the outputs of GELU
differ between channels by an order of magnitude, and a scale cannot be moved through GELU.

SmoothQuant (arXiv 2211.10438) takes s = max|x|^a / max|W|^(1-a) before norms, AWQ (arXiv
2306.00978) rms(x)^a. Ours has the candidates

    s = rms(x)^a · rms(W)^-b

and takes the one with the least expected error of the outputs, for the bits of inputs and weights
at hand [ours]:

    Σ_j ω_j v_j  +  Σ_ij e_ij² (d_j / s_j² + v_j)

    ω_j   = ‖W_:j s_j‖²
    v_j   = E (q(x_j / s_j) - x_j / s_j)²                  noise of rounding an input
    e_ij² = Δ_i² / 12 + (distance from the grid's range)²  noise of rounding a weight, Δ the scale
    d_j   = 1 / U_jj²                                      pivots of E[x xᵀ], see below

The first sum is the effect of rounding x, with the errors of channels taken as independent. The
second is the effect of a sweep on W diag(s). Compensation moves every weight, so its rounding error
is taken as uniform: Δ² / 12. Of the variance of an input the compensation leaves the part that the
inputs which are swept later do not explain. This part is d_j. Pivots scale as x² does, so one
factorization serves all candidates, and none is swept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from marrq.methods.factor import factorize
from marrq.models.blocks import Block, hooked
from marrq.quantizers.affine import (
    Grid,
    clipped_weight_grids,
    grid_from_range,
)
from marrq.quantizers.chunks import candidate_shares, items_at_once
from marrq.schemes import ActivationSpec, Scheme

CANDIDATES = tuple(product((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5)))
"""Exponents (a, b) of s = rms(x)^a · rms(W)^-b. The first pair changes nothing."""

LEAST_STRENGTH = 1e-3
"""Least rms of a channel that is assumed, as a share of the rms of all channels. A channel that was
nearly dead in the sample must not become strong when it comes alive."""

ESTIMATE_CLIP_FACTORS = (1.0, 0.8, 0.6, 0.45)
"""Clipped ranges of inputs and weights that the estimate tries. The ranges that are used in the end
are searched more finely, afterwards."""

DAMPING = 0.01
"""Damping of E[x xᵀ] for its pivots, as a share of the mean diagonal."""

WORTH_A_PASS = 0.7
"""A scale that is applied at run time must reduce the expected error to less than this share."""


@dataclass(frozen=True)
class Equalized:
    """A scale that was applied.

    scale: s, [n].
    norm: path within the block of the norm that holds 1/s now; None if the input is multiplied at
        run time.
    """

    scale: Tensor
    norm: str | None

    @property
    def smoothing(self) -> Tensor | None:
        """1/s, [n], by which the input is multiplied at run time; None if a norm holds it."""
        return 1 / self.scale if self.norm is None else None


def equalize(
    block: Block, group: Sequence[str], norm: str | None, sample: Tensor, scheme: Scheme
) -> Equalized | None:
    """Fold s into the weights of a group of linears, in place, and 1/s into the norm before them.

    The block with the returned `smoothing` computes what it did before. Returns None, and changes
    nothing, if no scale is worth it.

    norm: see find_norm; None if no norm can hold 1/s.
    sample: of the group's input, [tokens, n].
    """
    # The linears of a group read one input, so they share one s: stacked weights are [Σ m, n].
    linears = [block.linear(name) for name in group]
    scale, left = choose_scale(sample, torch.cat([linear.weight for linear in linears]), scheme)
    # `not <` and not `>=`: NaN counts as no gain.
    if not left < (1 if norm is not None else WORTH_A_PASS):
        return None
    if norm is not None:
        # n(x) ⊙ w + b becomes n(x) ⊙ (w / s) + b / s.
        module = block.module.get_submodule(norm)
        for parameter in (module.weight, getattr(module, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.data = parameter.data / scale
    for linear in linears:
        linear.weight.data = linear.weight.data * scale  # W diag(s)
    return Equalized(scale, norm)


def find_norm(block: Block, group: Sequence[str], tokens: Tensor) -> str | None:
    """The path of the affine norm whose output the linears of a group read, and nothing else.

    Returns None if there is no such norm. tokens: an input of the block, for a trial.
    """
    outputs: dict[str, Tensor] = {}  # of each norm
    readers: dict[str, list[str]] = {}  # of each norm's output: modules without children

    def leave(path: str) -> Any:
        return lambda module, arguments, output: outputs.update({path: output})

    def enter(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for norm, output in outputs.items():
                # Identity, not equality: after a reshape or a copy the tensor may have other users.
                if arguments and arguments[0] is output:
                    readers.setdefault(norm, []).append(path)

        return hook

    # In a trial forward the norms leave their outputs, and every module that computes something
    # tells whose output it was given.
    named = dict(block.module.named_modules())
    norms = {path: module for path, module in named.items() if _is_affine_norm(module)}
    leaves = {path: module for path, module in named.items() if not list(module.children())}
    handles = [module.register_forward_hook(leave(path)) for path, module in norms.items()]
    handles += [module.register_forward_pre_hook(enter(path)) for path, module in leaves.items()]
    with hooked(handles):
        block(tokens)
    # All readers must be in the group: another reader would see its input divided by s.
    return next(
        (
            norm
            for norm, found in readers.items()
            if sorted(found) == sorted(group) and _reads_alone(block, norm, group, tokens)
        ),
        None,
    )


def _reads_alone(block: Block, norm: str, group: Sequence[str], tokens: Tensor) -> bool:
    """Whether nothing but the linears of the group reads the norm's output.

    A block may also reshape it, or add it to something. So it is multiplied by powers of two and
    the linears' inputs are divided by them, which is exact: then the block's output stays the same,
    bit for bit, if nothing else reads it.
    """

    def scaled(x: Tensor, up: float) -> Tensor:
        # Channels in turn, so that a reader that normalizes notices it too.
        channels = torch.arange(x.shape[-1], device=x.device)
        return x * torch.where(channels % 2 == 0, up, 1.0).to(x)

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return scaled(output, 2.0)

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (scaled(arguments[0], 0.5),)

    expected = block(tokens)
    handles = [block.module.get_submodule(norm).register_forward_hook(leave)]
    handles += [block.linear(name).register_forward_pre_hook(enter) for name in group]
    with hooked(handles):
        return torch.equal(block(tokens), expected)


def choose_scale(sample: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, float]:
    """The candidate s, [n], with the least expected error.

    Also returns this error as a share of the error without a scale. sample: of the input,
    [tokens, n]; weight: of all linears of the group, stacked, [m, n].
    """
    # s = rms(x)^a · rms(W)^-b
    of_inputs, of_weights = _strengths(sample), _strengths(weight)
    candidates = [of_inputs**a * of_weights**-b for a, b in CANDIDATES]
    # Only ratios between channels matter: the geometric mean of s becomes 1.
    candidates = [scale / scale.log().mean().exp() for scale in candidates]
    # x / s and W diag(s) are what is rounded; d scales as x², so it becomes d / s².
    pivots = pivots_of(sample)
    errors = torch.stack(
        [
            expected_error(sample / scale, weight * scale, pivots / scale.square(), scheme)
            for scale in candidates
        ]
    )
    # errors[0] is that of s = 1, the first candidate.
    best = errors.argmin()[None]
    scale = torch.stack(candidates).index_select(0, best)[0]
    # The one number that the host waits for: whether to scale at all is decided by it.
    return scale, float(errors.index_select(0, best) / errors[0])


def _strengths(values: Tensor) -> Tensor:
    """The rms of each column, [n], but never less than LEAST_STRENGTH allows."""
    # In a sample of zeros `least` is 0 too; `tiny` keeps rms^-b finite.
    squares = values.square().mean(0)
    least = LEAST_STRENGTH * squares.mean().sqrt()
    return squares.sqrt().clamp(min=torch.finfo(values.dtype).tiny).maximum(least)


def pivots_of(x: Tensor) -> Tensor:
    """d, [n]: the variance of each input given the inputs that a sweep comes to after it.

    0 for a dead input. x: [tokens, n].
    """
    # E[x xᵀ] damped = (Uᵀ U)⁻¹, strongest input first, as a sweep with act order goes.
    factor = factorize((x.T @ x).double() / len(x), DAMPING, act_order=True)
    # U is in the order of the sweep; d goes back to the order of the channels.
    pivots = torch.empty_like(factor.upper[0])
    pivots[factor.order] = factor.upper.diagonal() ** -2
    return pivots.to(x) * (x.abs().amax(0) > 0)


def expected_error(x: Tensor, weight: Tensor, pivots: Tensor, scheme: Scheme) -> Tensor:
    """The expected squared error of the outputs per token: [].

    x [tokens, n], weight [m, n] and pivots [n] are scaled by s already.
    """
    # Float activations are not rounded: v = 0.
    noise = (
        torch.zeros_like(pivots)
        if scheme.activation is None
        else _rounding_noise(x, weight, scheme.activation)
    )  # v: [n]
    # Σ_j e_ij² (d_j / s_j² + v_j) for every clip factor and row: [factors, m]. Each row takes its
    # best factor, as the search of the real grid does.
    count = items_at_once(len(weight), weight[:1], weight.device)
    of_rows = [
        sweep_noise(part, clipped_weight_grids(part, scheme.weight, ESTIMATE_CLIP_FACTORS))
        .matmul(pivots + noise)
        .amin(0)
        for part in weight.split(count)
    ]
    # Σ_j ω_j v_j + Σ_i min over the factors
    return (weight.square().sum(0) * noise).sum() + torch.cat(of_rows).sum()


def sweep_noise(weight: Tensor, grid: Grid) -> Tensor:
    """e², [candidates, m, n]: Δ² / 12, and the squared distance of a weight from the range of its
    grid, for the candidates of a grid, [candidates, m, groups]."""
    # Each group of a row has one scale: [m, groups, size] beside [candidates, m, groups, 1].
    grouped = weight.reshape(len(weight), grid.scale.shape[-1], -1)
    lowest, highest = (end[..., None] for end in grid.ends)
    noise = (grouped - grouped.clamp(lowest, highest)).square_()
    return noise.add_((grid.scale.square() / 12)[..., None]).flatten(2)


def _rounding_noise(x: Tensor, weight: Tensor, spec: ActivationSpec) -> Tensor:
    """v, [n], with the clipped range that changes the outputs the least."""
    # A static grid is estimated from the sample; the real grid will span all calibration tokens.
    minimum, maximum = x.aminmax() if spec.is_static else x.aminmax(dim=1, keepdim=True)
    shares = candidate_shares(ESTIMATE_CLIP_FACTORS, x)
    grids = grid_from_range(minimum * shares, maximum * shares, spec.code_range)
    # The noise of channel j reaches the outputs with ω_j = ‖W_:j‖²; one factor serves all channels.
    # A chunk of tokens with all candidates at a time.
    chunk = items_at_once(len(x), len(shares) * x[:1].nbytes, x.device)
    noises = x.new_zeros(len(shares), x.shape[1])  # [factors, n]
    for start in range(0, len(x), chunk):
        tokens = slice(start, start + chunk)
        noises += grids.of_tokens(tokens).nearest(x[tokens]).sub_(x[tokens]).square_().sum(1)
    noises /= len(x)
    return noises.index_select(0, (noises @ weight.square().sum(0)).argmin()[None])[0]


def _is_affine_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm with a weight per channel.

    Libraries have norm classes of their own, so the module is judged by what it has.
    """
    weight = getattr(module, "weight", None)
    return (
        not list(module.children())
        and "norm" in type(module).__name__.lower()
        and isinstance(weight, Tensor)
        and weight.dim() == 1
    )
