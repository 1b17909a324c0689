"""Operators for which ONNX Runtime's CUDA provider has kernels.

Source: docs/OperatorKernels.md of ONNX Runtime, section CUDAExecutionProvider, at commit
001d12d2623fd411ce0f83d05abb5e82304a3389 of early 2026, between releases 1.24 and 1.25. Later
releases have more kernels, not fewer.

Of ONNX's domain every operator is here that reads tensors, so one that is not here has no kernel.
Left out are operators of sequences; RandomNormal and RandomUniform, which read nothing; and
MemcpyFromHost and MemcpyToHost, which ONNX Runtime puts in itself. Of com.microsoft those are left
out that make texts: BeamSearch, GreedySearch, Sampling, WhisperBeamSearch, NGramRepeatBlock and
DynamicTimeWarping. The source names none for strings, and of training none but forms of Dropout.
Its third domain, for images with channels last, is in no file.

A kernel is registered for the opsets at which its operator was defined: `13-20` for definitions of
opset 13 to 20, `23+` for that of opset 23 alone. ONNX defines an operator anew when it takes a new
type, and a kernel `23+` does not run the definition of opset 24 (ONNX Runtime's kernel registry,
`VerifyVersion`). So a file with a later opset than it needs may lose its kernels: the operator then
runs on the CPU, without a word. Reshape, Transpose and Cast of opset 25, which INT2 asks for, are
such operators.

Types are those of one operand, of the ones that a vision transformer's file may have: float16,
float32, int4, uint4, int8, uint8, int32, int64 and bool. What else decides is not told here: the
types of other operands and of the result (Cast to int4), and attributes.
"""

import math
from collections.abc import Sequence

import onnx
from onnx import NodeProto

from runtime.audit.nodes import ONNXRUNTIME_DOMAIN

FLOATS = ("float16", "float32")
NUMBERS = (*FLOATS, "int32", "int64")
BYTES = ("int8", "uint8")
ALL = (*NUMBERS, *BYTES, "bool")
UNKNOWN = "unknown"

ONNX_KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "Abs": {"6-12 13+": (*NUMBERS, *BYTES)},
    "Add": {"7-12 13": NUMBERS, "14+": (*NUMBERS, *BYTES)},
    "Affine": {"1+": FLOATS},
    "And": {"7+": ("bool",)},
    "ArgMax": {"1-11 12 13+": FLOATS},
    "ArgMin": {"1-11 12 13+": FLOATS},
    "Attention": {"23 24+": FLOATS},
    "AveragePool": {"7-9 10 11-18 19-21 22+": FLOATS},
    "BatchNormalization": {"7-8 9-13 14 15+": FLOATS},
    "Cast": {"6-8 9-12 13-18 19-20 21-22 23+": ALL},
    "Ceil": {"6-12 13+": FLOATS},
    "Clip": {"6-10 11": ("float32",), "12 13+": (*FLOATS, "int64", *BYTES)},
    "Compress": {"9-10 11+": ALL},
    "Concat": {"4-10 11-12 13+": ALL},
    "ConstantOfShape": {"9+": ("int64",)},
    "Conv": {"1-10 11-21 22+": FLOATS},
    "ConvTranspose": {"1-10 11+": FLOATS},
    "Cos": {"7+": FLOATS},
    "Crop": {"1+": FLOATS},
    "CumSum": {"11-13": ("float32", "int32", "int64"), "14+": NUMBERS},
    "DepthToSpace": {"1-10 11-12 13+": FLOATS},
    "DequantizeLinear": {"10-12 13-18 19-20": BYTES, "21+": ("int4", "uint4", *BYTES)},
    "Div": {"7-12 13": NUMBERS, "14+": (*NUMBERS, *BYTES)},
    "Dropout": {"7-9 10-11 12 13+": FLOATS},
    "DynamicSlice": {"1+": ALL},
    "Einsum": {"12+": FLOATS},
    "Elu": {"6+": FLOATS},
    "Equal": {"7-10": ("int32", "int64", "bool"), "11-12 13+": (*NUMBERS, "bool")},
    "Erf": {"9-12 13+": FLOATS},
    "Exp": {"6-12 13+": FLOATS},
    "Expand": {"8-12 13+": ALL},
    "EyeLike": {"9+": ("float32", "int32", "int64")},
    "Flatten": {"1-8 9-10 11-12 13+": ALL},
    "Floor": {"6-12 13+": FLOATS},
    "GRU": {"7-13 14+": FLOATS},
    "Gather": {"1-10 11-12 13+": ALL},
    "GatherElements": {"11-12 13+": ALL},
    "GatherND": {"11 12 13+": (*FLOATS, "int64", "bool")},
    "Gelu": {"20+": FLOATS},
    "Gemm": {"7-8 9-10 11-12 13+": FLOATS},
    "GlobalAveragePool": {"1+": FLOATS},
    "GlobalMaxPool": {"1+": FLOATS},
    "Greater": {"7-8": FLOATS, "9-12 13+": NUMBERS},
    "GreaterOrEqual": {"12-15 16+": NUMBERS},
    "GridSample": {"16-19 20-21 22+": ("float32",)},
    "HardSigmoid": {"6-21 22+": FLOATS},
    "HardSwish": {"14-21 22+": FLOATS},
    "Identity": {"1-12 13 14-18 19+": ALL},
    "If": {"1-10 11-12 13-18 19+": ("bool",)},
    "ImageScaler": {"1+": FLOATS},
    "InstanceNormalization": {"6+": FLOATS},
    "IsInf": {"10-19": ("float32",), "20+": FLOATS},
    "IsNaN": {"9-12 13-19 20+": FLOATS},
    "LRN": {"1-12 13+": FLOATS},
    "LSTM": {"7-13 14+": FLOATS},
    "LayerNormalization": {"1-16 17+": FLOATS},
    "LeakyRelu": {"6-15 16+": FLOATS},
    "Less": {"7-8": FLOATS, "9-12 13+": NUMBERS},
    "LessOrEqual": {"12-15 16+": NUMBERS},
    "Log": {"6-12 13+": FLOATS},
    "LogSoftmax": {"1-10 11-12 13+": FLOATS},
    "Loop": {"1-10 11-12 13-18 19+": ALL},
    "MatMul": {"1-8 9-12 13+": FLOATS},
    "MatMulInteger": {"10+": ("int8",)},
    "Max": {"6-11": FLOATS, "12 13+": NUMBERS},
    "MaxPool": {"1-7 8-9 10 11": FLOATS, "12+": (*FLOATS, *BYTES)},
    "Min": {"6-11": FLOATS, "12 13+": NUMBERS},
    "Mod": {"10-12 13+": NUMBERS},
    "Mul": {"7-12 13": NUMBERS, "14+": (*NUMBERS, *BYTES)},
    "Neg": {"6-12 13+": (*NUMBERS, "int8")},
    "NonZero": {"9-12 13+": (*NUMBERS, "uint8", "bool")},
    "Not": {"1+": ("bool",)},
    "OneHot": {"11+": (*FLOATS, "int64")},
    "Or": {"7+": ("bool",)},
    "PRelu": {"7-8 9-15 16+": FLOATS},
    "Pad": {"2-10 11-12": FLOATS, "13-17 18+": (*FLOATS, "bool")},
    "ParametricSoftplus": {"1+": FLOATS},
    "Pow": {"7-11": FLOATS, "12 13-14 15+": NUMBERS},
    "QuantizeLinear": {"10-12 13-18": ("float32",), "19-20 21+": FLOATS},
    "RMSNormalization": {"23+": FLOATS},
    "RNN": {"7-13 14+": FLOATS},
    "RandomNormalLike": {"1+": ALL},
    "RandomUniformLike": {"1+": ALL},
    "Range": {"11+": ("float32", "int32", "int64")},
    "Reciprocal": {"6-12 13+": FLOATS},
    "ReduceL1": {"1-17 18+": (*FLOATS, "int32")},
    "ReduceL2": {"1-17 18+": (*FLOATS, "int32")},
    "ReduceLogSum": {"1-17 18+": FLOATS},
    "ReduceLogSumExp": {"1-17 18+": FLOATS},
    "ReduceMax": {"1-17 18+": NUMBERS},
    "ReduceMean": {"1-17 18+": (*FLOATS, "int32")},
    "ReduceMin": {"1-17 18+": (*NUMBERS, *BYTES)},
    "ReduceProd": {"1-17 18+": (*FLOATS, "int32")},
    "ReduceSum": {"1-12 13+": NUMBERS},
    "ReduceSumSquare": {"1-17 18+": FLOATS},
    "Relu": {"6-12 13 14+": FLOATS},
    "Reshape": {"1-4 5-12 13 14-18 19-20 21-22 23+": ALL},
    "Resize": {"10 11-12 13-17 18 19+": (*FLOATS, "int32", "uint8")},
    "ReverseSequence": {"10+": ALL},
    "RoiAlign": {"10+": ("float32",)},
    "RotaryEmbedding": {"23+": FLOATS},
    "Round": {"11+": FLOATS},
    "ScaledTanh": {"1+": FLOATS},
    "Scan": {"8 9-10 11-15 16-18 19+": ALL},
    "Scatter": {"9-10": ALL},
    "ScatterElements": {"11-12 13-15 16-17 18+": ALL},
    "ScatterND": {"11-12 13-15 16-17 18+": ALL},
    "Selu": {"6+": FLOATS},
    "Shape": {"1-12 13-14 15-18 19-20 21-22 23+": ALL},
    "Shrink": {"9+": (*NUMBERS, *BYTES)},
    "Sigmoid": {"6-12 13+": FLOATS},
    "Sign": {"13+": (*NUMBERS, *BYTES)},
    "SimplifiedLayerNormalization": {"1+": FLOATS},
    "Sin": {"7+": FLOATS},
    "Size": {"1-12 13+": ALL},
    "Slice": {"1-9 10 11-12 13+": ALL},
    "Softmax": {"1-10 11-12 13+": FLOATS},
    "Softplus": {"1+": FLOATS},
    "Softsign": {"1+": FLOATS},
    "SpaceToDepth": {"1-12 13+": FLOATS},
    "Split": {"2-10 11-12 13-17 18+": ALL},
    "Sqrt": {"6-12 13+": FLOATS},
    "Squeeze": {"1-10 11-12 13-20 21-22 23+": ALL},
    "Sub": {"7-12 13": NUMBERS, "14+": (*NUMBERS, *BYTES)},
    "Sum": {"6-7 8-12 13+": FLOATS},
    "Tanh": {"6-12 13+": FLOATS},
    "TensorScatter": {"24+": ALL},
    "ThresholdedRelu": {"1+ 10+": FLOATS},
    "Tile": {"6-12 13+": NUMBERS},
    "TopK": {"1-9 10 11+": NUMBERS},
    "Transpose": {"1-12 13-20 21-22 23+": ALL},
    "Trilu": {"14+": ALL},
    "Unsqueeze": {"1-10 11-12 13-20 21-22 23+": ALL},
    "Upsample": {"7-8 9": (*FLOATS, "int32", "uint8")},
    "Where": {"9-15 16+": (*NUMBERS, "uint8")},
    "Xor": {"7+": ("bool",)},
}
"""By operator of ONNX: the definitions that have a kernel, and the types of the operand."""

ONNXRUNTIME_KERNELS: dict[str, tuple[str, ...]] = {
    "Attention": FLOATS,
    "BiasAdd": FLOATS,
    "BiasDropout": FLOATS,
    "BiasGelu": FLOATS,
    "BiasSoftmax": FLOATS,
    "BiasSplitGelu": FLOATS,
    "BitmaskBiasDropout": FLOATS,
    "BitmaskDropout": FLOATS,
    "ComplexMul": FLOATS,
    "ComplexMulConj": FLOATS,
    "ConvTransposeWithDynamicPads": ("float32",),
    "DecoderAttention": FLOATS,
    "DecoderMaskedMultiHeadAttention": FLOATS,
    "DecoderMaskedSelfAttention": FLOATS,
    "DequantizeLinear": ("float16",),
    "DequantizeWithOrder": ("int8",),
    "EmbedLayerNormalization": FLOATS,
    "FastGelu": FLOATS,
    "FusedConv": ("float32",),
    "FusedMatMul": FLOATS,
    "GatedRelativePositionBias": FLOATS,
    "GatherBlockQuantized": ("int4", "uint4", "uint8"),
    "Gelu": FLOATS,
    "GemmFloat8": FLOATS,
    "GemmaRotaryEmbedding": ("float32",),
    "GridSample": ("float32",),
    "GroupNorm": FLOATS,
    "GroupQueryAttention": ("float16",),
    "Inverse": FLOATS,
    "Irfft": FLOATS,
    "LongformerAttention": FLOATS,
    "MatMulBnb4": FLOATS,
    "MatMulNBits": FLOATS,
    "MoE": FLOATS,
    "MultiHeadAttention": FLOATS,
    "NhwcConv": FLOATS,
    "PackedAttention": FLOATS,
    "PackedMultiHeadAttention": FLOATS,
    "PagedAttention": ("float16",),
    "QAttention": ("int8",),
    "QMoE": ("float16",),
    "QOrderedAttention": ("int8",),
    "QOrderedGelu": ("int8",),
    "QOrderedLayerNormalization": ("int8",),
    "QOrderedLongformerAttention": ("int8",),
    "QOrderedMatMul": ("int8",),
    "QuantizeLinear": ("float16",),
    "QuantizeWithOrder": FLOATS,
    "QuickGelu": FLOATS,
    "RelativePositionBias": FLOATS,
    "RemovePadding": FLOATS,
    "RestorePadding": FLOATS,
    "Rfft": FLOATS,
    "RotaryEmbedding": FLOATS,
    "SkipGroupNorm": FLOATS,
    "SkipLayerNormalization": FLOATS,
    "SkipSimplifiedLayerNormalization": FLOATS,
    "SparseAttention": ("float16",),
    "TransposeMatMul": FLOATS,
    "Trilu": ALL,
    "UnfoldTensor": ALL,
}
"""By operator of ONNX Runtime's own, all of version 1: the types of the operand."""

IN_ONNX_DOMAIN: dict[str, float] = {
    "Affine": 9,
    "Crop": 9,
    "DynamicSlice": 9,
    "ImageScaler": 9,
    "LayerNormalization": 16,
    "ParametricSoftplus": 9,
    "ScaledTanh": 9,
    "SimplifiedLayerNormalization": math.inf,
    "ThresholdedRelu": 9,
}
"""Operators of ONNX's domain that ONNX Runtime defines itself, as version 1, up to that opset. Then
ONNX has them, or they are no more."""

OPERAND = {
    ("", "OneHot"): 2,
    ("", "Where"): 1,
    (ONNXRUNTIME_DOMAIN, "DequantizeLinear"): 1,
    (ONNXRUNTIME_DOMAIN, "EmbedLayerNormalization"): 2,
}
"""By domain and operator: the input whose type the tables state, if it is not the first."""


def has_kernel(node: NodeProto, opset: int, types: Sequence[str]) -> bool:
    """Whether the CUDA provider has a kernel for a node.

    opset: of ONNX, as the file states it. types: of the node's inputs, as `float16`; a type that
    is `unknown` is not held against the node. Raises onnx.defs.SchemaError for an operator that the
    opset does not have.
    """
    operand = types[OPERAND.get((node.domain, node.op_type), 0)] if types else ""
    if node.domain == ONNXRUNTIME_DOMAIN:
        return _takes(ONNXRUNTIME_KERNELS.get(node.op_type, ()), operand)
    if node.op_type not in ONNX_KERNELS:
        return False
    defined = _defined(node, opset)
    return any(
        _takes(allowed, operand) and any(_covers(one, defined) for one in versions.split())
        for versions, allowed in ONNX_KERNELS[node.op_type].items()
    )


def _takes(allowed: Sequence[str], operand: str) -> bool:
    return operand in allowed or (operand == UNKNOWN and bool(allowed))


def _defined(node: NodeProto, opset: int) -> int:
    """The opset at which the definition that the file uses was made."""
    if opset <= IN_ONNX_DOMAIN.get(node.op_type, 0):
        return 1
    return onnx.defs.get_schema(node.op_type, opset, node.domain).since_version


def _covers(versions: str, defined: int) -> bool:
    """Whether a kernel registered for `11-12`, `13` or `14+` runs a definition of that opset."""
    first, _, last = versions.rstrip("+").partition("-")
    return int(first) <= defined <= int(last or first)
