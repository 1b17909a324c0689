"""From placeholders to operators: what all flavours share.

A flavour is a function from a `LinearLowering` to the value that takes the place of the
placeholder's output (exporters/flavors). Its parts come from here:

    linear.py     LinearSlice, the tensors that a placeholder stands for, and LinearLowering, which
                  collects the new nodes and constants
    inputs.py     the codes of the input, static or per token
    weights.py    the codes of the weight, widened to int8 from a narrow initializer
    lowrank.py    the branch L (R x)

`lower` runs the passes on a clone of the trace, then a flavour's function on each placeholder.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporters.lowering.linear import LinearLowering, SharedInputs
from exporters.metadata import LinearPart
from exporters.opsets import ONNXRUNTIME_DOMAIN
from exporters.passes import prepare
from exporters.trace import (
    OUTPUT_SCALE,
    PART,
    PARTS,
    PATH,
    PLACEHOLDER_DOMAIN,
    TracedModel,
    placeholders,
)
from marrq.quantizers.linear import QuantLinear, quantized_linears


@dataclass(frozen=True)
class LoweredModel:
    """A graph of operators that ONNX Runtime knows.

    linears: by module path, where each linear begins and ends in the graph.
    bits_per_weight: bits that the graph keeps for a weight of the quantized linears: codes, scales,
    zero points, low-rank branches and smoothings.
    """

    graph: ir.Model
    linears: Mapping[str, tuple[LinearPart, ...]]
    bits_per_weight: float


def lower(
    traced: TracedModel,
    opset: int,
    lower_linear: Callable[[LinearLowering], ir.Value],
    fuse: bool = False,
) -> LoweredModel:
    """Replace each placeholder of a clone of the trace by what `lower_linear` makes of it.

    opset: of the result, at least that of the trace. lower_linear: adds nodes and constants to the
    LinearLowering and returns the linear's output. fuse: write attention as one operator.
    """
    # The trace itself stays, for the next flavour.
    lowered, linears = traced.clone(), quantized_linears(traced.model.module)
    # Later opsets only take more types in the operators of a trace.
    lowered.opset_imports[""] = opset
    prepare(lowered, fuse)
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
        parts.setdefault(path, {})[_part_of(node)] = _linear_part(node, linear.x, result)
    # No placeholder is left, so no runtime needs to know this domain.
    del lowered.opset_imports[PLACEHOLDER_DOMAIN]
    # A file of standard operators must not ask for ONNX Runtime.
    if any(node.domain == ONNXRUNTIME_DOMAIN for node in lowered.graph):
        lowered.opset_imports[ONNXRUNTIME_DOMAIN] = 1
    bits = bits_per_weight(lowered.graph, weights, linears.values())
    return LoweredModel(lowered, {path: _in_order(found) for path, found in parts.items()}, bits)


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


def _linear_part(node: ir.Node, x: ir.Value, y: ir.Value) -> LinearPart:
    scale = node.attributes[OUTPUT_SCALE].as_tensor() if OUTPUT_SCALE in node.attributes else None
    assert x.name is not None
    assert y.name is not None
    return LinearPart(x.name, y.name, None if scale is None else scale.name)


def _in_order(parts: Mapping[str, LinearPart]) -> tuple[LinearPart, ...]:
    """The parts in the order of the linear's rows."""
    # "" for a whole linear stands alone.
    return tuple(parts[part] for part in sorted(parts, key=lambda part: PARTS.find(part)))
