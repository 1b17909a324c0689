"""The codes of a weight, from the narrowest initializer that holds them, as int8 or as float32.

    2 bits    INT2 (opset 25) → Cast; for float32 one uint8 plane, which needs no opset
    3 bits    two uint8 planes, unpacked by shifts, masks and ors: ONNX has no 3-bit type
    4 bits    INT4 (opset 21) → Cast
    8 bits    int8 [→ Cast]

If some columns have two codes for each weight, the second set is stored in the same way, by its own
bits, and the graph joins both (marrq/quantizers/salient.py): Mul and Add in int32, and GatherND and
ScatterND for the columns.

ONNX Runtime folds these nodes when it loads the file, so they cost nothing at run time.
"""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from exporters.lowering.linear import LinearLowering
from marrq.quantizers.packing import packed_planes
from marrq.quantizers.salient import SECOND_BITS, split_codes, stride

NARROW_TYPES = {2: ml_dtypes.int2, 4: ml_dtypes.int4}


def int8_codes(linear: LinearLowering, inputs_first: bool = True) -> ir.Value:
    """The slice's codes as an int8 value [in, rows], or [rows, in] unless `inputs_first`."""
    if linear.slice.salient is not None:
        joint = _cast(linear, _joint_codes(linear, _stored_codes), ir.DataType.INT8)
        # The second codes are put in by inputs: a Transpose, folded too, gives the other layout.
        return joint if inputs_first else linear.add("Transpose", [joint])
    codes, num_bits = linear.slice.codes, linear.slice.num_bits
    laid = codes.T.contiguous() if inputs_first else codes
    return _int8(linear, _stored_codes(linear, laid, num_bits, "weight"))


def float32_codes(linear: LinearLowering) -> ir.Value:
    """The slice's codes as a float32 value [in, rows], without INT2: its opset is one for which the
    CUDA provider lacks kernels."""
    rows = linear.slice
    whole = _from_planes if rows.num_bits == 2 else _stored_codes
    if rows.salient is not None:
        return _cast(linear, _joint_codes(linear, whole), ir.DataType.FLOAT)
    codes = whole(linear, rows.codes.T.contiguous(), rows.num_bits, "weight")
    return _cast(linear, codes, ir.DataType.FLOAT)


def _joint_codes(
    linear: LinearLowering, narrow: Callable[[LinearLowering, Tensor, int, str], ir.Value]
) -> ir.Value:
    """The joint codes of both sets as int32 [in, rows] (marrq/quantizers/salient.py).

    narrow: makes the value of a set of codes with so many bits from its initializers, whose names
    begin with the text."""
    rows = linear.slice
    assert rows.salient is not None  # the caller checked it
    first, second = split_codes(rows.codes, rows.salient, rows.num_bits)
    step = linear.constant("stride", np.array(stride(rows.num_bits), np.int32))
    # [r, 1]: each index stands for a whole row of [in, rows].
    columns = linear.weight_constant("salient_columns", rows.salient[:, None].numpy())

    def integers(codes: Tensor, num_bits: int, name: str) -> ir.Value:
        # From int8: ONNX Runtime casts its narrow types to that.
        value = _int8(linear, narrow(linear, codes.T.contiguous(), num_bits, name))
        return _cast(linear, value, ir.DataType.INT32)

    # 2^(e-1) q of the other columns; 2^(e-1) r of the salient ones, to which the same comes again
    # with s + 2^(e-1).
    scaled = linear.add("Mul", [integers(first, rows.num_bits, "weight"), step])
    upper = linear.add("GatherND", [scaled, columns])
    second_bits = SECOND_BITS[rows.num_bits]
    lower = linear.add("Add", [integers(second, second_bits, "salient"), step])
    more = linear.add("Add", [upper, lower])
    return linear.add("ScatterND", [scaled, columns, more], reduction="add")


def _int8(linear: LinearLowering, stored: ir.Value) -> ir.Value:
    # 3 and 8 bits are int8 already.
    return stored if stored.dtype == ir.DataType.INT8 else _cast(linear, stored, ir.DataType.INT8)


def _stored_codes(linear: LinearLowering, codes: Tensor, num_bits: int, name: str) -> ir.Value:
    """Codes of any shape as int8, or as the type that packs them."""
    # Nothing to unpack.
    if num_bits == 8:
        return linear.weight_constant(f"{name}_codes", codes.numpy())
    if num_bits == 3:
        return _from_planes(linear, codes, num_bits, name)
    # ONNX packs two INT4 or four INT2 codes in a byte.
    return linear.weight_constant(f"{name}_codes", codes.numpy().astype(NARROW_TYPES[num_bits]))


def _cast(linear: LinearLowering, value: ir.Value, data_type: ir.DataType) -> ir.Value:
    return linear.add("Cast", [value], to=int(data_type))


def _from_planes(linear: LinearLowering, codes: Tensor, num_bits: int, name: str) -> ir.Value:
    """The planes of 2- and 3-bit codes to int8.

    u = low | high << 2 is the two's complement of b bits, (u xor s) - s the code, s = 2^(b-1).
    """
    count = codes.numel()
    # The same planes that the artifact stores; 2-bit codes have the low one alone.
    low, *high = packed_planes(codes, num_bits)
    # u in 0 … 2^b - 1
    stored = linear.weight_constant(f"{name}_low", low.numpy())
    union = _plane(linear, stored, f"low_of_{name}", 2, count)
    for plane in high:
        # The high bit of each code, moved to its place.
        stored = linear.weight_constant(f"{name}_high", plane.numpy())
        place = _bytes(linear, f"high_of_{name}_place", [2])
        bits = _plane(linear, stored, f"high_of_{name}", 1, count)
        lifted = linear.add("BitShift", [bits, place], direction="LEFT")
        union = linear.add("BitwiseOr", [union, lifted])
    # Sign extension: xor with the sign bit, then subtract it.
    sign = 2 ** (num_bits - 1)
    flipped = linear.add("BitwiseXor", [union, _bytes(linear, f"sign_of_{name}", [sign])])
    signed = _cast(linear, flipped, ir.DataType.INT8)
    offset = linear.constant(f"offset_of_{name}", np.array([sign], np.int8))
    flat = linear.add("Sub", [signed, offset])
    # From the flat codes back to their layout.
    shape = linear.weight_constant(f"{name}_shape", np.array(codes.shape, np.int64))
    value = linear.add("Reshape", [flat, shape])
    value.type = ir.TensorType(ir.DataType.INT8)
    return value


def _plane(linear: LinearLowering, packed: ir.Value, name: str, bits: int, count: int) -> ir.Value:
    """The first `count` fields of `bits` bits of a plane: uint8 [count]."""
    # [bytes, 1] >> [0, bits, …] → [bytes, fields], the lowest bits first
    column = linear.add("Reshape", [packed, linear.constant(f"{name}_column", np.array([-1, 1]))])
    shifts = _bytes(linear, f"{name}_shifts", range(0, 8, bits))
    shifted = linear.add("BitShift", [column, shifts], direction="RIGHT")
    fields = linear.add("BitwiseAnd", [shifted, _bytes(linear, f"{name}_mask", [2**bits - 1])])
    flat = linear.add("Reshape", [fields, linear.constant(f"{name}_flat", np.array([-1]))])
    # The last byte may be filled up.
    start = linear.constant(f"{name}_start", np.array([0]))
    end = linear.constant(f"{name}_end", np.array([count]))
    return linear.add("Slice", [flat, start, end])


def _bytes(linear: LinearLowering, name: str, values: Sequence[int]) -> ir.Value:
    return linear.constant(name, np.array(values, np.uint8))
