"""Attention as one operator, on tokens as the linears give them.

    before   Transpose, MatMul, Mul, Add, Softmax, MatMul      softmax(s q kᵀ + mask) v
    after    Attention(q, k, v, mask; scale = s)               ONNX opset 23

`fuse_attention` makes the operator; `attend_on_tokens` then drops the Transposes around it.

Two forms stay as they are:

    Swin's shifted windows    The mask differs from window to window. With windows as heads it could
                              be written, and takes 1.1 to 1.6 times as long (64, 16 and 4 windows
                              of 49 tokens, one thread).
    Swin v2's cosines         The factor s differs from head to head.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.graph import (
    array_of,
    copy_type,
    dimensions,
    only_consumer,
    permutation,
    producer,
)

HEADS_SECOND = (0, 2, 1, 3)
"""Transpose between [b, n, h, d] and [b, h, n, d]; it is its own inverse."""


@dataclass(frozen=True)
class _Scores:
    """s q kᵀ + mask: q [b, h, n, d]; turned: the Transpose that makes kᵀ [b, h, d, n]."""

    query: ir.Value
    turned: ir.Node
    scale: float
    mask: ir.Value | None


def fuse_attention(graph: ir.Graph) -> None:
    """Turn two products around a Softmax into one Attention."""
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        product = only_consumer(softmax, "MatMul")
        scores = _match_scores(softmax.inputs[0])
        # In softmax(…) v the probabilities are the left factor.
        if product is None or product.inputs[0] is not softmax.outputs[0] or scores is None:
            continue
        # Attention takes K, not kᵀ.
        key = _key(graph, scores.turned)
        if key is None:
            continue
        inputs = [scores.query, key, product.inputs[1]]
        # Scale and mask go into the operator, the Softmax and both products with them.
        attention = ir.node(
            "Attention",
            inputs if scores.mask is None else [*inputs, scores.mask],
            attributes={"scale": scores.scale},
            name=f"{product.name}_attention",
        )
        copy_type(attention.outputs[0], product.outputs[0])
        ir.convenience.replace_nodes_and_values(
            graph, product, [product], [attention], product.outputs, attention.outputs
        )


def _match_scores(scores: ir.Value | None) -> _Scores | None:
    """What the tracer writes for s q kᵀ + mask; the Add and the Mul may be absent."""
    # From the Softmax backwards: + mask, · s, q kᵀ.
    masked = producer(scores, "Add")
    product, mask = masked.inputs if masked is not None else (scores, None)
    scaled = producer(product, "Mul")
    factor = np.ones(1, np.float32)
    if scaled is not None:
        constant = array_of(scaled.inputs[1])
        # A factor per head cannot be Attention's scale.
        if constant is None or constant.size != 1:
            return None
        # The tracer writes the factor on the right.
        product, factor = scaled.inputs[0], constant
    # q kᵀ
    similarity = producer(product, "MatMul")
    turned = producer(similarity.inputs[1], "Transpose") if similarity is not None else None
    if similarity is None or similarity.inputs[0] is None or turned is None:
        return None
    return _Scores(similarity.inputs[0], turned, float(factor.item()), mask)


def _key(graph: ir.Graph, turned: ir.Node) -> ir.Value | None:
    """K [b, h, n, d] from the Transpose that makes kᵀ, or None for another Transpose."""
    # from [b, h, n, d]
    if permutation(turned) == (0, 1, 3, 2):
        return turned.inputs[0]
    # from [b, n, h, d]
    if permutation(turned) != (0, 2, 3, 1):
        return None
    # Turn [b, n, h, d] to heads first and leave the channels last.
    moved = ir.node(
        "Transpose",
        [turned.inputs[0]],
        attributes={"perm": list(HEADS_SECOND)},
        name=f"{turned.name}_back",
    )
    batch, heads, channels, tokens = dimensions(turned.outputs[0])
    key = moved.outputs[0]
    key.name, key.type = moved.name, turned.outputs[0].type
    key.shape = ir.Shape([batch, heads, tokens, channels])
    graph.insert_after(turned, moved)
    return key


def attend_on_tokens(graph: ir.Graph) -> None:
    """Let Attention read and give tokens [b, n, h d].

    Attention then moves the heads itself, in less time than four Transposes take.
    """
    for node in [node for node in graph if node.op_type == "Attention"]:
        # In front of q, k and v: Reshape to heads, Transpose. Behind: Transpose, Reshape.
        tokens = [_tokens(value) for value in node.inputs[:3]]
        # [b, h, n, d] → [b, n, h, d] → [b, n, h d]
        back = only_consumer(node, "Transpose")
        merge = only_consumer(back, "Reshape")
        if any(value is None for value in tokens) or back is None or merge is None:
            continue
        if permutation(back) != HEADS_SECOND or len(dimensions(merge.outputs[0])) != 3:
            continue
        # [b, h, n, d]: the number of heads, which tokens [b, n, h d] no longer tell.
        query_heads, key_heads = (
            dimensions(value)[1] for value in node.inputs[:2] if value is not None
        )
        node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", query_heads)
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", key_heads)
        # Read what the linears give, and give what the next linear reads.
        for index, value in enumerate(tokens):
            node.replace_input_with(index, value)
        # Attention now gives the tokens that the Reshape gave.
        node.outputs[0].shape = merge.outputs[0].shape
        merge.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove([merge, back], safe=True)


def _tokens(heads: ir.Value | None) -> ir.Value | None:
    """Tokens [b, n, h d] that heads [b, h, n, d] are made from by Reshape and Transpose."""
    transpose = producer(heads, "Transpose")
    # Backwards: [b, h, n, d] ← [b, n, h, d] ← [b, n, h d]
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if reshape is None or permutation(transpose) != HEADS_SECOND:
        return None
    tokens = reshape.inputs[0]
    return tokens if tokens is not None and len(dimensions(tokens)) == 3 else None
