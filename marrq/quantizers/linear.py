"""The quantized linear, simulated in torch:

    y = dequantize(codes) · q(x) + L (R q(x)) + bias

It holds the integers that the artifact stores and the exported graph contains. Only the order of
floating-point sums differs from an integer kernel's. L R is an optional low-rank branch
(marrq/methods/lowrank.py). Some columns may have two codes for each weight
(marrq/quantizers/salient.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marrq.quantizers.activations import ActivationQuantizer, Smoothing
from marrq.quantizers.affine import Grid
from marrq.quantizers.packing import packed_size
from marrq.quantizers.salient import SECOND_BITS, joint_range, strides
from marrq.schemes import WeightSpec

# float32 and int8; float32, since all zero points are 0; a power of two as float8_e8m0fnu.
SCALE_BITS = {"asymmetric": 32 + 8, "symmetric": 32, "mxint": 8}
"""Bits of a stored scale with its zero point, by the kind of grid."""

INT8_LIMIT = 127


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers.

    codes: int8 [out, in]. If there are salient columns, the joint codes of quantizers/salient.py.
    scale: float32 [out, groups].
    zero_point: int8 [out, groups].
    salient_columns: int32 [r], ascending, or None.
    """

    spec: WeightSpec
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    salient_columns: Tensor | None = None

    @classmethod
    def on_grid(cls, spec: WeightSpec, codes: Tensor, grid: Grid) -> "QuantizedWeight":
        """A weight from codes and a grid in floating point. codes: [out, in], integers."""
        # A zero point is a code too: both fit int8.
        joint, salient = grid.joint, grid.salient
        columns = None if salient is None else salient.int()
        zero_point = joint.zero_point.to(torch.int8)
        return cls(spec, codes.to(torch.int8), joint.scale, zero_point, columns)

    @property
    def values(self) -> Tensor:
        """The dequantized weight: [out, in], in the type of the scale."""
        # (code - zero_point) · scale, with a scale and a zero point for every group.
        grid = Grid(self.scale, self.zero_point, *self.spec.code_range)
        return grid.values(self.codes.to(self.scale))

    def moved(self, steps: Tensor) -> Tensor:
        """The codes, each by so many steps of its grid further and within its ends: [out, in], in
        the type of steps. Differentiable in steps: [out, in], integers."""
        low, high = self.spec.code_range
        if self.salient_columns is None:
            return (self.codes + steps).clamp(low, high)
        # A step of a column without second codes is a stride of joint codes.
        bits, columns = self.spec.num_bits, self.codes.shape[1]
        stride = strides(self.salient_columns, bits, columns)
        lowest, highest = stride * low, stride * high
        places = self.salient_columns.long()
        for ends, joint in zip((lowest, highest), joint_range(bits), strict=True):
            ends[places] = float(joint)
        # Not clamp, which halves the derivative of a code that has come to the end.
        codes = self.codes + stride * steps
        codes = torch.where(codes < lowest, lowest, codes)
        return torch.where(codes > highest, highest, codes)

    @property
    def stored_bits(self) -> int:
        """Bits of the packed codes, the scales, and the zero points unless all of them are 0; of
        salient columns their second codes and their indices too."""
        bits = SCALE_BITS[self.spec.grid] * self.scale.numel()
        bits += 8 * packed_size(self.codes.numel(), self.spec.num_bits)
        if self.salient_columns is None:
            return bits
        count, second_bits = len(self.salient_columns), SECOND_BITS[self.spec.num_bits]
        # Indices are int32.
        return bits + 8 * packed_size(len(self.codes) * count, second_bits) + 32 * count


@dataclass(frozen=True)
class StoredFactor:
    """L [m, r] or R [r, n] as the artifact stores it.

    codes: float16 values without a scale, or int8 codes with a scale.
    scale: float32, [1, r] for L and [r, 1] for R; None for float16 values.
    """

    codes: Tensor
    scale: Tensor | None = None

    @classmethod
    def rounded(cls, values: Tensor, scale: Tensor | None) -> "StoredFactor":
        """The nearest values that can be stored. values: float32; scale: as above."""
        if scale is None:
            return cls(values.half())
        # Symmetric: -128 is left out, as the zero point is 0.
        grid = Grid(scale, torch.zeros_like(scale), -INT8_LIMIT, INT8_LIMIT)
        return cls(grid.quantize(values).to(torch.int8), scale)

    @property
    def values(self) -> Tensor:
        """The factor in float32."""
        # A scale belongs to one of the r components, so it broadcasts over the other dimension.
        return self.codes.float() if self.scale is None else self.codes.float() * self.scale

    @property
    def stored_bits(self) -> int:
        """Bits of codes and scale."""
        tensors = [self.codes] if self.scale is None else [self.codes, self.scale]
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class LowRank:
    """The low-rank branch L R as the artifact stores it."""

    left: StoredFactor
    right: StoredFactor

    @property
    def product(self) -> Tensor:
        """L R of the stored values: float32 [m, n]."""
        # From the stored values, so that it is the branch that runs, rounding included.
        return self.left.values @ self.right.values

    @property
    def stored_bits(self) -> int:
        """Bits of both factors."""
        return self.left.stored_bits + self.right.stored_bits


class QuantLinear(nn.Module):
    """A linear with integer weight codes.

    weight: codes, scales and zero points, and which columns have two codes for each weight.
    bias: float32 [out], or None.
    input: quantizes x, or smooths it only; None if it stays as it is.
    lowrank: branch beside the codes, or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    lowrank_left: Tensor | None
    lowrank_right: Tensor | None
    lowrank_left_scale: Tensor | None
    lowrank_right_scale: Tensor | None
    salient_columns: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        input: ActivationQuantizer | Smoothing | None,
        lowrank: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.spec = weight.spec
        # Buffers, not values: they move to a device with the module and are in its state dict.
        # Their order is the order of the names there.
        for side in ("left", "right"):
            factor: StoredFactor | None = getattr(lowrank, side, None)
            self.register_buffer(f"lowrank_{side}", None if factor is None else factor.codes)
            self.register_buffer(f"lowrank_{side}_scale", None if factor is None else factor.scale)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("salient_columns", weight.salient_columns)
        self.register_buffer("bias", bias)
        self.input = input

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """Codes, scales and zero points, as they are on the module's device now."""
        return QuantizedWeight(
            self.spec, self.codes, self.scale, self.zero_point, self.salient_columns
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, without the low-rank branch: float32 [out, in]."""
        return self.quantized_weight.values

    @property
    def lowrank(self) -> LowRank | None:
        """The branch beside the codes, or None."""
        # Built from the buffers, which may have moved to another device.
        if self.lowrank_left is None or self.lowrank_right is None:
            return None
        return LowRank(
            StoredFactor(self.lowrank_left, self.lowrank_left_scale),
            StoredFactor(self.lowrank_right, self.lowrank_right_scale),
        )

    @lowrank.setter
    def lowrank(self, branch: LowRank) -> None:
        self.lowrank_left, self.lowrank_left_scale = branch.left.codes, branch.left.scale
        self.lowrank_right, self.lowrank_right_scale = branch.right.codes, branch.right.scale

    @property
    def stored_bits(self) -> int:
        """Bits that the artifact takes for the weight: codes, grid, low-rank branch, smoothing."""
        # Smoothing is float32 [in]. The grid of the input, one or two numbers, is not counted.
        branch, smoothing = self.lowrank, None if self.input is None else self.input.smoothing
        bits = self.quantized_weight.stored_bits
        if branch is not None:
            bits += branch.stored_bits
        if smoothing is not None:
            bits += 32 * smoothing.numel()
        return bits

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out] of inputs x [..., in]."""
        # q(x), in floating point; then the product with the dequantized weight.
        x = x if self.input is None else self.input(x)
        y, branch = F.linear(x, self.weight, self.bias), self.lowrank
        if branch is None:
            return y
        # The branch reads the quantized x too: R first, since r is much smaller than in and out.
        return y + F.linear(F.linear(x, branch.right.values.to(x)), branch.left.values.to(x))


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every quantized linear of the model by its module path, in the order of the module tree."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)
    }


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits of the quantized linears (see QuantLinear.stored_bits), per weight."""
    # Weighted by size: all bits over all weights, not the mean over linears.
    linears = quantized_linears(model).values()
    return sum(linear.stored_bits for linear in linears) / sum(
        linear.codes.numel() for linear in linears
    )
