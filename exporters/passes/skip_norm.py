"""The sum with the residual stream moves into the norm behind it, for GPUs.

    before   r' = r + (y + b);  LayerNormalization(r')
    after    SkipLayerNormalization(y, r, γ, β, b), which gives the norm and r'    com.microsoft

One kernel in the place of three: at small batches a GPU waits for launches, at large ones for
memory. The next branch adds to r', the operator's fourth output.
"""

import onnx_ir as ir

from exporters.graph import copy_type, output_shape, producer
from exporters.opsets import ONNXRUNTIME_DOMAIN
from exporters.passes.products import is_vector, product_behind

OPERATOR = "SkipLayerNormalization"


def norm_with_residual(graph: ir.Graph) -> None:
    """Join every LayerNormalization with the Add before it."""
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        added = producer(norm.inputs[0], "Add")
        if added is not None and _fits(norm, added):
            _join(graph, norm, added)


def _fits(norm: ir.Node, added: ir.Node) -> bool:
    """Whether the operator can do what both nodes do."""
    shape = output_shape(added)
    # It normalizes the last axis of [b, n, c].
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    if len(shape) != 3 or axis not in (-1, 2) or len(norm.inputs) != 3:
        return False
    if not all(is_vector(value, shape[2]) for value in norm.inputs[1:]):
        return False
    # A position embedding [1, n, c] is broadcast over the batch, and so is no residual.
    if any(value is None or value.shape != shape for value in added.inputs):
        return False
    # The operator knows these outputs by other names; r' may be an output of the graph too.
    return not (added.outputs[0].is_graph_output() or any(o.uses() for o in norm.outputs[1:]))


def _join(graph: ir.Graph, norm: ir.Node, added: ir.Node) -> None:
    first, second = (product_behind(value) for value in added.inputs if value is not None)
    # The sum is symmetric: the branch is the side that has a bias.
    branch, other = (first, added.inputs[1]) if first.bias else (second, added.inputs[0])
    inputs = [branch.result, other, *norm.inputs[1:]]
    made = ir.node(
        OPERATOR,
        inputs if branch.bias is None else [*inputs, branch.bias],
        domain=ONNXRUNTIME_DOMAIN,
        attributes={"epsilon": norm.attributes["epsilon"].as_float()},
        num_outputs=4,
        name=norm.name,
    )
    normed, mean, deviation, residual = made.outputs
    # Mean and deviation are for training: an output without a name is not made.
    mean.name = deviation.name = ""
    copy_type(normed, norm.outputs[0])
    copy_type(residual, added.outputs[0])
    # r' is read from where the Add stood, which may be far before the norm.
    ir.convenience.replace_nodes_and_values(
        graph,
        added,
        [norm, added],
        [made],
        [norm.outputs[0], added.outputs[0]],
        [normed, residual],
    )
