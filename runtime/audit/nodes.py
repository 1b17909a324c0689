"""What single nodes of an ONNX graph are: where their operands are, what they do to types, and what
their attributes say."""

import re
from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, TensorProto, helper


@dataclass(frozen=True)
class Operands:
    """Places of the operands among the inputs of an operator that multiplies.

    first, second: the two operands.
    first_zero_point: of the first operand; None if the operator takes none.
    second_grid: scale and zero point of the second operand, as far as the operator takes them.
    """

    first: int = 0
    second: int = 1
    first_zero_point: int | None = None
    second_grid: tuple[int, ...] = ()


# Operators that multiply two operands.
PRODUCTS = {
    # Float products; also the patterns that are fused to integer ones.
    "MatMul": Operands(),
    "FusedMatMul": Operands(),
    "Gemm": Operands(),
    "FusedGemm": Operands(),
    "Conv": Operands(),
    "FusedConv": Operands(),
    # Integer products, whose sums other nodes make floats of.
    "MatMulInteger": Operands(first_zero_point=2, second_grid=(3,)),
    "ConvInteger": Operands(first_zero_point=2, second_grid=(3,)),
    "DynamicQuantizeMatMul": Operands(second_grid=(2, 3)),
    "MatMulIntegerToFloat": Operands(first_zero_point=4, second_grid=(3, 5)),
    "MatMulNBits": Operands(second_grid=(2, 3, 4)),
    # Operators that quantize their output too take the operands with their grids between.
    "QLinearMatMul": Operands(second=3, first_zero_point=2, second_grid=(4, 5)),
    "QLinearConv": Operands(second=3, first_zero_point=2, second_grid=(4, 5)),
    "QGemm": Operands(second=3, first_zero_point=2, second_grid=(4, 5)),
}

# These multiply floats, and give the type that they take.
FLOAT_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "Attention")

# Operators that move numbers about, or cut them, and leave their type.
# fmt: off
MOVING = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Split", "Slice",
    "Gather", "Clip",
)
# fmt: on

# These give true or false, whatever they read.
# fmt: off
BOOLEAN = (
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not",
    "IsNaN", "IsInf",
)
# fmt: on

ONNXRUNTIME_DOMAIN = "com.microsoft"

TYPES = {"float": "float32", "double": "float64"}

# The type of a Constant that is written as numbers in place of a tensor, by its attribute.
NUMBERS = {
    "value_float": TensorProto.FLOAT,
    "value_floats": TensorProto.FLOAT,
    "value_int": TensorProto.INT64,
    "value_ints": TensorProto.INT64,
}


def operands(node: NodeProto) -> Operands | None:
    """Where the operands of a node that multiplies are; None for any other node."""
    # ONNX Runtime's own Attention makes q, k and v with one weight; ONNX's takes all three.
    if node.op_type == "Attention" and node.domain == ONNXRUNTIME_DOMAIN:
        return Operands()
    return PRODUCTS.get(node.op_type)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    return next(
        (helper.get_attribute_value(found) for found in node.attribute if found.name == name),
        default,
    )


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant; None of any other node, and of a text."""
    if node.op_type != "Constant" or not node.attribute:
        return None
    [found] = node.attribute
    if found.name not in NUMBERS:
        return found.t if found.name == "value" else None
    numbers = helper.get_attribute_value(found)
    if found.name.endswith("s"):
        return helper.make_tensor(node.output[0], NUMBERS[found.name], [len(numbers)], numbers)
    return helper.make_tensor(node.output[0], NUMBERS[found.name], [], [numbers])


def type_name(number: int) -> str:
    """`float32`, `int4` and so on, of ONNX's number for a type."""
    # ONNX calls float32 FLOAT; the others have their bits in their names.
    name: str = TensorProto.DataType.Name(number).lower()
    return TYPES.get(name, name)


def bits_of_type(name: str) -> int:
    """Bits of a number of that type in a file."""
    match = re.search(r"\d+", name)
    return int(match[0]) if match else 8  # bool has no number in its name
