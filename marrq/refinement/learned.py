"""What the refinement learns, and how far it lets a code move. Zero points stay.

    weight scales       s_i · exp(g_i), one g for each output channel, shared by the channel's
                        groups; not if scales are powers of two (mxint)
    clip factors        c · exp(δ) of dynamic activations
    activation scales   s · exp(δ) of static activations; the zero point stays
    smoothing           one factor for each channel, · exp(δ)
    low-rank branches   L and R, each component in units of its root mean square
    codes               c + clamp(round(u), -1, 1), with a u for each code that begins at 0
    vectors             biases, and every floating-point vector of the model: the weights and biases
                        of norms, LayerScale, the bias of a head

A positive number is learned as its logarithm, so that it stays positive; a bias or a vector is
learned as it is, in units of its root mean square. So one learning rate means about the same
relative change everywhere.

A code was decided by a method that saw its linear alone. It moves by one step, and only if the
gradients of many batches agree that it should. A step of Adam is about η g / σ, with the gradient g
and its root mean square σ. So if the gradients of a code are noise, u ends at a normal number with
the standard deviation η √(Σ s²), where s is the share of the learning rate η at each step, and the
code moves if |u| > 1/2. With

    η = 1 / (2 z √(e Σ s²))        e: how often an image is seen

a code moves if its gradients' mean is more than z standard errors from 0, whatever the number of
steps: a test of significance. At z = 3 about 1 of 1,000 codes of a ViT-S moves at W3A3, with the
gain that examples/results/refined.md has; near z = 1 noise moves most of those that move, and the
loss rises.

While a model is refined, `LearnedLinear` stands in place of QuantLinear. The gain is applied to the
outputs. Without learned codes the weight is a constant to autograd, so that neither memory nor time
is spent on its gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marrq.models.blocks import hooked
from marrq.quantizers.activations import ActivationQuantizer, smoothed
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import (
    INT8_LIMIT,
    LowRank,
    QuantizedWeight,
    QuantLinear,
    StoredFactor,
    quantized_linears,
)
from marrq.refinement.straight_through import nearest, whole_step

GAIN_RATE = 2e-3
"""Of weight scales, and of biases and vectors in units of their root mean square."""
RANGE_RATE = 1e-2
"""Of clip factors and static activation scales."""
SMOOTHING_RATE = 5e-3
BRANCH_RATE = 2e-3
"""Of low-rank branches."""
SIGNIFICANCE = 3.0
"""z: the standard errors from 0 at which the gradients of a code move it."""


class LearnedInput(nn.Module):
    """An input's quantizer with what is learned of it. Linears that read one input share it."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.start = quantizer
        device, smoothing = next(quantizer.buffers()).device, quantizer.smoothing
        # Logarithms of factors: 0 is the quantizer as calibration found it, to the last bit.
        self.range = nn.Parameter(torch.zeros((), device=device))
        self.channels = None if smoothing is None else nn.Parameter(torch.zeros_like(smoothing))

    def quantizer(self) -> ActivationQuantizer:
        """The quantizer as learned so far."""
        start, factor = self.start, self.range.exp()
        grid: Grid | Tensor
        if start.spec.is_static:
            grid = Grid(start.scale * factor, start.zero_point, *start.spec.code_range)
        else:
            grid = start.clip * factor
        smoothing = start.smoothing
        if smoothing is not None and self.channels is not None:
            smoothing = smoothing * self.channels.exp()
        return ActivationQuantizer(start.spec, grid, smoothing)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized x, differentiable. x: [..., n]."""
        quantizer = self.quantizer()
        x = smoothed(x, quantizer.smoothing)
        # The range of a token is a constant: no gradient flows through its least and largest value.
        return nearest(quantizer.grid(x.detach()), x)


class LearnedFactor(nn.Module):
    """L or R of a low-rank branch as learned so far.

    stored: the factor as the method found it.
    dim: its dimension that is not the rank.
    """

    size: Tensor

    def __init__(self, stored: StoredFactor, dim: int) -> None:
        super().__init__()
        self.scale, values = stored.scale, stored.values
        size = values.square().mean(dim, keepdim=True).sqrt()
        # Components differ in size, so that one rate suits all only in units of it.
        self.register_buffer("size", torch.where(size > 0, size, torch.ones_like(size)))
        self.share = nn.Parameter(values / self.size)

    def store(self) -> StoredFactor:
        """The nearest factor that the artifact can store. Scales of int8 codes stay."""
        return StoredFactor.rounded((self.share * self.size).detach(), self.scale)

    def forward(self) -> Tensor:
        """The stored values, differentiable: rounding has the derivative 1 here, at the ends of
        int8 codes 0."""
        exact = self.share * self.size
        if self.scale is not None:
            exact = exact.clamp(-INT8_LIMIT * self.scale, INT8_LIMIT * self.scale)
        return exact + (self.store().values - exact).detach()


class LearnedCodes(nn.Module):
    """The codes of a weight, each of which may move by one step.

    start: the weight as the method found it.
    """

    def __init__(self, start: QuantizedWeight) -> None:
        super().__init__()
        self.start = start
        self.shift = nn.Parameter(torch.zeros(start.codes.shape, device=start.codes.device))

    def codes(self) -> Tensor:
        """The codes as moved so far: float32 [out, in], differentiable but at the grid's ends."""
        return self.start.moved(whole_step(self.shift))

    def forward(self) -> Tensor:
        """The dequantized weight [out, in]."""
        return replace(self.start, codes=self.codes()).values


class LearnedLinear(nn.Module):
    """A QuantLinear with what is learned of it.

    linear: the quantized linear, which stays as it is until `store`.
    input: shared with the linears that read the same input; None if the input is not quantized.
    learns_codes: whether codes may move.
    """

    weight: Tensor

    def __init__(self, linear: QuantLinear, input: LearnedInput | None, learns_codes: bool) -> None:
        super().__init__()
        self.linear, self.input = linear, input
        self.codes = LearnedCodes(linear.quantized_weight) if learns_codes else None
        if not learns_codes:
            self.register_buffer("weight", linear.weight)  # [out, in]
        rows = linear.scale.new_zeros(len(linear.scale))
        # A power of two times a gain is no power of two, and mxint stores nothing else.
        self.gain = None if linear.spec.grid == "mxint" else nn.Parameter(rows)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.clone())
        branch = linear.lowrank
        self.left = None if branch is None else LearnedFactor(branch.left, 0)
        self.right = None if branch is None else LearnedFactor(branch.right, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out] of inputs x [..., in]."""
        x = x if self.input is None else self.input(x)
        y = F.linear(x, self.weight if self.codes is None else self.codes())
        if self.gain is not None:
            y = y * self.gain.exp()
        if self.bias is not None:
            y = y + self.bias
        if self.left is None or self.right is None:
            return y
        return y + F.linear(F.linear(x, self.right()), self.left())

    @torch.no_grad()
    def store(self) -> QuantLinear:
        """The quantized linear with the numbers that were learned."""
        linear = self.linear
        if self.codes is not None:
            linear.codes = self.codes.codes().to(torch.int8)
        if self.gain is not None:
            # [out, groups]: all groups of a channel get the channel's gain.
            linear.scale = linear.scale * self.gain.exp()[:, None]
        if self.bias is not None:
            linear.bias = self.bias.detach()
        if self.input is not None:
            linear.input = self.input.quantizer()
        if self.left is not None and self.right is not None:
            linear.lowrank = LowRank(self.left.store(), self.right.store())
        return linear


@dataclass(frozen=True)
class Learned:
    """What is learned of a model.

    module: the model, with a LearnedLinear in place of every QuantLinear.
    linears: these linears, by path.
    vectors: the floating-point vectors of the rest of the model.
    """

    module: nn.Module
    linears: dict[str, LearnedLinear]
    vectors: tuple[nn.Parameter, ...]

    @property
    def inputs(self) -> list[LearnedInput]:
        """The inputs of all linears, each once."""
        found = (linear.input for linear in self.linears.values() if linear.input is not None)
        return list(dict.fromkeys(found))

    def groups(self, rate: float, walk: float) -> list[dict[str, Any]]:
        """Parameters and learning rates, as an optimizer takes them.

        rate: multiplies all rates. walk: √(e Σ s²) of the formula above."""
        gains = [linear.gain for linear in self.linears.values() if linear.gain is not None]
        channels = [one.channels for one in self.inputs if one.channels is not None]
        factors = [module for module in self.module.modules() if isinstance(module, LearnedFactor)]
        moving = [linear.codes for linear in self.linears.values() if linear.codes is not None]
        groups = [
            {"params": gains, "lr": rate * GAIN_RATE},
            {"params": [one.range for one in self.inputs], "lr": rate * RANGE_RATE},
            {"params": channels, "lr": rate * SMOOTHING_RATE},
            {"params": [factor.share for factor in factors], "lr": rate * BRANCH_RATE},
            {"params": [codes.shift for codes in moving], "lr": rate / (2 * SIGNIFICANCE * walk)},
        ]
        biases = [linear.bias for linear in self.linears.values() if linear.bias is not None]
        vectors = (*biases, *self.vectors)
        sizes = [float(vector.detach().square().mean().sqrt()) for vector in vectors]
        # A vector of zeros, such as the biases of norms that `rotate` took away, has no size.
        usual = median([size for size in sizes if size > 0] or [1.0])
        for vector, size in zip(vectors, sizes, strict=True):
            # A step of Adam has the size of its rate, so this one is relative to the vector.
            groups.append({"params": [vector], "lr": rate * GAIN_RATE * (size or usual)})
        return [group for group in groups if group["params"]]

    def store(self) -> None:
        """Put the quantized linears back in their places, with the numbers that were learned."""
        for path, linear in self.linears.items():
            self.module.set_submodule(path, linear.store())
        for vector in self.vectors:
            vector.requires_grad_(False)


def learn(module: nn.Module, image: Tensor, learns_codes: bool) -> Learned:
    """Put a LearnedLinear in place of every QuantLinear of a model.

    image: [1, channels, height, width], for a trial forward that shows who reads which input.
    learns_codes: whether codes may move.
    """
    linears = quantized_linears(module)
    module.requires_grad_(False)
    inputs: dict[str, LearnedInput] = {}
    for paths in _readers(module, linears, image):
        quantizer = linears[paths[0]].input
        if isinstance(quantizer, ActivationQuantizer):
            inputs |= dict.fromkeys(paths, LearnedInput(quantizer))
    learned = {
        path: LearnedLinear(linear, inputs.get(path), learns_codes)
        for path, linear in linears.items()
    }
    for path, linear in learned.items():
        module.set_submodule(path, linear)
    inside = tuple(f"{path}." for path in learned)
    vectors = [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1 and not name.startswith(inside)
    ]
    for vector in vectors:
        vector.requires_grad_()
    return Learned(module, learned, tuple(vectors))


def _readers(
    module: nn.Module, linears: dict[str, QuantLinear], image: Tensor
) -> Iterator[Sequence[str]]:
    """The paths of the linears, those that read the same tensor by the same grid together."""
    # One tensor, not equal ones: after a resumed run, linears that share an input have a quantizer
    # each, and equal clip factors occur by chance too. Linears of several blocks that read one
    # tensor were calibrated block by block, and have grids of their own.
    readers: dict[tuple[int, bytes], list[str]] = {}
    kept: list[Tensor] = []

    def note(path: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            # Kept, so that no later tensor gets the same id.
            kept.append(arguments[0])
            grid = (linears[path].input or nn.Identity()).state_dict()
            numbers = b"".join(values.cpu().numpy().tobytes() for values in grid.values())
            readers.setdefault((id(arguments[0]), numbers), []).append(path)

        return hook

    handles = [linears[path].register_forward_pre_hook(note(path)) for path in linears]
    with hooked(handles), torch.no_grad():
        module(image)
    yield from readers.values()
