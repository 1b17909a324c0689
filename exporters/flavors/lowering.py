"""What the flavours share: a traced graph, its placeholders one by one, and what each of them
stands for.

A flavour is a function from a `LinearLowering` to the value that takes the placeholder's output's
place. Common to them are the input's codes,

    static     x → QuantizeLinear(scale, zero point) [→ Clip]                                     one grid, found in calibration
    dynamic    x → ReduceMin, ReduceMax → scale, zero point;  x → QuantizeLinear [→ Clip]         one for each token, as
                                                                                                  `grid_from_range` has it

the weight's codes, widened to int8 from the narrowest initializer that holds them, and the low-rank
branch L (R x). An input that has a smoothing is multiplied by it first. All of it is standard ONNX.
2-bit codes are INT2 (opset 25), 4-bit codes INT4 (opset 21), 8-bit codes int8. ONNX has no 3-bit
type: those are two uint8 planes (marrq/quantizers/packing.py), unpacked by shifts, masks and ors,
which ONNX Runtime folds when it loads the file. 3- and 4-bit activations are uint8 codes clipped to
0 … 7 and 0 … 15."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from exporters.passes import (
    absorb_scales,
    add_constant,
    attend_on_tokens,
    drop_copies,
    drop_open_masks,
    drop_unread_tokens,
    flatten_patches,
    fuse_attention,
    placeholders,
    split_qkv,
)
from exporters.trace import OPSET, PLACEHOLDER_DOMAIN, TracedModel
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.activations import ActivationQuantizer
from marrq.quantizers.linear import QuantLinear, StoredFactor, quantized_linears
from marrq.quantizers.packing import packed_planes
from marrq.schemes import Scheme

ONNXRUNTIME_DOMAIN = "com.microsoft"
"""Where ONNX Runtime keeps operators of its own."""

WEIGHT_OPSETS = {2: 25, 3: OPSET, 4: 21, 8: OPSET}
"""Lowest opset whose types hold codes of that width."""

BLOCK_OPSET = 21
"""The lowest in which QuantizeLinear and DequantizeLinear take a scale for each block of an
axis."""

WIDENED_ONNXRUNTIME = {2: "1.24.1", 3: "1.21.0", 4: "1.23.0", 8: "1.17.0"}
"""First ONNX Runtime that was seen to load a file of that weight width, widened to int8, and to
give torch's logits."""

WEIGHT_TENSOR = re.compile(r"(.+?)(?:\.[qkv])?\.(?:(?:weight|lowrank)_\w+|input_smoothing)")
"""Name of an initializer that belongs to a linear's weight; the group is the linear's path."""

LINEARS = "marrq.linears"
"""Key of the metadata that says where each linear begins and ends, by which a bench can run it
alone (`_described`)."""

ATTENTION_OPSET = 23
"""The opset whose Attention ONNX Runtime has a kernel for; the one of opset 24 and later it takes
apart into single operators."""

FUSED_ONNXRUNTIME = "1.24.1"
"""First ONNX Runtime that was seen to run a file of an opset with Attention."""


def opset_of(scheme: Scheme) -> int:
    """The lowest opset for the codes of weights and activations."""
    per_token = scheme.activation is not None and not scheme.activation.is_static
    return max(WEIGHT_OPSETS[scheme.weight.num_bits], BLOCK_OPSET if per_token else OPSET)


@dataclass(frozen=True)
class Rows:
    """What a placeholder stands for: rows of a linear, with the factor of its output (LayerScale)
    taken in.

    codes: int8 [rows, in], the artifact's; scale: float32 [rows, groups]; zero_point: int8 [rows,
    groups]; bias: float32 [rows] or None; left: rows of the low-rank branch's L [rows, r], to be
    multiplied by left_factor [rows]; right: R [r, in]; None where there is none."""

    codes: Tensor
    num_bits: int
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    left: StoredFactor | None
    left_factor: Tensor | None
    right: StoredFactor | None

    @classmethod
    def of(cls, node: ir.Node, linear: QuantLinear) -> "Rows":
        """Cut the linear's rows out, and take in the factor of the output."""
        rows = slice(None)
        if "part" in node.attributes:
            third = len(linear.codes) // 3
            start = "qkv".index(node.attributes["part"].as_string()) * third
            rows = slice(start, start + third)
        scale, bias = linear.scale[rows], None if linear.bias is None else linear.bias[rows]
        factor = None
        if "output_scale" in node.attributes:
            factor = torch.from_numpy(node.attributes["output_scale"].as_tensor().numpy())
            scale, bias = scale * factor[:, None], None if bias is None else bias * factor
        branch = linear.lowrank
        left = None if branch is None else StoredFactor(branch.left.codes[rows], branch.left.scale)
        right = None if branch is None else branch.right
        return cls(
            linear.codes[rows],
            linear.spec.num_bits,
            scale,
            linear.zero_point[rows],
            bias,
            left,
            factor,
            right,
        )


@dataclass(frozen=True)
class InputCodes:
    """A linear's input in uint8 codes, with their scale and zero point: scalars, or per token [...,
    1]."""

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    per_token: bool


class LinearLowering:
    """One placeholder in the graph, and the new nodes and initializers that will replace it, named
    by its path.

    x: its input; quantizer: of the input, None where activations stay in floating point. Linears
    that read the same input share what is made of it."""

    def __init__(
        self,
        graph: ir.Graph,
        node: ir.Node,
        linear: QuantLinear,
        made: dict[tuple[object, ...], InputCodes | ir.Value],
    ) -> None:
        self.graph, self.linear_path = graph, node.attributes["path"].as_string()
        self.path = (
            f"{self.linear_path}.{node.attributes['part'].as_string()}"
            if "part" in node.attributes
            else self.linear_path
        )
        self.rows, self.quantizer = Rows.of(node, linear), linear.input
        self.nodes, self._made = list[ir.Node](), made
        assert node.inputs[0] is not None
        self.x = node.inputs[0]

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        **attributes: int | str,
    ) -> ir.Value:
        """Append a node with one output."""
        name = f"{self.path}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, domain=domain, attributes=attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def split(self, value: ir.Value, axis: int, parts: int) -> list[ir.Value]:
        """Append a node that cuts a value into equal parts."""
        name = f"{self.path}/Split_{len(self.nodes)}"
        node = ir.node(
            "Split",
            [value],
            attributes={"axis": axis, "num_outputs": parts},
            num_outputs=parts,
            name=name,
        )
        for index, output in enumerate(node.outputs):
            output.name = f"{name}_{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an initializer of the linear's own."""
        return add_constant(self.graph, f"{self.path}.{name}", array)

    def input_codes(self) -> InputCodes:
        """The input's codes, made once for all linears that quantize it alike."""
        assert self.quantizer is not None
        key = (self.x, *(numbers.numpy().tobytes() for numbers in self.quantizer.buffers()))
        if key not in self._made:
            self._made[key] = (
                _static_codes(self) if self.quantizer.spec.is_static else _token_codes(self)
            )
        codes = self._made[key]
        assert isinstance(codes, InputCodes)
        return codes

    def input_values(self) -> ir.Value:
        """The input as the torch simulation's products see it: dequantized codes, or x itself."""
        if self.quantizer is None:
            return self.x
        quantized = self.input_codes()
        if (quantized,) not in self._made:
            self._made[quantized,] = _dequantized(self, quantized)
        values = self._made[quantized,]
        assert isinstance(values, ir.Value)
        return values

    def input_components(self) -> ir.Value:
        """R x, once for all parts of a linear that have the same input: [..., r]."""
        key = (self.linear_path, self.x)  # the parts of a linear may read different tokens
        if key not in self._made:
            assert self.rows.right is not None
            right = _factor(self, "lowrank_right", self.rows.right, None)
            self._made[key] = self.add("MatMul", [self.input_values(), right])
        components = self._made[key]
        assert isinstance(components, ir.Value)
        return components


def lower(
    traced: TracedModel, opset: int, lowering: Callable[[LinearLowering], ir.Value]
) -> ir.Model:
    """The graph of a quantized model with each placeholder replaced by what the lowering makes of
    it."""
    linears = traced.linears
    lowered = traced.clone()
    lowered.opset_imports[""] = (
        opset  # later ones take more types in what the trace is made of, and change nothing else
    )
    drop_copies(lowered.graph)
    split_qkv(lowered.graph)
    absorb_scales(lowered.graph)
    flatten_patches(lowered.graph)
    drop_open_masks(lowered.graph)
    if opset == ATTENTION_OPSET:
        fuse_attention(lowered.graph)
        attend_on_tokens(lowered.graph)
    drop_unread_tokens(lowered.graph)
    RemoveUnusedNodesPass()(lowered)  # a linear may stand there twice now, once unread
    made: dict[tuple[object, ...], InputCodes | ir.Value] = {}
    ends: list[tuple[ir.Node, ir.Value, ir.Value]] = []
    for node in placeholders(lowered.graph):
        site = LinearLowering(
            lowered.graph, node, linears[node.attributes["path"].as_string()], made
        )
        entering = site.x  # a lowering may put axes of its own before it
        result = lowering(site)
        ends.append((node, entering, result))
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(
            lowered.graph, node, [node], site.nodes, [node.outputs[0]], [result]
        )
    del lowered.opset_imports[PLACEHOLDER_DOMAIN]
    if any(node.domain == ONNXRUNTIME_DOMAIN for node in lowered.graph):
        lowered.opset_imports[ONNXRUNTIME_DOMAIN] = 1
    lowered.metadata_props[LINEARS] = _described(ends)
    return lowered


def _described(ends: Sequence[tuple[ir.Node, ir.Value, ir.Value]]) -> str:
    """Where each linear begins and ends in the graph, as JSON: by path the parts whose rows make up
    its output, in the order of the rows, each with the names of the value that enters and the value
    that leaves it, and of the tensor of the model (LayerScale) that the latter is multiplied by,
    where there is one. ends: placeholder, value that enters, value that leaves."""
    linears: dict[str, list[dict[str, str | None]]] = {}
    for node, x, y in sorted(
        ends,
        key=lambda end: (
            "part" in end[0].attributes and "qkv".index(end[0].attributes["part"].as_string())
        ),
    ):
        part = {"input": x.name, "output": y.name}
        if "output_scale" in node.attributes:
            part["scale"] = node.attributes["output_scale"].as_tensor().name
        linears.setdefault(node.attributes["path"].as_string(), []).append(part)
    return json.dumps(linears, separators=(",", ":"))


def int8_codes(site: LinearLowering, codes: Tensor) -> ir.Value:
    """The weight's codes, laid out as given, as int8 from the narrowest initializer that holds
    them."""
    num_bits = site.rows.num_bits
    if num_bits == 8:
        return site.constant("weight_codes", codes.numpy())
    if num_bits == 3:
        low, high = packed_planes(codes, 3)
        return _unpack_3bit(
            site,
            site.constant("weight_low", low.numpy()),
            site.constant("weight_high", high.numpy()),
            codes.shape,
        )
    packed = site.constant(
        "weight_codes", codes.numpy().astype({2: ml_dtypes.int2, 4: ml_dtypes.int4}[num_bits])
    )
    return site.add("Cast", [packed], to=int(ir.DataType.INT8))


def with_lowrank(site: LinearLowering, y: ir.Value) -> ir.Value:
    """The output plus L (R x), where the linear has a low-rank branch."""
    if site.rows.left is None:
        return y
    left = _factor(site, "lowrank_left", site.rows.left, site.rows.left_factor)
    return site.add("Add", [y, site.add("MatMul", [site.input_components(), left])])


def with_bias(site: LinearLowering, y: ir.Value) -> ir.Value:
    """The output plus the bias, where the linear has one."""
    return (
        y
        if site.rows.bias is None
        else site.add("Add", [y, site.constant("bias", site.rows.bias.numpy())])
    )


def weight_bits(graph: ir.Graph, model: QuantizedModel) -> float:
    """Bits that the file keeps for a weight of the quantized linears: codes, scales, zero points,
    low-rank branches."""
    linears, stored = quantized_linears(model.module), 0
    for name, value in graph.initializers.items():
        match = WEIGHT_TENSOR.fullmatch(name)
        if match and match[1] in linears and value.const_value is not None:
            stored += 8 * value.const_value.nbytes
    return stored / sum(linear.codes.numel() for linear in linears.values())


def _static_codes(site: LinearLowering) -> InputCodes:
    assert site.quantizer is not None
    scale = site.constant("input_scale", site.quantizer.scale.numpy())
    zero_point = site.constant(
        "input_zero_point", site.quantizer.zero_point.numpy().astype(np.uint8)
    )
    codes = site.add("QuantizeLinear", [_smoothed(site), scale, zero_point])
    return InputCodes(_clipped(site, codes, site.quantizer), scale, zero_point, per_token=False)


def _smoothed(site: LinearLowering) -> ir.Value:
    """The input, times its smoothing where it has one."""
    assert site.quantizer is not None
    if site.quantizer.smoothing is None:
        return site.x
    return site.add(
        "Mul", [site.x, site.constant("input_smoothing", site.quantizer.smoothing.numpy())]
    )


def _token_codes(site: LinearLowering) -> InputCodes:
    """The grid of each token spans its clipped range and 0; all its channels are one block of the
    operators.

    torch gives a range of zeros the scale 1; here it is the least normal number, and codes and zero
    point are 0 with either."""
    assert site.quantizer is not None
    _, high = site.quantizer.spec.code_range
    x, channels = _smoothed(site), site.constant("input_channels", np.array([-1]))
    zero, clip = (
        site.constant("input_zero", np.array(0, np.float32)),
        site.constant("input_clip", site.quantizer.clip.numpy()),
    )
    minimum, maximum = (
        site.add(
            bound,
            [
                site.add("Mul", [site.add(f"Reduce{extreme}", [x, channels], keepdims=1), clip]),
                zero,
            ],
        )
        for extreme, bound in (("Min", "Min"), ("Max", "Max"))
    )
    steps = site.constant("input_steps", np.array(high, np.float32))
    width = site.add("Div", [site.add("Sub", [maximum, minimum]), steps])
    scale = site.add(
        "Max", [width, site.constant("input_least_scale", np.array(np.finfo(np.float32).tiny))]
    )
    below = site.add("Neg", [site.add("Div", [minimum, scale])])
    zero_point = site.add("Cast", [site.add("Round", [below])], to=int(ir.DataType.UINT8))
    codes = site.add(
        "QuantizeLinear", [x, scale, zero_point], axis=-1, block_size=site.rows.codes.shape[1]
    )
    return InputCodes(_clipped(site, codes, site.quantizer), scale, zero_point, per_token=True)


def _dequantized(site: LinearLowering, x: InputCodes) -> ir.Value:
    if x.per_token:
        return site.add(
            "DequantizeLinear",
            [x.codes, x.scale, x.zero_point],
            axis=-1,
            block_size=site.rows.codes.shape[1],
        )
    return site.add("DequantizeLinear", [x.codes, x.scale, x.zero_point])


def _clipped(site: LinearLowering, codes: ir.Value, quantizer: ActivationQuantizer) -> ir.Value:
    """uint8 codes cut to the width of the activations."""
    low, high = quantizer.spec.code_range
    if high == np.iinfo(np.uint8).max:
        return codes
    limits = [
        site.constant(f"input_{name}", np.array(value, np.uint8))
        for name, value in (("low", low), ("high", high))
    ]
    return site.add("Clip", [codes, *limits])


def _factor(
    site: LinearLowering, name: str, factor: StoredFactor, output_scale: Tensor | None
) -> ir.Value:
    """L or R transposed, in float32, from what is stored; ONNX Runtime folds these nodes when it
    loads the file."""
    values = site.add(
        "Cast",
        [site.constant(name, factor.codes.T.contiguous().numpy())],
        to=int(ir.DataType.FLOAT),
    )
    if factor.scale is not None:
        values = site.add(
            "Mul", [values, site.constant(f"{name}_scale", factor.scale.T.contiguous().numpy())]
        )
    if output_scale is not None:
        values = site.add(
            "Mul", [values, site.constant(f"{name}_output_scale", output_scale.numpy())]
        )
    return values


def _unpack_3bit(
    site: LinearLowering, low: ir.Value, high: ir.Value, shape: Sequence[int]
) -> ir.Value:
    """Two planes to int8 codes: u = low | high << 2 is the two's complement, (u xor 4) - 4 the
    code."""
    count = int(np.prod(shape))

    def bytes_constant(name: str, values: Sequence[int]) -> ir.Value:
        return site.constant(name, np.array(values, np.uint8))

    def plane(packed: ir.Value, name: str, bits: int) -> ir.Value:  # [count] uint8
        column = site.add("Reshape", [packed, site.constant(f"{name}_column", np.array([-1, 1]))])
        shifted = site.add(
            "BitShift",
            [column, bytes_constant(f"{name}_shifts", range(0, 8, bits))],
            direction="RIGHT",
        )
        parts = site.add("BitwiseAnd", [shifted, bytes_constant(f"{name}_mask", [2**bits - 1])])
        flat = site.add("Reshape", [parts, site.constant(f"{name}_flat", np.array([-1]))])
        return site.add(
            "Slice",
            [
                flat,
                site.constant(f"{name}_start", np.array([0])),
                site.constant(f"{name}_end", np.array([count])),
            ],
        )

    lifted = site.add(
        "BitShift", [plane(high, "high", 1), bytes_constant("high_place", [2])], direction="LEFT"
    )
    union = site.add("BitwiseOr", [plane(low, "low", 2), lifted])
    flipped = site.add("BitwiseXor", [union, bytes_constant("sign", [4])])
    signed = site.add("Cast", [flipped], to=int(ir.DataType.INT8))
    codes = site.add("Sub", [signed, site.constant("offset", np.array([4], np.int8))])
    return site.add("Reshape", [codes, site.constant("weight_shape", np.array(shape, np.int64))])
