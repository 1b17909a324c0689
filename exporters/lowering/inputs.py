"""The input of a linear as uint8 codes, in standard ONNX.

    static       x → QuantizeLinear(scale, zero point) [→ Clip]
                 one grid, found in calibration
    per token    x → ReduceMin, ReduceMax → scale, zero point;  x → QuantizeLinear [→ Clip]
                 one grid per token, as `grid_from_range` in marrq/quantizers/affine.py computes it

An input with a smoothing is multiplied by it first. 3- and 4-bit activations are uint8 codes
clipped to 0 … 7 and 0 … 15, since the integer kernels take 8-bit codes. The signed codes of a
symmetric grid are written as unsigned ones too, q + 2^(b-1) with the zero point 2^(b-1): the values
are the same, and the kernels are the fast ones. Linears that quantize the same input alike share
the nodes.
"""

import numpy as np
import onnx_ir as ir

from exporters.lowering.linear import InputCodes, LinearLowering
from marrq.quantizers.activations import ActivationQuantizer

UINT8_MAX = int(np.iinfo(np.uint8).max)


def input_codes(linear: LinearLowering, x: ir.Value) -> InputCodes:
    """The codes of x, made once for all linears that quantize x alike."""
    # Flavours without float activations refuse such schemes first.
    assert linear.quantizer is not None  # the caller checked the scheme
    # Linears that read x may quantize it differently, for example with another smoothing.
    tensors = tuple(buffer.numpy().tobytes() for buffer in linear.quantizer.buffers())
    made = linear.shared.codes
    if (x, tensors) not in made:
        # A grid from calibration, or a grid per token.
        make = _static_codes if linear.quantizer.spec.is_static else _token_codes
        made[x, tensors] = make(linear, x, linear.quantizer)
    return made[x, tensors]


def input_values(linear: LinearLowering, x: ir.Value) -> ir.Value:
    """The input as the torch simulation multiplies it: dequantized codes, or x itself."""
    if linear.quantizer is None:
        return x
    codes = input_codes(linear, x)
    made = linear.shared.values
    if codes not in made:
        made[codes] = _dequantized(linear, codes)
    return made[codes]


def _static_codes(
    linear: LinearLowering, x: ir.Value, quantizer: ActivationQuantizer
) -> InputCodes:
    scale = linear.constant("input_scale", quantizer.scale.numpy())
    low, _ = quantizer.spec.code_range
    # Codes begin at 0 in the file.
    unsigned = (quantizer.zero_point - low).numpy().astype(np.uint8)
    zero_point = linear.constant("input_zero_point", unsigned)
    smoothed = _smoothed(linear, x, quantizer)
    # round(x / scale) + zero_point, saturated to 0 … 255
    codes = linear.add("QuantizeLinear", [smoothed, scale, zero_point])
    return InputCodes(_clipped(linear, codes, quantizer), scale, zero_point, per_token=False)


def _token_codes(linear: LinearLowering, x: ir.Value, quantizer: ActivationQuantizer) -> InputCodes:
    """The grid of each token spans 0 and its clipped range [c · min, c · max]."""
    x = _smoothed(linear, x, quantizer)
    minimum, maximum = _token_range(linear, x, quantizer)
    # scale = (maximum - minimum) / (2ᵇ - 1)
    _, high = quantizer.spec.code_range
    steps = linear.constant("input_steps", np.array(high, np.float32))
    width = linear.add("Div", [linear.add("Sub", [maximum, minimum]), steps])
    # A token of zeros has no width. torch gives it the scale 1, the graph the least normal number:
    # codes and zero point are 0 with both.
    least = linear.constant("input_least_scale", np.array(np.finfo(np.float32).tiny))
    scale = linear.add("Max", [width, least])
    # zero_point = round(-minimum / scale)
    below = linear.add("Neg", [linear.add("Div", [minimum, scale])])
    rounded = linear.add("Round", [below])
    zero_point = linear.add("Cast", [rounded], to=int(ir.DataType.UINT8))
    # All channels of a token are one block.
    codes = linear.add(
        "QuantizeLinear",
        [x, scale, zero_point],
        axis=-1,
        block_size=linear.slice.in_features,
    )
    return InputCodes(_clipped(linear, codes, quantizer), scale, zero_point, per_token=True)


def _token_range(
    linear: LinearLowering, x: ir.Value, quantizer: ActivationQuantizer
) -> tuple[ir.Value, ir.Value]:
    """min(c · min x, 0) and max(c · max x, 0) over the channels: [..., 1] each."""
    channels = linear.constant("input_channels", np.array([-1]))
    # 0 is always in the range, so that it has a code of its own.
    zero = linear.constant("input_zero", np.array(0, np.float32))
    clip = linear.constant("input_clip", quantizer.clip.numpy())
    # c · min x and c · max x: the clip factor c is all that calibration found.
    lowest = linear.add("ReduceMin", [x, channels], keepdims=1)
    minimum = linear.add("Min", [linear.add("Mul", [lowest, clip]), zero])
    highest = linear.add("ReduceMax", [x, channels], keepdims=1)
    maximum = linear.add("Max", [linear.add("Mul", [highest, clip]), zero])
    return minimum, maximum


def _smoothed(linear: LinearLowering, x: ir.Value, quantizer: ActivationQuantizer) -> ir.Value:
    """The input times its smoothing; x itself if it has none."""
    if quantizer.smoothing is None:
        return x
    # The factors are the other half of a scaling of the weight's columns, so they count as weight.
    smoothing = linear.weight_constant("input_smoothing", quantizer.smoothing.numpy())
    return linear.add("Mul", [x, smoothing])


def _clipped(linear: LinearLowering, codes: ir.Value, quantizer: ActivationQuantizer) -> ir.Value:
    """uint8 codes cut to the width of the activations."""
    low, high = quantizer.spec.code_range
    # QuantizeLinear saturates at 255 by itself.
    if high - low == UINT8_MAX:
        return codes
    # Codes above 2ᵇ - 1 are saturated here, as `quantize` does in torch.
    lowest = linear.constant("input_low", np.array(0, np.uint8))
    highest = linear.constant("input_high", np.array(high - low, np.uint8))
    return linear.add("Clip", [codes, lowest, highest])


def _dequantized(linear: LinearLowering, x: InputCodes) -> ir.Value:
    inputs = [x.codes, x.scale, x.zero_point]
    # A per-token grid is one block per token here, too.
    if not x.per_token:
        return linear.add("DequantizeLinear", inputs)
    return linear.add("DequantizeLinear", inputs, axis=-1, block_size=linear.slice.in_features)
