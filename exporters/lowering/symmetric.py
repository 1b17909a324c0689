"""A linear as TensorRT takes it: Q/DQ with zero points 0, in a float16 graph.

    x → [Mul(smoothing)] → QuantizeLinear(int8) → DequantizeLinear  ┐
    codes (INT8, or INT4 if x is float) → DequantizeLinear          ┴ MatMul → Add(bias) [→ Mul(u)]

TensorRT's rules, from its documentation (Working with Quantized Types; Dequantize and Quantize
layers) and its ONNX parser: signed types only; zero points 0; scales positive constants; a scale
per output channel of a weight, or with INT4 per block of inputs; one scale for all activations;
INT4 for weights alone; DequantizeLinear straight into MatMul. runtime/doctor/tensorrt.py checks a
file by them.

Types. A strongly typed network gives DequantizeLinear the type of its scale, so scales are float16.
Below 2⁻¹⁴ float16 has fewer digits, and LayerScale's γ, which is part of the scales, can make them
that small, negative or 0. If it does, the linear is divided by a unit u = ±2⁻ᵏ for each output (0
if γ is 0), bias included, and the result is multiplied by u, which is exact.

Codes of 2 and 3 bits are held in INT4; beside quantized activations every code is held in INT8,
because TensorRT multiplies INT8 by INT8 only. Their values are the artifact's.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.lowering.linear import InputCodes, LinearLowering
from marrq.errors import MarrqError
from marrq.quantizers.linear import StoredFactor

LEAST_NORMAL = float(np.finfo(np.float16).tiny)
"""2⁻¹⁴: smaller numbers have fewer digits in float16."""


def symmetric_linear(linear: LinearLowering) -> ir.Value:
    """The nodes of a linear; its output in float16."""
    x, rows = _input(linear), linear.slice
    unit = _unit(rows.scale)
    # 1 / u; a row of zeros is left as it is, since its unit makes zeros of anything.
    inverse = torch.where(unit == 0, torch.ones_like(unit), 1 / unit)
    y = linear.add("MatMul", [x, _weight(linear, inverse)])
    if rows.left is not None and rows.right is not None:
        y = linear.add("Add", [y, _branch(linear, x, inverse)])
    if rows.bias is not None:
        y = linear.add("Add", [y, linear.constant("bias", half(linear, rows.bias * inverse))])
    if bool((unit == 1).all()):
        return y
    return linear.add("Mul", [y, linear.constant("unit", half(linear, unit))])


def half(linear: LinearLowering, numbers: Tensor) -> np.ndarray:
    """Numbers in float16. Raises MarrqError if one of them is too large."""
    found = numbers.numpy().astype(np.float16)
    if not np.isfinite(found).all():
        raise MarrqError(
            f"{linear.path!r} has scales or biases beyond float16: export without --symmetric"
        )
    return found


def _unit(scale: Tensor) -> Tensor:
    """The unit u of each output, for which no scale / u is negative, or below the normal numbers of
    float16: [rows], mostly 1. scale: [rows, groups]."""
    # A scale of 0 is one of γ, which has no unit: grids give an empty range the scale 1.
    least = scale.abs().amin(1)
    shift = (LEAST_NORMAL / least).log2().ceil().clamp(min=0)
    # γ is one for all groups of an output, and so is its sign.
    return scale[:, 0].sign() * 2.0 ** -torch.where(least > 0, shift, 0.0)


def _input(linear: LinearLowering) -> ir.Value:
    """The dequantized input, made once for all linears that quantize x alike; or x itself."""
    quantizer, x = linear.quantizer, linear.x
    if quantizer is None:
        return x
    # Linears that read x may quantize it differently, for example with another smoothing.
    tensors = tuple(buffer.numpy().tobytes() for buffer in quantizer.buffers())
    made, values = linear.shared.codes, linear.shared.values
    if (x, tensors) not in made:
        smoothed = x
        if quantizer.smoothing is not None:
            factors = linear.weight_constant("input_smoothing", half(linear, quantizer.smoothing))
            smoothed = linear.add("Mul", [x, factors])
        scale = linear.constant("input_scale", half(linear, quantizer.scale))
        # The type of the zero point is the type of the codes.
        zero_point = linear.constant("input_zero_point", np.array(0, np.int8))
        inputs = [smoothed, scale, zero_point]
        codes = InputCodes(linear.add("QuantizeLinear", inputs), scale, zero_point, False)
        made[x, tensors] = codes
        values[codes] = linear.add("DequantizeLinear", [codes.codes, scale, zero_point])
    return values[made[x, tensors]]


def _weight(linear: LinearLowering, inverse: Tensor) -> ir.Value:
    """The weight over its units, in float16: [in, rows]."""
    rows = linear.slice
    # INT8 is multiplied by INT8, and INT4 is for weights beside float activations.
    wide = rows.num_bits == 8 or linear.quantizer is not None
    if rows.salient is not None and not wide:
        raise MarrqError(
            f"{linear.path!r} has salient columns, whose codes do not fit INT4: export without "
            "--symmetric"
        )
    container = np.int8 if wide else ml_dtypes.int4
    stored = rows.codes.T.contiguous().numpy().astype(container)
    codes = linear.weight_constant("weight_codes", stored)
    # A scale per output channel is axis 1 of [in, rows]; blocks of inputs lie on axis 0.
    positive = rows.scale * inverse[:, None]
    # A scale must be positive, that of a row of zeros too.
    positive = torch.where(positive == 0, torch.ones_like(positive), positive)
    scales = half(linear, positive.T.contiguous())
    if rows.groups == 1:
        scale = linear.weight_constant("weight_scale", scales[0])
        return linear.add("DequantizeLinear", [codes, scale], axis=1)
    scale = linear.weight_constant("weight_scale", scales)
    return linear.add("DequantizeLinear", [codes, scale], axis=0, block_size=rows.group_size)


def _branch(linear: LinearLowering, x: ir.Value, inverse: Tensor) -> ir.Value:
    """The low-rank branch L (R x), over its units."""
    rows, made = linear.slice, linear.shared.components
    assert rows.left is not None  # the caller checked both
    assert rows.right is not None
    # q, k and v of a linear have the same R: R x is made once for the tokens that they read.
    if (linear.path, x) not in made:
        right = _factor(linear, "lowrank_right", rows.right)
        made[linear.path, x] = linear.add("MatMul", [x, right])
    y = linear.add("MatMul", [made[linear.path, x], _factor(linear, "lowrank_left", rows.left)])
    # γ of LayerScale, which L does not have in it, and the unit of the product beside it.
    factor = inverse if rows.left_scale is None else inverse * rows.left_scale
    if bool((factor == 1).all()):
        return y
    return linear.add("Mul", [y, linear.weight_constant("lowrank_scale", half(linear, factor))])


def _factor(linear: LinearLowering, name: str, factor: StoredFactor) -> ir.Value:
    """A factor, transposed, in float16: stored so, or dequantized from INT8."""
    stored = linear.weight_constant(name, factor.codes.T.contiguous().numpy())
    if factor.scale is None:
        return stored
    # One scale for each of the r components: rows of [r, rows], columns of [in, r].
    axis = 0 if name == "lowrank_left" else 1
    scale = linear.weight_constant(f"{name}_scale", half(linear, factor.scale.reshape(-1)))
    return linear.add("DequantizeLinear", [stored, scale], axis=axis)
