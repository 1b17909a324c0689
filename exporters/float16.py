"""A float32 graph in float16: weights, constants and arithmetic.

Input and outputs stay float32, with a Cast behind the one and before the others, so that every
graph of a model is fed and read alike. A constant beyond the range of float16 becomes the largest
number of float16: the -3e38 of a mask must not become -∞, whose softmax over a masked row is NaN.

The head of a model with classes (marrq/zero_shot.py) stays in float32. ‖f‖² of large features is
beyond float16, and so is the difference of two logits near 100: its step there is 1/16.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.trace import PLACEHOLDER_DOMAIN, modules_of
from marrq.zero_shot import HEAD

LARGEST = float(np.finfo(np.float16).max)
EPSILON = float(np.finfo(np.float16).eps)
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def to_float16(model: ir.Model) -> None:
    """Turn a float32 graph into float16, the values around placeholders included."""
    graph = model.graph
    # Region and scales of a Resize are float32 in every graph.
    sizes = {value for node in graph if node.op_type == "Resize" for value in node.inputs[1:3]}
    head = [node for node in graph if HEAD in modules_of(node)]
    # Not a constant that another node reads too.
    sizes |= {value for node in head for value in node.inputs if _is_read_by(value, head)}
    for value in graph.initializers.values():
        if value.const_value is not None and value.dtype == FLOAT and value not in sizes:
            # Clones of a trace share tensors and types, so new ones take the place of the old.
            value.const_value = _halved(value.const_value)
            value.type = ir.TensorType(HALF)
    for node in graph:
        if node in head or not sizes.isdisjoint(node.outputs):
            continue
        # γ of a placeholder multiplies weights in float32: what is rounded is the product, once.
        if node.domain != PLACEHOLDER_DOMAIN:
            _halve_attributes(node)
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.type = ir.TensorType(HALF)
    _widen_inputs(graph, head)
    _cast_ends(graph)


def holds(dtype: np.dtype[Any], array: np.ndarray) -> bool:
    """Whether a type rounds a float32 array as it rounds numbers of ordinary size. The product of a
    small γ and a weight may fall below the normal numbers of float16, which begin at 6e-5."""
    # Normal numbers are rounded by half an epsilon at most, so a sound product passes.
    rounded = array.astype(dtype).astype(np.float32)
    error, size = np.linalg.norm(rounded - array), np.linalg.norm(array)
    return bool(error <= EPSILON * size)


def _halved(tensor: ir.TensorProtocol) -> ir.Tensor[Any]:
    array = np.clip(tensor.numpy(), -LARGEST, LARGEST).astype(np.float16)
    return ir.Tensor(array, name=tensor.name)


def _halve_attributes(node: ir.Node) -> None:
    """A constant in an attribute, and the type that a Cast gives."""
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == FLOAT:
            node.attributes[name] = ir.AttrTensor(name, _halved(attribute.value))
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(HALF))


def _is_read_by(value: ir.Value | None, nodes: Sequence[ir.Node]) -> bool:
    """Whether a value is a constant that only these nodes read."""
    return (
        value is not None
        and value.const_value is not None
        and all(reader in nodes for reader in value.consumers())
    )


def _widen_inputs(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Cast what float32 nodes read of a float16 graph."""
    widened: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != HALF:
                continue
            # The norm and the division read the same features.
            if value not in widened:
                cast = ir.node("Cast", [value], attributes={"to": int(FLOAT)})
                cast.name = f"{value.name}/float32"
                result = cast.outputs[0]
                result.name, result.shape = cast.name, value.shape
                result.type = ir.TensorType(FLOAT)
                graph.insert_before(node, cast)
                widened[value] = result
            node.replace_input_with(index, widened[value])


def _cast_ends(graph: ir.Graph) -> None:
    """float32 outside, float16 inside."""
    [pixels] = graph.inputs
    inward = ir.node("Cast", [pixels], attributes={"to": int(HALF)}, name="pixels/float16")
    half = inward.outputs[0]
    half.name, half.shape, half.type = "pixels/float16", pixels.shape, ir.TensorType(HALF)
    pixels.replace_all_uses_with(half)
    inward.replace_input_with(0, pixels)
    graph.insert_before(graph[0], inward)
    for index, result in enumerate(graph.outputs):
        # The head's logits are float32 already.
        if result.dtype == HALF:
            graph.outputs[index] = _widened(graph, result)


def _widened(graph: ir.Graph, result: ir.Value) -> ir.Value:
    """The output in float32, in the place of a float16 one."""
    # The output keeps its name, which clients ask for.
    name, inner = result.name, f"{result.name}/float16"
    outward = ir.node("Cast", [result], attributes={"to": int(FLOAT)}, name=f"{name}/float32")
    result.name, result.type = inner, ir.TensorType(HALF)
    outside = outward.outputs[0]
    outside.name, outside.shape, outside.type = name, result.shape, ir.TensorType(FLOAT)
    graph.append(outward)
    return outside
