"""The integer flavour: low-bit codes in the file, integer kernels at run time.

ONNX Runtime fuses MatMul between DequantizeLinear nodes to an integer kernel, but not when a weight is INT4 or INT2 there: then it computes
in float, slower than the float model. So the codes stay packed in the file and pass through a Cast to int8, which is folded when the
model is loaded, and the graph names the kernel itself, with the bias in it, so that no fusion has to be hoped for:

    x → QuantizeLinear(uint8) [→ Clip(0, 15)]  ┐
    codes (INT4) → Cast(int8)                  ┴ MatMulIntegerToFloat(scales, zero points, bias)

The kernel is in ONNX Runtime's own domain `com.microsoft`; the operators around it are standard. Written as DequantizeLinear → MatMul → Add
it would run too, but with the bias as a pass of its own: at batch 1 that costs a tenth of the whole forward of a ViT-S.

2-bit codes are INT2 (opset 25), 4-bit codes INT4 (opset 21), 8-bit codes int8. ONNX has no 3-bit type: those are two uint8 planes
(marrq/packing.py), unpacked by shifts, masks and ors, which are folded at load too. 3- and 4-bit activations are uint8 codes clipped to
0 … 7 and 0 … 15.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.passes import absorb_scales, add_constant, placeholders, split_qkv
from exporters.trace import PLACEHOLDER_DOMAIN, trace, with_placeholders
from marrq.activations import ActivationQuantizer
from marrq.errors import MarrqError
from marrq.modules import QuantLinear, quantized_linears
from marrq.packing import packed_planes
from marrq.pipeline import QuantizedModel

KERNEL, KERNEL_DOMAIN = "MatMulIntegerToFloat", "com.microsoft"

OPSETS = {2: 25, 3: 20, 4: 21, 8: 20}
"""Lowest opset for each weight width: 20 has Gelu, 21 INT4, 25 INT2."""


def check_scheme(model: QuantizedModel) -> None:
    """Raise MarrqError when the flavour cannot express the scheme."""
    activation = model.scheme.activation
    if activation is None or activation.strategy != "per-tensor":
        raise MarrqError(
            f"the integer flavour needs static per-tensor activations, the artifact has {model.scheme.description}: "
            "quantize with a scheme such as W4A8 and --activations per-tensor, or measure it in torch with `marrq evaluate`"
        )
    for what, present in (("group scales", model.scheme.weight.group_size), ("a low-rank branch", model.method.lowrank)):
        if present is not None:
            raise MarrqError(f"the integer flavour has no {what}: quantize without, or measure it in torch with `marrq evaluate`")


def export_integer(model: QuantizedModel) -> ir.Model:
    """The graph of a quantized model on integer kernels."""
    check_scheme(model)
    linears = quantized_linears(model.module)
    graph_model = trace(with_placeholders(model.module), model.preprocessing.input_size, OPSETS[model.scheme.weight.num_bits])
    split_qkv(graph_model.graph)
    absorb_scales(graph_model.graph)
    lowering = _Lowering(graph_model.graph)
    for node in placeholders(graph_model.graph):
        lowering.replace(node, linears[node.attributes["path"].as_string()])
    del graph_model.opset_imports[PLACEHOLDER_DOMAIN]
    graph_model.opset_imports[KERNEL_DOMAIN] = 1
    return graph_model


@dataclass(frozen=True)
class _Rows:
    """What a placeholder stands for: rows of a linear, as they go into the graph.

    codes: [in, rows], int8; scale: float32 [rows], with LayerScale in it; zero_point: int8 [rows]; bias: float32 [rows] or None.
    """

    codes: Tensor
    num_bits: int
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, node: ir.Node, linear: QuantLinear) -> "_Rows":
        """Cut the linear's rows out, and take in the factor of the output."""
        rows = slice(None)
        if "part" in node.attributes:
            third = len(linear.codes) // 3
            start = "qkv".index(node.attributes["part"].as_string()) * third
            rows = slice(start, start + third)
        scale, bias = linear.scale[rows, 0], None if linear.bias is None else linear.bias[rows]
        if "output_scale" in node.attributes:
            factor = torch.from_numpy(node.attributes["output_scale"].as_tensor().numpy())
            scale, bias = scale * factor, None if bias is None else bias * factor
        return cls(linear.codes[rows].T.contiguous(), linear.spec.num_bits, scale, linear.zero_point[rows, 0], bias)


class _Lowering:
    """Replaces placeholders in one graph; linears that share an input share its quantization."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.quantized_inputs: dict[tuple[ir.Value, float, int], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def replace(self, node: ir.Node, linear: QuantLinear) -> None:
        """Put the integer pattern in the place of one placeholder."""
        path = node.attributes["path"].as_string()
        chain = _Chain(self.graph, f"{path}.{node.attributes['part'].as_string()}" if "part" in node.attributes else path)
        rows = _Rows.of(node, linear)
        x = node.inputs[0]
        assert x is not None
        assert linear.input is not None
        key = (x, linear.input.scale.item(), int(linear.input.zero_point))
        if key not in self.quantized_inputs:
            self.quantized_inputs[key] = _quantized_input(chain, x, linear.input)
        result = chain.add(KERNEL, _operands(chain, rows, *self.quantized_inputs[key]), domain=KERNEL_DOMAIN)
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], chain.nodes, [node.outputs[0]], [result])


class _Chain:
    """New nodes and initializers for one linear, named by its path."""

    def __init__(self, graph: ir.Graph, path: str) -> None:
        self.graph, self.path, self.nodes = graph, path, list[ir.Node]()

    def add(self, op_type: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: int | str) -> ir.Value:
        """Append a node with one output."""
        name = f"{self.path}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, domain=domain, attributes=attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an initializer of the linear's own."""
        return add_constant(self.graph, f"{self.path}.{name}", array)


def _quantized_input(chain: _Chain, x: ir.Value, quantizer: ActivationQuantizer) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes of the input, their scale and their zero point."""
    scale = chain.constant("input_scale", quantizer.scale.numpy())
    zero_point = chain.constant("input_zero_point", quantizer.zero_point.numpy().astype(np.uint8))
    codes = chain.add("QuantizeLinear", [x, scale, zero_point])
    low, high = quantizer.spec.code_range
    if high < 255:
        limits = [chain.constant(f"input_{name}", np.array(value, np.uint8)) for name, value in (("low", low), ("high", high))]
        codes = chain.add("Clip", [codes, *limits])
    return codes, scale, zero_point


def _operands(chain: _Chain, rows: _Rows, codes: ir.Value, scale: ir.Value, zero_point: ir.Value) -> list[ir.Value]:
    """The kernel's inputs in its order: codes, then scales, then zero points of input and weight; bias."""
    weight_scale = chain.constant("weight_scale", rows.scale.numpy())
    weight_zero_point = chain.constant("weight_zero_point", rows.zero_point.numpy())
    bias = [] if rows.bias is None else [chain.constant("bias", rows.bias.numpy())]
    return [codes, _int8_codes(chain, rows), scale, weight_scale, zero_point, weight_zero_point, *bias]


def _int8_codes(chain: _Chain, rows: _Rows) -> ir.Value:
    """Codes [in, rows] as int8, from the narrowest initializer that holds them."""
    if rows.num_bits == 8:
        return chain.constant("weight_codes", rows.codes.numpy())
    if rows.num_bits == 3:
        low, high = packed_planes(rows.codes, 3)
        return _unpack_3bit(chain, chain.constant("weight_low", low.numpy()), chain.constant("weight_high", high.numpy()), rows.codes.shape)
    packed = chain.constant("weight_codes", rows.codes.numpy().astype({2: ml_dtypes.int2, 4: ml_dtypes.int4}[rows.num_bits]))
    return chain.add("Cast", [packed], to=int(ir.DataType.INT8))


def _unpack_3bit(chain: _Chain, low: ir.Value, high: ir.Value, shape: Sequence[int]) -> ir.Value:
    """Two planes to int8 codes: u = low | high << 2 is the two's complement, (u xor 4) - 4 the code."""
    count = int(np.prod(shape))

    def bytes_constant(name: str, values: Sequence[int]) -> ir.Value:
        return chain.constant(name, np.array(values, np.uint8))

    def plane(packed: ir.Value, name: str, bits: int) -> ir.Value:  # [count] uint8
        column = chain.add("Reshape", [packed, chain.constant(f"{name}_column", np.array([-1, 1]))])
        shifted = chain.add("BitShift", [column, bytes_constant(f"{name}_shifts", range(0, 8, bits))], direction="RIGHT")
        parts = chain.add("BitwiseAnd", [shifted, bytes_constant(f"{name}_mask", [2**bits - 1])])
        flat = chain.add("Reshape", [parts, chain.constant(f"{name}_flat", np.array([-1]))])
        return chain.add("Slice", [flat, chain.constant(f"{name}_start", np.array([0])), chain.constant(f"{name}_end", np.array([count]))])

    lifted = chain.add("BitShift", [plane(high, "high", 1), bytes_constant("high_place", [2])], direction="LEFT")
    union = chain.add("BitwiseOr", [plane(low, "low", 2), lifted])
    flipped = chain.add("BitwiseXor", [union, bytes_constant("sign", [4])])
    signed = chain.add("Cast", [flipped], to=int(ir.DataType.INT8))
    codes = chain.add("Sub", [signed, chain.constant("offset", np.array([4], np.int8))])
    return chain.add("Reshape", [codes, chain.constant("weight_shape", np.array(shape, np.int64))])
