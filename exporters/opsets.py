"""What a graph asks of a runtime: opsets, IR versions, and the first ONNX Runtime that runs it.

A file states the lowest opset and IR version that it needs, because a server refuses versions newer
than it knows. The versions of ONNX Runtime were found by loading files of each kind under 1.17.0,
1.18.0 and so on to 1.23.0, and 1.24.1, and comparing the logits with torch's.
"""

import onnx_ir as ir

from marrq.schemes import Scheme

ONNXRUNTIME_DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

OPSET = 20
"""The opset of a trace: the lowest that has Gelu."""

BLOCK_OPSET = 21
"""The lowest whose QuantizeLinear and DequantizeLinear take a scale per block of an axis."""

ATTENTION_OPSET = 23
"""The opset whose Attention has a kernel in ONNX Runtime. Attention of opset 24 and later is split
into single operators."""

WEIGHT_OPSETS = {2: 25, 3: OPSET, 4: 21, 8: OPSET}
"""Lowest opset with a type for the codes, by their bits: INT2 is of opset 25, INT4 of opset 21."""

TYPE_OPSETS = {ir.DataType.INT4: WEIGHT_OPSETS[4], ir.DataType.INT2: WEIGHT_OPSETS[2]}
"""The same by the type itself."""

IR_VERSIONS = {20: 9, 21: 10, 23: 11, 25: 13}
"""IR version that was released with each opset."""

FLOAT_ONNXRUNTIME = "1.17.0"
"""First ONNX Runtime that runs the float flavours with torch's logits."""

WIDENED_ONNXRUNTIME = {2: "1.24.1", 3: "1.21.0", 4: "1.23.0", 8: "1.17.0"}
"""First ONNX Runtime that runs codes which are widened to int8, by their bits."""

BLOCK_ONNXRUNTIME = "1.19.0"
"""First ONNX Runtime that runs QuantizeLinear with a scale per block."""

FUSED_ONNXRUNTIME = "1.24.1"
"""First ONNX Runtime that runs Attention, and whose CUDA provider has the kernels of the operators
that exporters/passes write for it, by its documentation."""


def opset_of(scheme: Scheme) -> int:
    """The lowest opset for the codes of weights and activations."""
    # A per-token grid is a QuantizeLinear with one block per token.
    per_token = scheme.activation is not None and not scheme.activation.is_static
    # The opset of the weight's type, or more if the activations need it.
    return max(WEIGHT_OPSETS[scheme.weight.num_bits], BLOCK_OPSET if per_token else OPSET)


def lowest_opset(graph: ir.Graph) -> int:
    """The lowest opset that a graph of float products needs: that of its narrowest codes, and of
    Attention if it has one."""
    # No other operator or type that a float graph has is younger than the trace's opset.
    types = {value.dtype for value in graph.initializers.values()}
    needs = [opset for dtype, opset in TYPE_OPSETS.items() if dtype in types]
    if _has_attention(graph):
        needs.append(ATTENTION_OPSET)
    return max(needs, default=OPSET)


def lowest_onnxruntime(model: ir.Model, device: str) -> str:
    """First ONNX Runtime that was seen to run what a graph has beside its linears, or whose CUDA
    provider has its kernels by the documentation. device: of exporters/choices.py."""
    on_gpu = device == "gpu" and ONNXRUNTIME_DOMAIN in model.opset_imports
    return FUSED_ONNXRUNTIME if on_gpu or _has_attention(model.graph) else FLOAT_ONNXRUNTIME


def _has_attention(graph: ir.Graph) -> bool:
    return any(node.op_type == "Attention" and node.domain == "" for node in graph)
