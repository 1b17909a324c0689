"""The qdq flavour: standard operators, for runtimes that have none of ONNX Runtime's own.

    x → QuantizeLinear(uint8) [→ Clip] → DequantizeLinear  ┐
    codes (INT4) → Cast(int8) → DequantizeLinear           ┴ MatMul → Add(bias)

The flavour expresses every scheme. What ONNX Runtime makes of the graph depends on the form of the
weight (seen with 1.31.1 on the CPU):

    static activations, a scale per channel    [in, out], as above
        An integer kernel, at rank 3. Without the Cast, and at rank 2, for which ONNX Runtime first
        makes a Gemm, it computes in float.
    anything else, group scales included       [out, in], then Transpose
        Float; the weight is dequantized at every run.

The second form has a scale per block of inputs (opset 21), even if all inputs are one block, and a
Transpose. Without these two, ONNX Runtime fuses weight and product to its MatMulNBits with
`accuracy_level` 4, which quantizes float activations to int8: a model whose scheme says A16 would
run, and be measured, as A8.

`symmetric` writes what TensorRT takes, a float16 graph with zero points 0
(exporters/lowering/symmetric.py). It takes the artifact's codes as they are, so the grids must be
symmetric: `-sym`. ONNX Runtime runs the form with float activations as W4A8, silently, unless the
session sets `session.qdq_matmulnbits_accuracy_level` to 1. TensorRT itself was not at hand: no such
file has been run under it.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.lowering.inputs import input_values
from exporters.lowering.linear import LinearLowering, LoweredModel, Target, lower
from exporters.lowering.lowrank import with_lowrank
from exporters.lowering.symmetric import symmetric_linear
from exporters.lowering.weights import int8_codes
from exporters.opsets import BLOCK_ONNXRUNTIME, BLOCK_OPSET, OPSET, WIDENED_ONNXRUNTIME, opset_of
from exporters.trace import TracedModel
from marrq.schemes import Scheme

TRANSPOSED_ONNXRUNTIME = "1.20.0"
"""First ONNX Runtime that runs the form with a Transpose with torch's logits."""


@dataclass(frozen=True)
class Qdq:
    """The flavour. symmetric: only what TensorRT takes."""

    symmetric: bool = False

    def container_bits(self, scheme: Scheme, device: str) -> int:
        """Bits that one weight code takes in the file."""
        if not self.symmetric:
            return scheme.weight.num_bits
        return max(scheme.weight.num_bits, 4) if scheme.activation is None else 8

    def lowest_onnxruntime(self, scheme: Scheme, has_salient: bool) -> str:
        """First ONNX Runtime that was seen to run such linears."""
        if self.symmetric:
            int4 = self.container_bits(scheme, "cpu") == 4
            return BLOCK_ONNXRUNTIME if int4 else WIDENED_ONNXRUNTIME[8]
        # The type of the codes, and the form with blocks, each have a first release.
        widened = WIDENED_ONNXRUNTIME[scheme.weight.num_bits]
        return widened if _fits_integer_kernel(scheme) else max(widened, TRANSPOSED_ONNXRUNTIME)

    def lower(self, traced: TracedModel, device: str) -> LoweredModel:
        """The graph in standard operators."""
        if self.symmetric:
            # INT4 and blocks need a later opset than INT8. Mixed widths may have both.
            schemes = traced.model.block_schemes
            containers = {self.container_bits(scheme, device) for scheme in schemes}
            opset = OPSET if containers == {8} else BLOCK_OPSET
            target = Target(opset, float16=True, tensorrt=True)
            return lower(traced, target, symmetric_linear)
        scheme = traced.model.scheme
        # A scale per block, even one block, needs opset 21.
        opset = max(map(opset_of, traced.model.block_schemes))
        if not _fits_integer_kernel(scheme):
            opset = max(opset, BLOCK_OPSET)
        return lower(traced, Target(opset), _standard)


def _fits_integer_kernel(scheme: Scheme) -> bool:
    """Whether ONNX Runtime can fuse an integer kernel: static activations, a scale per channel."""
    # The kernel has a scalar scale for x and a scale per column of W.
    static = scheme.activation is not None and scheme.activation.is_static
    return scheme.weight.group_size is None and static


def _standard(linear: LinearLowering) -> ir.Value:
    """Choose the form by the linear's own scheme: patch embedding and head may fit an integer
    kernel although the blocks do not."""
    quantizer = linear.quantizer
    if quantizer is None or not quantizer.spec.is_static or linear.slice.groups > 1:
        return _per_block(linear)
    if linear.x.shape is None or len(linear.x.shape) != 2:
        return _per_channel(linear, linear.x)
    # A product of rank 2 would become a Gemm in float, so the head's input gets a third axis.
    axis = linear.constant("axis", np.array([1]))
    y = _per_channel(linear, linear.add("Unsqueeze", [linear.x, axis]))
    return linear.add("Squeeze", [y, axis])


def _per_channel(linear: LinearLowering, x: ir.Value) -> ir.Value:
    rows = linear.slice
    # The layout that ONNX Runtime fuses to an integer kernel: scales along the last axis.
    # [in, rows]
    codes = int8_codes(linear)
    scale = linear.weight_constant("weight_scale", rows.scale[:, 0].numpy())
    zero_point = linear.weight_constant(
        "weight_zero_point", rows.zero_point[:, 0].contiguous().numpy()
    )
    weight = linear.add("DequantizeLinear", [codes, scale, zero_point], axis=1)
    return _product(linear, x, weight)


def _per_block(linear: LinearLowering) -> ir.Value:
    rows = linear.slice
    # [rows, in]
    codes = int8_codes(linear, inputs_first=False)
    # [rows, groups], as the artifact stores them
    scale = linear.weight_constant("weight_scale", rows.scale.numpy())
    zero_point = linear.weight_constant("weight_zero_point", rows.zero_point.numpy())
    weight = linear.add(
        "DequantizeLinear", [codes, scale, zero_point], axis=1, block_size=rows.group_size
    )
    # The Transpose keeps ONNX Runtime from fusing MatMulNBits (see the module).
    return _product(linear, linear.x, linear.add("Transpose", [weight]))


def _product(linear: LinearLowering, x: ir.Value, weight: ir.Value) -> ir.Value:
    """The output x W + L (R x) + b. weight: float [in, rows]."""
    # The simulation in torch multiplies the same dequantized values.
    y = linear.add("MatMul", [input_values(linear, x), weight])
    y = with_lowrank(linear, x, y)
    if linear.slice.bias is None:
        return y
    return linear.add("Add", [y, linear.constant("bias", linear.slice.bias.numpy())])
