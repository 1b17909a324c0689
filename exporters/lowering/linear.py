"""Replace every placeholder of a trace by the nodes of a flavour.

    lower             a clone of the trace → passes → a flavour's function on each placeholder
    LinearSlice       the tensors that a placeholder stands for
    LinearLowering    what the flavour's function gets: the tensors, and how nodes and constants
                      are added

The function returns the value that takes the place of the placeholder's output.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.float16 import to_float16
from exporters.graph import add_constant
from exporters.metadata import LinearPart
from exporters.opsets import ONNXRUNTIME_DOMAIN, lowest_opset
from exporters.passes import finish, prepare
from exporters.passes.tensorrt import norms_in_float32, scale_queries
from exporters.trace import (
    OUTPUT_SCALE,
    PART,
    PARTS,
    PATH,
    PLACEHOLDER_DOMAIN,
    TracedModel,
    placeholders,
)
from marrq.quantizers.activations import ActivationQuantizer, Smoothing
from marrq.quantizers.linear import QuantLinear, StoredFactor, quantized_linears
from marrq.quantizers.salient import SECOND_BITS


@dataclass(frozen=True)
class LinearSlice:
    """The rows of a linear that a placeholder stands for.

    codes: int8 [rows, in], the artifact's; joint codes if some columns have two for each weight.
    num_bits: of one code, the first if there are two.
    salient: int64 [r], the columns with two codes (marrq/quantizers/salient.py), or None.
    scale: float32 [rows, groups].
    zero_point: int8 [rows, groups].
    bias: float32 [rows], or None.
    left: rows of the low-rank branch's L [rows, r], or None.
    left_scale: float32 [rows], multiplies L in the graph (LayerScale), or None.
    right: R [r, in] of the low-rank branch, or None.
    """

    codes: Tensor
    num_bits: int
    salient: Tensor | None
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    left: StoredFactor | None
    left_scale: Tensor | None
    right: StoredFactor | None

    @classmethod
    def of(cls, node: ir.Node, linear: QuantLinear) -> "LinearSlice":
        """Cut out the rows of the placeholder's part."""
        # All rows, unless the placeholder stands for q, k or v.
        rows = slice(None)
        if PART in node.attributes:
            # The rows of a fused linear are those of q, then k, then v.
            third = len(linear.codes) // len(PARTS)
            start = PARTS.index(node.attributes[PART].as_string()) * third
            rows = slice(start, start + third)
        # A scale, a zero point and a bias belong to an output, so rows cut them too.
        # R is common to all rows, and so are salient columns; of L only the rows of the part are
        # needed.
        branch, salient = linear.lowrank, linear.salient_columns
        return cls(
            codes=linear.codes[rows],
            num_bits=linear.spec.num_bits,
            salient=None if salient is None else salient.long(),
            scale=linear.scale[rows],
            zero_point=linear.zero_point[rows],
            bias=None if linear.bias is None else linear.bias[rows],
            left=None if branch is None else _rows_of(branch.left, rows),
            left_scale=None,
            right=None if branch is None else branch.right,
        )

    def scaled(self, factor: Tensor) -> "LinearSlice":
        """The slice whose outputs are multiplied by γ. factor: γ, float32 [rows]."""
        # γ ∘ (s ∘ (q - z) x + b): γ goes into s and b, the codes stay.
        bias = None if self.bias is None else self.bias * factor
        return replace(self, scale=self.scale * factor[:, None], bias=bias, left_scale=factor)

    @property
    def code_bits(self) -> int:
        """Bits of the widest of `codes`."""
        second_bits = 0 if self.salient is None else SECOND_BITS[self.num_bits]
        return self.num_bits + second_bits

    @property
    def in_features(self) -> int:
        """Inputs of the linear."""
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        """Scales in a row: 1, or one for each group of inputs."""
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.groups


def _rows_of(left: StoredFactor, rows: slice) -> StoredFactor:
    """Rows of L. Its int8 scales are one for each column, so the rows share them."""
    return StoredFactor(left.codes[rows], left.scale)


@dataclass(frozen=True)
class InputCodes:
    """A linear's input as uint8 codes: x = scale · (codes - zero_point).

    scale, zero_point: scalars, or per token [..., 1].
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    per_token: bool


@dataclass(frozen=True)
class SharedInputs:
    """What linears with the same input share in a graph, so that it is computed once.

    codes: by the input and the bytes of the quantizer's tensors.
    values: the dequantized codes.
    components: R x of a low-rank branch, by the linear's path and the input. The parts q, k and v
    of a linear share R, and may read different tokens.
    right_factors: Rᵀ of a low-rank branch, by the linear's path.
    """

    codes: dict[tuple[ir.Value, tuple[bytes, ...]], InputCodes] = field(default_factory=dict)
    values: dict[InputCodes, ir.Value] = field(default_factory=dict)
    components: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)
    right_factors: dict[str, ir.Value] = field(default_factory=dict)


class LinearLowering:
    """A placeholder, and the nodes and constants that will replace it.

    path: the linear's module path. name: the path and the part, which all new names begin with.
    slice: the tensors, times γ, the output scale, if there is one. unscaled: without γ.
    output_scale: γ, float32 [rows], or None. quantizer: of the input, or None for float
    activations. smoothing: factors of the channels of an input that is smoothed and not quantized,
    or None. x: the input.
    nodes: the new nodes in order. weight_tensors: names of the constants that hold the weight.
    weight: float [in, rows], if the flavour makes one that passes may put into another operator.
    """

    def __init__(
        self, graph: ir.Graph, node: ir.Node, linear: QuantLinear, shared: SharedInputs
    ) -> None:
        self.graph, self.shared = graph, shared
        self.path = node.attributes[PATH].as_string()
        # q, k and v of a linear need names of their own.
        part = f".{node.attributes[PART].as_string()}" if PART in node.attributes else ""
        self.name = f"{self.path}{part}"
        # The quantizer belongs to the whole linear: its parts read the same input.
        self.unscaled, self.output_scale = LinearSlice.of(node, linear), _output_scale(node)
        gamma, of = self.output_scale, linear.input
        self.slice = self.unscaled if gamma is None else self.unscaled.scaled(gamma)
        self.quantizer = of if isinstance(of, ActivationQuantizer) else None
        self.smoothing = of.smoothing if isinstance(of, Smoothing) else None
        self.nodes, self.weight_tensors = list[ir.Node](), set[str]()
        self.weight: ir.Value | None = None
        assert node.inputs[0] is not None  # a placeholder has one input
        self.x = node.inputs[0]

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        **attributes: int | str,
    ) -> ir.Value:
        """Append a node and return its only output."""
        # The count makes names unique within a linear, and the path across linears.
        name = f"{self.name}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, domain=domain, attributes=attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def split(self, value: ir.Value, axis: int, parts: int) -> list[ir.Value]:
        """Append a node that cuts a value into equal parts, and return them."""
        name = f"{self.name}/Split_{len(self.nodes)}"
        node = ir.node(
            "Split",
            [value],
            attributes={"axis": axis, "num_outputs": parts},
            num_outputs=parts,
            name=name,
        )
        # Values need names of their own, since the file connects nodes by name.
        for index, output in enumerate(node.outputs):
            output.name = f"{name}_{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        return add_constant(self.graph, f"{self.name}.{name}", array)

    def weight_constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer that counts for the bits per weight."""
        value = self.constant(name, array)
        # Counted when all linears are lowered: shared tensors count once.
        self.weight_tensors.add(f"{self.name}.{name}")
        return value


@dataclass(frozen=True)
class LoweredModel:
    """A graph of operators that ONNX Runtime knows.

    linears: by module path, where each linear begins and ends in the graph.
    bits_per_weight: bits that the graph keeps for a weight of the quantized linears: codes, scales,
    zero points, low-rank branches and smoothings.
    fuse: whether attention is one operator, if the model has one that fits it.
    """

    graph: ir.Model
    linears: Mapping[str, tuple[LinearPart, ...]]
    bits_per_weight: float
    fuse: bool


@dataclass(frozen=True)
class Target:
    """What a graph is lowered for.

    opset: the lowest for the codes of weights and activations; Attention may ask for a later one.
    device: of exporters/choices.py.
    fuse: write attention as one operator.
    float16: weights and arithmetic in float16, between inputs and outputs in float32.
    tensorrt: float16 as TensorRT computes it (exporters/passes/tensorrt.py).
    """

    opset: int
    device: str = "cpu"
    fuse: bool = False
    float16: bool = False
    tensorrt: bool = False


def lower(
    traced: TracedModel, target: Target, lower_linear: Callable[[LinearLowering], ir.Value]
) -> LoweredModel:
    """Replace each placeholder of a clone of the trace by what `lower_linear` makes of it.

    lower_linear: adds nodes and constants to the LinearLowering and returns the linear's output.
    """
    # The trace itself stays, for the next flavour.
    lowered, linears = traced.clone(), quantized_linears(traced.model.module)
    prepare(lowered, target.fuse, target.device)
    if target.float16:
        to_float16(lowered)
    if target.tensorrt:
        norms_in_float32(lowered.graph)
        scale_queries(lowered.graph)
    # What linears have in common is made by the first of them.
    shared, weights = SharedInputs(), set[str]()
    parts: dict[str, dict[str, LinearPart]] = {}
    for node in placeholders(lowered.graph):
        path = node.attributes[PATH].as_string()
        linear = LinearLowering(lowered.graph, node, linears[path], shared)
        result = lower_linear(linear)
        # New nodes stand where the placeholder stood, so the graph stays sorted.
        _replace(lowered.graph, node, linear, result)
        weights.update(linear.weight_tensors)
        parts.setdefault(path, {})[_part_of(node)] = _linear_part(node, linear, result)
    finish(lowered, target.device)
    # No later than need be: older servers refuse it, and a CUDA kernel may be registered up to an
    # opset only. Later opsets only take more types in the operators of a trace.
    lowered.opset_imports[""] = max(target.opset, lowest_opset(lowered.graph))
    # No placeholder is left, so no runtime needs to know this domain.
    del lowered.opset_imports[PLACEHOLDER_DOMAIN]
    # A file of standard operators must not ask for ONNX Runtime.
    if any(node.domain == ONNXRUNTIME_DOMAIN for node in lowered.graph):
        lowered.opset_imports[ONNXRUNTIME_DOMAIN] = 1
    bits = bits_per_weight(lowered.graph, weights, linears.values())
    in_order = {path: _in_order(found) for path, found in parts.items()}
    return LoweredModel(lowered, in_order, bits, target.fuse)


def bits_per_weight(graph: ir.Graph, names: Iterable[str], linears: Iterable[QuantLinear]) -> float:
    """Bits of the named initializers, per weight of the linears."""
    tensors = [graph.initializers[name].const_value for name in names]
    # nbytes counts INT4 and INT2 as they are packed.
    stored = sum(8 * tensor.nbytes for tensor in tensors if tensor is not None)
    return stored / sum(linear.codes.numel() for linear in linears)


def _replace(graph: ir.Graph, node: ir.Node, linear: LinearLowering, result: ir.Value) -> None:
    """Put the new nodes of a linear in the place of its placeholder."""
    # Later passes and the checker ask for shape and type.
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], linear.nodes, [node.outputs[0]], [result]
    )


def _part_of(node: ir.Node) -> str:
    """q, k or v; "" for a whole linear."""
    return node.attributes[PART].as_string() if PART in node.attributes else ""


def _output_scale(node: ir.Node) -> Tensor | None:
    if OUTPUT_SCALE not in node.attributes:
        return None
    return torch.from_numpy(node.attributes[OUTPUT_SCALE].as_tensor().numpy())


def _linear_part(node: ir.Node, linear: LinearLowering, y: ir.Value) -> LinearPart:
    scale = node.attributes[OUTPUT_SCALE].as_tensor() if OUTPUT_SCALE in node.attributes else None
    assert linear.x.name is not None
    assert y.name is not None
    weight = None if linear.weight is None else linear.weight.name
    return LinearPart(linear.x.name, y.name, None if scale is None else scale.name, weight)


def _in_order(parts: Mapping[str, LinearPart]) -> tuple[LinearPart, ...]:
    """The parts in the order of the linear's rows."""
    # "" for a whole linear stands alone.
    return tuple(parts[part] for part in sorted(parts, key=lambda part: PARTS.find(part)))
