"""Equalization: a scale per input channel, moved between a linear and the norm before it, so that rounding does less harm.

    y = W LN(x) = (W diag(s)) (diag(1/s) LN(x)),        1/s is folded into the norm's weight and bias: free at run time

AWQ (arXiv 2306.00978) takes s = rms(x)^a, which protects the weights of strong inputs. With one grid per output channel and a sweep that
compensates, that was worse than nothing in nearly every linear we measured; to even out the columns of the weight, s = rms(W)^-b, which
share each row's range, helps, and both together help most where activations are coarse: s = √(rms(x) / rms(W)) is what marrq/balance.py
derives, for channels that cannot be mixed [ours]. So there are candidates, and the least error of the outputs decides, activations
quantized as they will be:

    ‖Q q(x / s) - W x‖²        over a sample of tokens, Q swept with the same tokens

Only linears that read a norm's output directly, and are all that read it, can have it: qkv and fc1 of a pre-norm ViT.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marrq.activations import RangeObserver
from marrq.affine import search_weight_grid
from marrq.blocks import Block, hooked
from marrq.methods.gptq import sweep
from marrq.schemes import Scheme
from marrq.statistics import factorize

CANDIDATES = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.25, 0.25), (0.25, 0.5), (0.5, 0.25), (0.5, 0.5))
"""Exponents (a, b) of s = rms(x)^a · rms(W)^-b; the first leaves all as it is."""
DAMPING = 0.01


def find_norm(block: Block, group: Sequence[str], tokens: Tensor) -> str | None:
    """The path of the affine norm whose output the linears of a group read, if nothing else reads it; else None."""
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
    handles = [module.register_forward_hook(leave(path)) for path, module in named.items() if _is_affine_norm(module)]
    handles += [module.register_forward_pre_hook(enter(path)) for path, module in named.items() if not list(module.children())]
    with hooked(handles):
        block(tokens)
    return next((norm for norm, found in readers.items() if sorted(found) == sorted(group)), None)


def choose_scale(sample: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """s, [n], of the candidates the one with the least error. sample: [tokens, n]; weight: of all linears of the group, [m, n]."""
    strengths = [values.square().mean(0).sqrt().clamp(min=torch.finfo(values.dtype).tiny) for values in (sample, weight)]
    candidates = [strengths[0] ** a * strengths[1] ** -b for a, b in CANDIDATES]
    candidates = [scale / scale.log().mean().exp() for scale in candidates]
    errors = torch.stack([output_error(sample / scale, weight * scale, scheme) for scale in candidates])
    return candidates[int(errors.argmin())]


def fold_scale(block: Block, norm: str, group: Sequence[str], scale: Tensor) -> None:
    """Divide the norm's output by s and multiply the linears' inputs with it: the block computes what it did."""
    module = block.module.get_submodule(norm)
    for parameter in (module.weight, getattr(module, "bias", None)):
        if isinstance(parameter, Tensor):
            parameter.data = parameter.data / scale
    for name in group:
        linear = block.linear(name)
        linear.weight.data = linear.weight.data * scale


def output_error(x: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """‖Q q(x) - W x‖² for inputs and weight that are scaled already."""
    quantized = x
    if scheme.activation is not None:
        observer = RangeObserver()
        observer.observe(x)
        quantized = observer.quantizer(scheme.activation, weight)(x)
    factor = factorize((quantized.T @ quantized).double(), DAMPING, act_order=True)
    grid = search_weight_grid(weight, scheme.weight)
    rounded = grid.spread(weight.shape[1]).dequantize(sweep(weight, grid, factor))
    return (quantized @ rounded.T - x @ weight.T).square().sum()


def _is_affine_norm(module: nn.Module) -> bool:
    """LayerNorm and RMSNorm, by what they have: no children, and a weight with one number per channel."""
    weight = getattr(module, "weight", None)
    return not list(module.children()) and "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
