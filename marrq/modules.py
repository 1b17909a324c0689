"""The quantized linear, simulated in torch: y = dequantize(codes) · q(x) + bias.

It holds the same integers that the artifact stores and the exported graph contains; only the order of float sums differs from the
integer kernel's.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from marrq.activations import ActivationQuantizer
from marrq.affine import Grid
from marrq.schemes import WeightSpec


class QuantLinear(nn.Module):
    """A linear with integer weight codes.

    codes: int8 [out, in]; scale: float32 [out, 1]; zero_point: int8 [out, 1]; bias: float32 [out] or None; input: quantizes x, or None
    where activations stay in floating point.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    def __init__(
        self, spec: WeightSpec, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, input: ActivationQuantizer | None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", bias)
        self.input = input

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: float32 [out, in]."""
        return Grid(self.scale, self.zero_point, *self.spec.code_range).dequantize(self.codes.to(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] to [..., out]."""
        return F.linear(x if self.input is None else self.input(x), self.weight, self.bias)


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every quantized linear of the model by its module path, in the order of the module tree."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
