"""The quantized linear, simulated in torch: y = dequantize(codes) · q(x) + L (R q(x)) + bias.

It holds the same integers that the artifact stores and the exported graph contains; only the order
of float sums differs from the integer kernel's."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from marrq.quantizers.activations import ActivationQuantizer
from marrq.quantizers.affine import Grid
from marrq.quantizers.packing import packed_size
from marrq.schemes import WeightSpec


@dataclass(frozen=True)
class StoredFactor:
    """L [m, r] or R [r, n] as it is stored. codes: float16 values and no scale, or int8 with
    float32 scales, [1, r] for L, [r, 1] for R."""

    codes: Tensor
    scale: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """What the codes stand for, in float32."""
        return self.codes.float() if self.scale is None else self.codes.float() * self.scale

    @property
    def stored_bits(self) -> int:
        """What codes and scales take."""
        return 8 * sum(
            tensor.numel() * tensor.element_size()
            for tensor in (self.codes, self.scale)
            if tensor is not None
        )


@dataclass(frozen=True)
class LowRank:
    """The branch L R as it is stored."""

    left: StoredFactor
    right: StoredFactor

    @property
    def product(self) -> Tensor:
        """L R of the stored values, [m, n] in float32."""
        return self.left.values @ self.right.values

    @property
    def stored_bits(self) -> int:
        """What L and R take in all."""
        return self.left.stored_bits + self.right.stored_bits


class QuantLinear(nn.Module):
    """A linear with integer weight codes.

    codes: int8 [out, in]; scale: float32 [out, groups]; zero_point: int8 [out, groups]; bias:
    float32 [out] or None; input: quantizes x, or None where activations stay in floating point;
    lowrank: a branch beside the codes, or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    lowrank_left: Tensor | None
    lowrank_right: Tensor | None
    lowrank_left_scale: Tensor | None
    lowrank_right_scale: Tensor | None

    def __init__(
        self,
        spec: WeightSpec,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        input: ActivationQuantizer | None,
        lowrank: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        for side in ("left", "right"):
            factor: StoredFactor | None = getattr(lowrank, side, None)
            self.register_buffer(f"lowrank_{side}", None if factor is None else factor.codes)
            self.register_buffer(f"lowrank_{side}_scale", None if factor is None else factor.scale)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", bias)
        self.input = input

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: float32 [out, in]."""
        grid = Grid(self.scale, self.zero_point, *self.spec.code_range).spread(self.codes.shape[1])
        return grid.dequantize(self.codes.to(self.scale))

    @property
    def lowrank(self) -> LowRank | None:
        """The branch beside the codes, or None."""
        if self.lowrank_left is None or self.lowrank_right is None:
            return None
        return LowRank(
            StoredFactor(self.lowrank_left, self.lowrank_left_scale),
            StoredFactor(self.lowrank_right, self.lowrank_right_scale),
        )

    @property
    def stored_bits(self) -> int:
        """Bits of the weight in the artifact: codes, scales, zero points where they are not all 0,
        the low-rank branch, and the input's smoothing."""
        per_scale = {"asymmetric": 32 + 8, "symmetric": 32, "mxint": 8}[self.spec.grid]
        branch = 0 if self.lowrank is None else self.lowrank.stored_bits
        smoothing = (
            0
            if self.input is None or self.input.smoothing is None
            else 32 * self.input.smoothing.numel()
        )
        return (
            8 * packed_size(self.codes.numel(), self.spec.num_bits)
            + per_scale * self.scale.numel()
            + branch
            + smoothing
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] to [..., out]."""
        x = x if self.input is None else self.input(x)
        y, branch = F.linear(x, self.weight, self.bias), self.lowrank
        return (
            y
            if branch is None
            else y + F.linear(F.linear(x, branch.right.values.to(x)), branch.left.values.to(x))
        )


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every quantized linear of the model by its module path, in the order of the module tree."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)
    }


def bits_per_weight(model: nn.Module) -> float:
    """Bits that the quantized linears' weights take, per weight, everything counted that belongs to
    them (QuantLinear.stored_bits)."""
    linears = quantized_linears(model).values()
    return sum(linear.stored_bits for linear in linears) / sum(
        linear.codes.numel() for linear in linears
    )
