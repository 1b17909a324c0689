"""Small rewrites of a traced graph, made on its placeholders before a flavour lowers them. They change no integer code and no result
beyond float rounding, and take work away that ONNX Runtime would otherwise do on every token.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from exporters.trace import PLACEHOLDER, PLACEHOLDER_DOMAIN


def placeholders(graph: ir.Graph) -> list[ir.Node]:
    """The quantized linears of a traced graph.

    Attributes: `path`; after `split_qkv` also `part`, where it stands for a third of a fused linear's rows: q, k or v; after
    `absorb_scales` also `output_scale` [out], which multiplies its output.
    """
    return [node for node in graph if node.op_type == PLACEHOLDER and node.domain == PLACEHOLDER_DOMAIN]


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer, used by nothing else: sharing one could corrupt another's when either is rewritten."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    return value


def split_qkv(graph: ir.Graph) -> None:
    """A fused qkv projection becomes three products.

    linear → Reshape [b, n, 3, h, d] → Transpose (2, 0, 3, 1, 4) → three times Slice, Squeeze copies every value twice; three products give
    q, k and v apart, each Reshape [b, n, h, d] → Transpose (0, 2, 1, 3), for the same arithmetic.
    """
    for node in placeholders(graph):
        reshape = _only_consumer(node, "Reshape")
        transpose = _only_consumer(reshape, "Transpose")
        if reshape is None or transpose is None or transpose.attributes["perm"].as_ints() != (2, 0, 3, 1, 4):
            continue
        parts = [_slice_at(transpose, index) for index in range(3)]
        shape = _constant(reshape.inputs[1])
        if shape is None or shape[2] != 3 or len(transpose.outputs[0].uses()) != 3 or any(part is None for part in parts):
            continue
        for index, part in enumerate(parts):
            assert part is not None
            _replace_part(graph, node, reshape, part, index, shape)
        graph.remove([transpose, reshape, node], safe=True)


def absorb_scales(graph: ir.Graph) -> None:
    """LayerScale, a Mul by a constant per channel right after a linear, moves into the linear's scales and bias."""
    for node in placeholders(graph):
        multiply = _only_consumer(node, "Mul")
        factor = next((value for value in multiply.inputs if value is not node.outputs[0]), None) if multiply else None
        if multiply is None or factor is None or factor.const_value is None or factor.const_value.shape != _shape(node)[-1:]:
            continue
        node.attributes["output_scale"] = ir.AttrTensor("output_scale", factor.const_value)
        multiply.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove(multiply, safe=True)


def _only_consumer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The node that uses the output of `node`, where it is the only one and of that type."""
    consumers = node.outputs[0].consumers() if node is not None else ()
    return consumers[0] if len(consumers) == 1 and consumers[0].op_type == op_type else None


def _shape(node: ir.Node) -> ir.Shape:
    shape = node.outputs[0].shape
    assert shape is not None  # the tracer knows every shape
    return shape


def _constant(value: ir.Value | None) -> list[int] | None:
    """A constant integer vector, or None."""
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _slice_at(transpose: ir.Node, index: int) -> ir.Node | None:
    """The Squeeze that gives entry `index` of the first axis, where one Slice leads to it."""
    for consumer in transpose.outputs[0].consumers():
        if consumer.op_type == "Slice" and [_constant(value) for value in consumer.inputs[1:4]] == [[index], [index + 1], [0]]:
            return _only_consumer(consumer, "Squeeze")
    return None


def _replace_part(graph: ir.Graph, node: ir.Node, reshape: ir.Node, squeeze: ir.Node, index: int, shape: Sequence[int]) -> None:
    """Put the product of one third of the rows in the place of one Squeeze, and remove it with its Slice."""
    taken = squeeze.inputs[0].producer() if squeeze.inputs[0] is not None else None
    assert taken is not None
    name = f"{node.name}_{'qkv'[index]}"
    attributes = {"path": node.attributes["path"].as_string(), "part": "qkv"[index]}
    part = ir.node(PLACEHOLDER, node.inputs, domain=PLACEHOLDER_DOMAIN, attributes=attributes, name=name)
    part.outputs[0].name, part.outputs[0].type = name, node.outputs[0].type
    part.outputs[0].shape = ir.Shape([*_shape(node)[:-1], shape[3] * shape[4]])
    heads = add_constant(graph, f"{name}_heads", np.array([*shape[:2], *shape[3:]], np.int64))
    apart = ir.node("Reshape", [part.outputs[0], heads], attributes=dict(reshape.attributes), name=f"{name}_reshape")
    moved = ir.node("Transpose", apart.outputs, attributes={"perm": [0, 2, 1, 3]}, name=f"{name}_transpose")
    moved.outputs[0].shape, moved.outputs[0].type = _shape(squeeze), squeeze.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        graph, squeeze, [squeeze, taken], [part, apart, moved], [squeeze.outputs[0]], [moved.outputs[0]]
    )
