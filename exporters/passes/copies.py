"""Operators that only copy, or add nothing, are removed.

Pad by nothing                  Swin pads its feature maps to whole windows
Expand before a broadcast       Swin v2 expands the norms of queries and keys
Add of Where(true, 0, -∞)       the mask of a model that hides no token
"""

import onnx_ir as ir

from exporters.graph import array_of, output_shape, producer

BROADCASTING = ("Add", "Sub", "Mul", "Div")


def drop_copies(graph: ir.Graph) -> None:
    """Remove a Pad by zero elements, and an Expand whose readers broadcast by themselves."""
    # A list first: the graph changes on the way.
    for node in [node for node in graph if node.op_type in ("Pad", "Expand")]:
        if _adds_nothing(node):
            assert node.inputs[0] is not None  # what a Pad or an Expand copies
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def drop_open_masks(graph: ir.Graph) -> None:
    """Remove the Add of a mask that is 0 everywhere."""
    for node in [node for node in graph if node.op_type == "Where"]:
        # The condition, before it was expanded to the shape of the scores.
        expand = producer(node.inputs[0], "Expand")
        visible = array_of(expand.inputs[0] if expand else node.inputs[0])
        value = array_of(node.inputs[1])
        # The mask is 0 if every token is visible, and the value for visible tokens is 0; a value
        # that is computed may be anything.
        if visible is None or not visible.all() or value is None or value.any():
            continue
        for added in node.outputs[0].consumers():
            if added.op_type == "Add":
                _drop_add(graph, added, node.outputs[0])


def _adds_nothing(node: ir.Node) -> bool:
    if node.op_type == "Pad":
        # Amounts before and after each axis; an amount that is not constant may be anything.
        padding = array_of(node.inputs[1])
        return padding is not None and not padding.any()
    # Another input must bring the expanded shape to every reader.
    shape = output_shape(node)
    return all(_broadcasts_to(reader, shape) for reader in node.outputs[0].consumers())


def _broadcasts_to(node: ir.Node, shape: ir.Shape) -> bool:
    """Whether an input of the node has that shape even if its other input is not expanded."""
    return node.op_type in BROADCASTING and any(
        value is not None and value.shape == shape and not producer(value, "Expand")
        for value in node.inputs
    )


def _drop_add(graph: ir.Graph, added: ir.Node, mask: ir.Value) -> None:
    # scores + 0 = scores
    [scores] = [value for value in added.inputs if value is not None and value is not mask]
    added.outputs[0].replace_all_uses_with(scores)
    graph.remove(added, safe=True)
