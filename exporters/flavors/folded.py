"""The folded flavour: low-bit codes in the file, float weights in memory, for GPUs.

    codes (INT4) → Cast(float32) → Sub(zero point) → Mul(scale) → Cast(float16)  ┐
    x ────────────────────────────────────────────────────────────────────────── ┴ MatMul → Add

ONNX Runtime folds the first line to a float16 initializer when it loads the file. What then runs is
the float16 graph, in its time, from a file of a quarter of its size: the transfer and the storage
are small, not the memory.

Why this form. On a GPU no low-bit product of ONNX Runtime is faster than the float16 product for
the hundreds of rows of a ViT. Measured on an H100, ViT-B/16, as a ratio to the time of the float16
graph as torch traces it, at batch 1, 8 and 32 (onnxruntime-gpu 1.31.1):

    integer        7.7, 40 and 55: its kernel is the CPU's, so the linears run there
    qdq            1.9, 2.3 and 2.1: dequantizes at every run, and multiplies in float32
    matmulnbits    1.2, 1.9 and 1.9: the same
    folded         0.71, 0.77 and 0.67: the time of a float16 file with the same passes

Why float32 first. ONNX Runtime folds on its CPU provider, whose Sub and Mul have no float16
kernels: in float16 nothing is folded. DequantizeLinear is not folded at all, Cast and Mul are.

Codes of 2 bits are a plane of uint8, as large as INT2. INT2 would be folded too, but asks for
opset 25, for whose Reshape, Transpose and Cast the CUDA provider had no kernels in early 2026
(runtime/audit/cuda_operators.py): they would run on the CPU.

Whatever multiplies the weight is folded too, and costs nothing at run time: the low-rank branch
(W + L R) and, if activations are not quantized although the artifact's are, their smoothing.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from exporters.float16 import holds
from exporters.lowering.linear import LinearLowering, LinearSlice, LoweredModel, Target, lower
from exporters.lowering.lowrank import plus_lowrank
from exporters.lowering.weights import float32_codes
from exporters.opsets import FUSED_ONNXRUNTIME, OPSET
from exporters.trace import TracedModel
from marrq.schemes import Scheme


@dataclass(frozen=True)
class Folded:
    """The flavour.

    float32: weights and activations in float32, else in float16.
    weights_only: leave the activations of the artifact unquantized. The exporter does that before
    it lowers the model (marrq/quantizers/weights_only.py).
    """

    float32: bool = False
    weights_only: bool = False

    def container_bits(self, scheme: Scheme, device: str) -> int:
        """Bits that one weight code takes in the file."""
        return scheme.weight.num_bits

    def lowest_onnxruntime(self, scheme: Scheme, has_salient: bool) -> str:
        """First ONNX Runtime that was seen to run such linears."""
        return FUSED_ONNXRUNTIME

    def lower(self, traced: TracedModel, device: str) -> LoweredModel:
        """The graph with float products."""
        target = Target(OPSET, device, fuse=True, float16=not self.float32)
        return lower(traced, target, self._linear)

    def _linear(self, linear: LinearLowering) -> ir.Value:
        number = np.dtype(np.float32 if self.float32 else np.float16)
        # γ of LayerScale: in the weight if float16 can hold the product, else behind it.
        behind = None if holds(number, _weight_of(linear.slice)) else linear.output_scale
        if behind is not None:
            linear.slice = linear.unscaled
        linear.weight = self._weight(linear)
        # Later passes and the parity ask for them.
        linear.weight.shape = ir.Shape([linear.slice.in_features, len(linear.slice.codes)])
        linear.weight.type = ir.TensorType(ir.DataType.from_numpy(number))
        y = linear.add("MatMul", [linear.x, linear.weight])
        for op_type, name, tensor in (
            ("Add", "bias", linear.slice.bias),
            ("Mul", "output_scale", behind),
        ):
            if tensor is not None:
                y = linear.add(op_type, [y, linear.constant(name, tensor.numpy().astype(number))])
        return y

    def _weight(self, linear: LinearLowering) -> ir.Value:
        """All that x is multiplied with: [in, rows]."""
        weight = plus_lowrank(linear, _dequantized(linear))
        if linear.smoothing is not None:
            # (s ∘ x) W = x (diag(s) W): the factors of the inputs multiply the rows of [in, rows].
            factors = linear.weight_constant("input_smoothing", _column(linear.smoothing))
            weight = linear.add("Mul", [weight, factors])
        if self.float32:
            return weight
        return linear.add("Cast", [weight], to=int(ir.DataType.FLOAT16))


def _weight_of(rows: LinearSlice) -> np.ndarray:
    """(codes - zero point) · scale, float32 [rows, groups, inputs of a group]."""
    codes = rows.codes.reshape(len(rows.codes), rows.groups, -1).numpy().astype(np.float32)
    zero_point, scale = (part.numpy()[:, :, None] for part in (rows.zero_point, rows.scale))
    weight: np.ndarray = (codes - zero_point) * scale
    return weight


def _dequantized(linear: LinearLowering) -> ir.Value:
    """(codes - zero point) · scale in float32: [in, rows]."""
    rows = linear.slice
    values = float32_codes(linear)
    if rows.groups == 1:
        return _scaled(linear, values, _row(rows.zero_point), _row(rows.scale))
    # Each group with its own scale: [groups, inputs of a group, rows] by [groups, 1, rows]
    grouped = linear.constant("groups", np.array([rows.groups, rows.group_size, len(rows.codes)]))
    values = _scaled(
        linear,
        linear.add("Reshape", [values, grouped]),
        _row(rows.zero_point)[:, None],
        _row(rows.scale)[:, None],
    )
    whole = linear.constant("whole", np.array([rows.in_features, len(rows.codes)]))
    return linear.add("Reshape", [values, whole])


def _scaled(
    linear: LinearLowering, values: ir.Value, zero_point: np.ndarray, scale: np.ndarray
) -> ir.Value:
    # Symmetric grids have zero points of 0: nothing to store, nothing to subtract.
    if zero_point.any():
        # int8 in the file, a quarter of float32; the Cast is folded like the others.
        stored = linear.weight_constant("weight_zero_point", zero_point)
        shift = linear.add("Cast", [stored], to=int(ir.DataType.FLOAT))
        values = linear.add("Sub", [values, shift])
    return linear.add("Mul", [values, linear.weight_constant("weight_scale", scale)])


def _row(numbers: Tensor) -> np.ndarray:
    """[rows, groups] → [groups, rows]"""
    return numbers.T.contiguous().numpy()


def _column(numbers: Tensor) -> np.ndarray:
    return numbers.numpy()[:, None]
