"""The integer flavour: low-bit codes in the file, integer kernels at run time.

    x → QuantizeLinear(uint8) [→ Clip(0, 15)]  ┐
    codes (INT4) → Cast(int8)                  ┴ MatMulIntegerToFloat(scales, zero points, bias)

Why the kernel is named in the graph. ONNX Runtime fuses a MatMul between DequantizeLinear nodes to
an integer kernel, but not if the weight is INT4 or INT2: then it computes in float, slower than the
float model. Here the codes are packed in the file and pass through a Cast to int8, which is folded
when the model is loaded. The graph names the kernel itself, which is in ONNX Runtime's domain
`com.microsoft`, so that no fusion has to be hoped for. The other operators are standard. The bias
is inside the kernel: as an Add of its own it costs a tenth of the forward of a ViT-S at batch 1.

Per-token activations. No kernel takes a scale s and a zero point z for each row. The kernel
multiplies the codes q by the weight W alone, and a small float product adds the rest:

    (s (q - z)) Wᵀ + b  =  s · (q Wᵀ)  +  [s z, 1] · [-W 1; b]        W 1: the sums of W's rows

Measured on linears of 197 tokens, 384 → 1536 and 1536 → 384, one thread, as a ratio to the float
product's time (ONNX Runtime 1.31.1, AVX-512 VNNI):

    static activations                                        0.34 and 0.37
    per token, as above                                       0.39 and 0.41
    per token, MatMulInteger with corrections                 0.42 to 0.43
    per token, Div, Round, Add, Clip, Cast for the codes      0.41 and 0.51

Group scales. Each group of inputs is a kernel of its own, and the outputs are summed. On the same
linears: a scale per channel 0.31 and 0.29, groups of 128 inputs 0.45 and 0.51, of 64 0.67 and 0.76,
of 32 1.44 and 1.72.

Patch embedding and head. A quantized patch embedding, 16 × 16 pixels to 384 channels, takes 0.33 of
the float convolution's time at batch 1 and 0.18 at batch 8 (ONNX Runtime 1.32.0); ONNX Runtime
itself moves QuantizeLinear before the Transpose that makes patches. The head's product has rank 2,
which the kernel takes if it is named.

A low-rank branch reads the dequantized codes and runs in float beside the kernel. Salient columns
(`lowrank=serq`) run in the kernel itself: two codes for each weight are one int8 code in memory.
As a ratio to the kernel alone, on linears of 65 tokens, 384 → 1152, 384 → 384, 384 → 1536 and
1536 → 384 (one thread, ONNX Runtime 1.32.0, AVX-512 VNNI):

    salient columns, joined as here                           1 by construction
    64 salient columns as a Gather and a second kernel        1.54, 1.66, 1.64 and 1.30
    a float branch of rank 9                                  1.42, 1.34, 1.49 and 1.39
    a float branch of rank 32                                 1.57, 1.57, 1.68 and 1.54
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporters.lowering.inputs import input_codes
from exporters.lowering.linear import InputCodes, LinearLowering, LoweredModel, Target, lower
from exporters.lowering.lowrank import with_lowrank
from exporters.lowering.weights import int8_codes
from exporters.opsets import (
    ATTENTION_OPSET,
    BLOCK_ONNXRUNTIME,
    BLOCK_OPSET,
    ONNXRUNTIME_DOMAIN,
    WIDENED_ONNXRUNTIME,
    opset_of,
)
from exporters.trace import TracedModel
from marrq.schemes import Scheme

KERNEL = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class Integer:
    """The flavour.

    fuse: attention as one operator, which is faster and needs a newer ONNX Runtime; else as two
    products. Files of 2-bit weights always have two products: INT2 needs a later opset, whose
    Attention has no kernel.
    """

    fuse: bool = True

    def container_bits(self, scheme: Scheme, device: str) -> int:
        """Bits that one weight code takes in the file."""
        return scheme.weight.num_bits

    def lowest_onnxruntime(self, scheme: Scheme, has_salient: bool) -> str:
        """First ONNX Runtime that was seen to run the linears on integer kernels."""
        # The weight's type and the per-token QuantizeLinear each have a first release.
        widened = WIDENED_ONNXRUNTIME[scheme.weight.num_bits]
        return max(widened, BLOCK_ONNXRUNTIME) if opset_of(scheme) >= BLOCK_OPSET else widened

    def lower(self, traced: TracedModel, device: str) -> LoweredModel:
        """The graph on integer kernels."""
        # Attention has a kernel only in opset 23: a scheme that needs a later opset cannot have it.
        opset = max(map(opset_of, traced.model.block_schemes))
        fuse = self.fuse and opset <= ATTENTION_OPSET
        return lower(traced, Target(opset, device, fuse), _linear)


def _linear(linear: LinearLowering) -> ir.Value:
    x = input_codes(linear, linear.x)
    # The kernel takes one scale and one zero point for the whole input.
    y = _per_token(linear, x) if x.per_token else _kernel(linear, x, _bias(linear))
    return with_lowrank(linear, linear.x, y)


def _bias(linear: LinearLowering) -> ir.Value | None:
    bias = linear.slice.bias
    return None if bias is None else linear.constant("bias", bias.numpy())


def _per_token(linear: LinearLowering, x: InputCodes) -> ir.Value:
    """The product for per-token activations: s · (q Wᵀ) + [s z, 1] · [-W 1; b]."""
    one = linear.constant("unit_scale", np.array(1, np.float32))
    none = linear.constant("no_zero_point", np.array(0, np.uint8))
    # The kernel sees the codes themselves: scale 1 and zero point 0.
    product = _kernel(linear, InputCodes(x.codes, one, none, per_token=False), None)
    # s · (q Wᵀ): [..., rows]
    scaled = linear.add("Mul", [product, x.scale])
    # s z, the part that the product of the codes lacks: [..., 1]
    zero_point = linear.add("Cast", [x.zero_point], to=int(ir.DataType.FLOAT))
    shift = linear.add("Mul", [zero_point, x.scale])
    sums, bias = _row_sums(linear), linear.slice.bias
    if bias is None:
        # Without a bias there is nothing to pad: s · (q Wᵀ) - s z · (W 1)
        stored = linear.weight_constant("weight_sums", sums)
        return linear.add("Sub", [scaled, linear.add("Mul", [shift, stored])])
    # [s z] → [s z, 1]: a Pad by one element at the end of the last axis
    beside = linear.constant("beside", np.array([0, 1]))
    last_axis = linear.constant("last_axis", np.array([-1]))
    padded = linear.add("Pad", [shift, beside, one, last_axis])
    # [s z, 1] · [-W 1; b]: a float product of depth 2, with [2, rows].
    rest = linear.constant("bias_and_sums", np.stack([-sums, bias.numpy()]))
    return linear.add("Add", [scaled, linear.add("MatMul", [padded, rest])])


def _row_sums(linear: LinearLowering) -> np.ndarray:
    """W 1: float32 [rows]. The codes of each group are summed as integers, then scaled."""
    rows = linear.slice
    # [rows, groups, inputs]
    grouped = rows.codes.int().reshape(*rows.scale.shape, -1)
    centered = grouped - rows.zero_point.int()[..., None]
    # Σ over groups of s_g Σ over inputs of (q - z)
    sums: np.ndarray = (centered.sum(2) * rows.scale).sum(1).numpy()
    return sums


def _kernel(linear: LinearLowering, x: InputCodes, bias: ir.Value | None) -> ir.Value:
    """The product x Wᵀ + b: one kernel, or one for each group of inputs and their sum."""
    rows = linear.slice
    # The kernel wants W as [in, rows].
    weight = int8_codes(linear)
    if rows.groups == 1:
        return _group_kernel(linear, 0, x, weight, bias)
    # x Wᵀ = Σ over groups of x_g W_gᵀ: cut the channels of x and the rows of W alike.
    codes = linear.split(x.codes, -1, rows.groups)
    weights = linear.split(weight, 0, rows.groups)
    products = [
        # The bias is added once.
        _group_kernel(
            linear, group, replace(x, codes=codes[group]), weights[group], None if group else bias
        )
        for group in range(rows.groups)
    ]
    return linear.add("Sum", products)


def _group_kernel(
    linear: LinearLowering, group: int, x: InputCodes, weight: ir.Value, bias: ir.Value | None
) -> ir.Value:
    """One kernel. weight: int8 codes [inputs of the group, rows]."""
    rows, suffix = linear.slice, f"_{group}" if linear.slice.groups > 1 else ""
    scale = linear.weight_constant(
        f"weight_scale{suffix}", rows.scale[:, group].contiguous().numpy()
    )
    zero_point = linear.weight_constant(
        f"weight_zero_point{suffix}", rows.zero_point[:, group].contiguous().numpy()
    )
    # The kernel's order: codes, then scales, then zero points of x and W, then the bias.
    inputs = [x.codes, weight, x.scale, scale, x.zero_point, zero_point]
    if bias is not None:
        inputs.append(bias)
    # The kernel gives float32, so no dequantization follows.
    return linear.add(KERNEL, inputs, domain=ONNXRUNTIME_DOMAIN)
