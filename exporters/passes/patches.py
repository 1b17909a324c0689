"""A patch embedding that is a linear makes tokens from the start.

    before   [b, rows, columns, c] → Transpose (0, 3, 1, 2) → Reshape [b, c, n]
                                   → Transpose (0, 2, 1)
    after    [b, rows, columns, c] → Reshape [b, n, c]

The convolution that it replaces gives channels first, which the model then turns back.
"""

import numpy as np
import onnx_ir as ir

from exporters.graph import (
    add_constant,
    copy_type,
    dimensions,
    only_consumer,
    output_shape,
    permutation,
)


def flatten_patches(graph: ir.Graph) -> None:
    """Replace every such chain by one Reshape."""
    # The nodes are listed first, because the graph changes on the way.
    starts = [node for node in graph if node.op_type == "Transpose"]
    for first in starts:
        if permutation(first) == (0, 3, 1, 2):
            _flatten(graph, first)


def _flatten(graph: ir.Graph, first: ir.Node) -> None:
    reshape = only_consumer(first, "Reshape")
    last = only_consumer(reshape, "Transpose")
    patches = first.inputs[0]
    if last is None or reshape is None or patches is None or permutation(last) != (0, 2, 1):
        return
    _, rows, columns, channels = dimensions(patches)
    # A Reshape to other lengths would mix rows and channels.
    if list(output_shape(last))[1:] != [rows * columns, channels]:
        return
    # 0 keeps the batch, -1 makes rows · columns tokens.
    shape = add_constant(graph, f"{last.name}_shape", np.array([0, -1, channels]))
    tokens = ir.node("Reshape", [patches, shape], name=f"{last.name}_tokens")
    copy_type(tokens.outputs[0], last.outputs[0])
    ir.convenience.replace_nodes_and_values(
        graph, last, [last, reshape, first], [tokens], last.outputs, tokens.outputs
    )
