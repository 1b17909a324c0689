"""A fused qkv projection becomes three products.

    before   linear → Reshape [b, n, 3, h, d] → Transpose (2, 0, 3, 1, 4) → 3 × (Slice → Squeeze)
    after    3 × (linear → Reshape [b, n, h, d] → Transpose (0, 2, 1, 3))

The arithmetic is the same. The three Slices and Squeezes copy every value twice; three products
give q, k and v apart from the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.graph import (
    add_constant,
    copy_type,
    integers_of,
    only_consumer,
    output_shape,
    permutation,
)
from exporters.trace import PARTS, placeholder, placeholders

HEADS_FIRST = (2, 0, 3, 1, 4)


@dataclass(frozen=True)
class _Fused:
    """The pattern: a linear, what moves its heads, and the Squeezes that end in q, k and v.

    shape: constant of the Reshape, [b, n, 3, h, d].
    """

    linear: ir.Node
    reshape: ir.Node
    transpose: ir.Node
    squeezes: Sequence[ir.Node]
    shape: Sequence[int]


def split_qkv(graph: ir.Graph) -> None:
    """Split every fused qkv projection of the graph."""
    for node in placeholders(graph):
        fused = _match(node)
        if fused is not None:
            # Each part replaces its Squeeze, then the fused linear has no reader.
            for part, squeeze in zip(PARTS, fused.squeezes, strict=True):
                _replace_part(graph, fused, part, squeeze)
            graph.remove([fused.transpose, fused.reshape, fused.linear], safe=True)


def _match(node: ir.Node) -> _Fused | None:
    reshape = only_consumer(node, "Reshape")
    transpose = only_consumer(reshape, "Transpose")
    if reshape is None or transpose is None or permutation(transpose) != HEADS_FIRST:
        return None
    # q, k and v leave by index 0, 1 and 2 of the new first axis.
    found = [_squeeze_at(transpose, index) for index in range(len(PARTS))]
    squeezes = [squeeze for squeeze in found if squeeze is not None]
    shape = integers_of(reshape.inputs[1])
    # A fourth reader of the Transpose would still need the fused product.
    if shape is None or shape[2] != 3 or len(transpose.outputs[0].uses()) != 3:
        return None
    return _Fused(node, reshape, transpose, squeezes, shape) if len(squeezes) == 3 else None


def _squeeze_at(transpose: ir.Node, index: int) -> ir.Node | None:
    """The Squeeze behind the Slice [index : index + 1] of axis 0, or None."""
    for consumer in transpose.outputs[0].consumers():
        # start, end, axis
        taken = [integers_of(value) for value in consumer.inputs[1:4]]
        if consumer.op_type == "Slice" and taken == [[index], [index + 1], [0]]:
            return only_consumer(consumer, "Squeeze")
    return None


def _replace_part(graph: ir.Graph, fused: _Fused, part: str, squeeze: ir.Node) -> None:
    """Replace one Squeeze, and its Slice, by a product of a third of the linear's rows."""
    taken = squeeze.inputs[0].producer() if squeeze.inputs[0] is not None else None
    assert taken is not None  # the Slice by which _squeeze_at found the Squeeze
    name = f"{fused.linear.name}_{part}"
    # The third of the rows: LinearSlice cuts it out of the artifact's linear.
    linear = placeholder(fused.linear, part, name)
    batch, tokens, _, heads, channels = fused.shape
    linear.outputs[0].shape = ir.Shape([*output_shape(fused.linear)[:-1], heads * channels])
    # [b, n, h · d] → [b, n, h, d]
    split = np.array([batch, tokens, heads, channels], np.int64)
    reshape = ir.node(
        "Reshape",
        [linear.outputs[0], add_constant(graph, f"{name}_heads", split)],
        attributes=dict(fused.reshape.attributes),
        name=f"{name}_reshape",
    )
    # [b, n, h, d] → [b, h, n, d]
    transpose = ir.node(
        "Transpose", reshape.outputs, attributes={"perm": [0, 2, 1, 3]}, name=f"{name}_transpose"
    )
    copy_type(transpose.outputs[0], squeeze.outputs[0])
    ir.convenience.replace_nodes_and_values(
        graph,
        squeeze,
        [squeeze, taken],
        [linear, reshape, transpose],
        [squeeze.outputs[0]],
        [transpose.outputs[0]],
    )
