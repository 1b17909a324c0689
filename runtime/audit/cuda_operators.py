"""Operators for which ONNX Runtime's CUDA provider has kernels: those that graphs of vision
transformers are made of.

Source: docs/OperatorKernels.md of ONNX Runtime, section CUDAExecutionProvider, at commit
001d12d2623fd411ce0f83d05abb5e82304a3389 of early 2026, between releases 1.24 and 1.25. Later
releases have more kernels, not fewer.

A kernel is registered for the opsets at which its operator was defined: `13-20` for definitions of
opset 13 to 20, `23+` for that of opset 23 alone. ONNX defines an operator anew when it takes a new
type, and a kernel `23+` does not run the definition of opset 24 (ONNX Runtime's kernel registry,
`VerifyVersion`). So a file with a later opset than it needs may lose its kernels: the operator then
runs on the CPU, without a word. Reshape, Transpose and Cast of opset 25, which INT2 asks for, are
such operators.
"""

from collections.abc import Sequence

import onnx
from onnx import NodeProto

from runtime.audit.nodes import ONNXRUNTIME_DOMAIN

FLOATS = ("float16", "float32")
NUMBERS = (*FLOATS, "int32", "int64")
ALL = (*NUMBERS, "int8", "uint8", "bool")

ONNX_KERNELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Abs": ("6-12 13+", (*NUMBERS, "int8", "uint8")),
    "Add": ("7-12 13 14+", NUMBERS),
    "And": ("7+", ("bool",)),
    "ArgMax": ("1-11 12 13+", FLOATS),
    "Attention": ("23 24+", FLOATS),
    "AveragePool": ("7-9 10 11-18 19-21 22+", FLOATS),
    "BatchNormalization": ("7-8 9-13 14 15+", FLOATS),
    "Cast": ("6-8 9-12 13-18 19-20 21-22 23+", ALL),
    "Ceil": ("6-12 13+", FLOATS),
    "Clip": ("12 13+", (*FLOATS, "int64", "int8", "uint8")),
    "Concat": ("4-10 11-12 13+", ALL),
    "ConstantOfShape": ("9+", ("int64",)),
    "Conv": ("1-10 11-21 22+", FLOATS),
    "ConvTranspose": ("1-10 11+", FLOATS),
    "Cos": ("7+", FLOATS),
    "CumSum": ("14+", NUMBERS),
    "DequantizeLinear": ("10-12 13-18 19-20 21+", ("int8", "uint8", "int4", "uint4")),
    "Div": ("7-12 13 14+", NUMBERS),
    "Einsum": ("12+", FLOATS),
    "Elu": ("6+", FLOATS),
    "Equal": ("7-10 11-12 13+", (*NUMBERS, "bool")),
    "Erf": ("9-12 13+", FLOATS),
    "Exp": ("6-12 13+", FLOATS),
    "Expand": ("8-12 13+", ALL),
    "Flatten": ("1-8 9-10 11-12 13+", ALL),
    "Floor": ("6-12 13+", FLOATS),
    "Gather": ("1-10 11-12 13+", ALL),
    "GatherElements": ("11-12 13+", ALL),
    "Gelu": ("20+", FLOATS),
    "Gemm": ("7-8 9-10 11-12 13+", FLOATS),
    "GlobalAveragePool": ("1+", FLOATS),
    "Greater": ("7-8 9-12 13+", NUMBERS),
    "GridSample": ("16-19 20-21 22+", ("float32",)),
    "HardSigmoid": ("6-21 22+", FLOATS),
    "HardSwish": ("14-21 22+", FLOATS),
    "Identity": ("1-12 13 14-18 19+", ALL),
    "LayerNormalization": ("1-16 17+", FLOATS),
    "LeakyRelu": ("6-15 16+", FLOATS),
    "Less": ("7-8 9-12 13+", NUMBERS),
    "Log": ("6-12 13+", FLOATS),
    "MatMul": ("1-8 9-12 13+", FLOATS),
    "MatMulInteger": ("10+", ("int8",)),
    "Max": ("6-11 12 13+", NUMBERS),
    "MaxPool": ("1-7 8-9 10 11 12+", FLOATS),
    "Min": ("6-11 12 13+", NUMBERS),
    "Mod": ("10-12 13+", NUMBERS),
    "Mul": ("7-12 13 14+", NUMBERS),
    "Neg": ("6-12 13+", NUMBERS),
    "Not": ("1+", ("bool",)),
    "Or": ("7+", ("bool",)),
    "Pad": ("2-10 11-12 13-17 18+", (*FLOATS, "bool")),
    "Pow": ("7-11 12 13-14 15+", NUMBERS),
    "QuantizeLinear": ("19-20 21+", FLOATS),
    "RMSNormalization": ("23+", FLOATS),
    "Range": ("11+", ("float32", "int32", "int64")),
    "Reciprocal": ("6-12 13+", FLOATS),
    "ReduceL2": ("1-17 18+", (*FLOATS, "int32")),
    "ReduceMax": ("1-17 18+", NUMBERS),
    "ReduceMean": ("1-17 18+", (*FLOATS, "int32")),
    "ReduceMin": ("1-17 18+", (*NUMBERS, "int8", "uint8")),
    "ReduceSum": ("1-12 13+", NUMBERS),
    "Relu": ("6-12 13 14+", FLOATS),
    "Reshape": ("1-4 5-12 13 14-18 19-20 21-22 23+", ALL),
    "Resize": ("10 11-12 13-17 18 19+", (*FLOATS, "int32", "uint8")),
    "RotaryEmbedding": ("23+", FLOATS),
    "Round": ("11+", FLOATS),
    "ScatterND": ("11-12 13-15 16-17 18+", ALL),
    "Shape": ("1-12 13-14 15-18 19-20 21-22 23+", ALL),
    "Sigmoid": ("6-12 13+", FLOATS),
    "Sin": ("7+", FLOATS),
    "Size": ("1-12 13+", ALL),
    "Slice": ("1-9 10 11-12 13+", ALL),
    "Softmax": ("1-10 11-12 13+", FLOATS),
    "Softplus": ("1+", FLOATS),
    "Split": ("2-10 11-12 13-17 18+", ALL),
    "Sqrt": ("6-12 13+", FLOATS),
    "Squeeze": ("1-10 11-12 13-20 21-22 23+", ALL),
    "Sub": ("7-12 13 14+", NUMBERS),
    "Sum": ("6-7 8-12 13+", FLOATS),
    "Tanh": ("6-12 13+", FLOATS),
    "Tile": ("6-12 13+", NUMBERS),
    "Transpose": ("1-12 13-20 21-22 23+", ALL),
    "Trilu": ("14+", ALL),
    "Unsqueeze": ("1-10 11-12 13-20 21-22 23+", ALL),
    "Where": ("9-15 16+", (*NUMBERS, "uint8")),
}
"""By operator of ONNX: the definitions that have a kernel, and the types of the operand."""

ONNXRUNTIME_KERNELS: dict[str, tuple[str, ...]] = {
    "Attention": FLOATS,
    "BiasAdd": FLOATS,
    "BiasGelu": FLOATS,
    "BiasSoftmax": FLOATS,
    "BiasSplitGelu": FLOATS,
    "DequantizeLinear": ("int8", "uint8"),
    "FastGelu": FLOATS,
    "FusedConv": ("float32",),
    "FusedMatMul": FLOATS,
    "Gelu": FLOATS,
    "GroupNorm": FLOATS,
    "MatMulNBits": FLOATS,
    "MultiHeadAttention": FLOATS,
    "NhwcConv": FLOATS,
    "PackedMultiHeadAttention": FLOATS,
    "QuantizeLinear": ("float16",),
    "QuickGelu": FLOATS,
    "RotaryEmbedding": FLOATS,
    "SimplifiedLayerNormalization": FLOATS,
    "SkipLayerNormalization": FLOATS,
    "SkipSimplifiedLayerNormalization": FLOATS,
}
"""By operator of ONNX Runtime's own, all of version 1: the types of the operand."""

IN_ONNX_DOMAIN = ("SimplifiedLayerNormalization",)
"""Operators of ONNX Runtime's own that stand in ONNX's domain, whose definitions lack them."""

OPERAND = {"Where": 1}
"""The input whose type the tables state, if it is not the first."""


def has_kernel(node: NodeProto, opset: int, types: Sequence[str]) -> bool:
    """Whether the CUDA provider has a kernel for a node.

    opset: of ONNX, as the file states it. types: of the node's inputs, as `float16`. Raises
    onnx.defs.SchemaError for an operator that the opset does not have.
    """
    operand = types[OPERAND.get(node.op_type, 0)] if types else ""
    if node.domain == ONNXRUNTIME_DOMAIN or node.op_type in IN_ONNX_DOMAIN:
        return operand in ONNXRUNTIME_KERNELS.get(node.op_type, ())
    if node.op_type not in ONNX_KERNELS:
        return False
    versions, allowed = ONNX_KERNELS[node.op_type]
    # The opset at which the definition that the file uses was made.
    defined = onnx.defs.get_schema(node.op_type, opset, node.domain).since_version
    return operand in allowed and any(_covers(one, defined) for one in versions.split())


def _covers(versions: str, defined: int) -> bool:
    """Whether a kernel registered for `11-12`, `13` or `14+` runs a definition of that opset."""
    first, _, last = versions.rstrip("+").partition("-")
    return int(first) <= defined <= int(last or first)
