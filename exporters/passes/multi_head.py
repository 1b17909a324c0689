"""Attention on tokens as an operator of ONNX Runtime's own, for GPUs.

    Attention(q, k, v; scale, heads)            ONNX opset 23, on tokens [b, n, h d], no mask
        →  MultiHeadAttention(q, k, v, bias)    com.microsoft, any opset
        →  Attention(x, W, bias)                com.microsoft, if q, k and v are products of one x

`name_multi_head` runs before the linears are lowered, `project_in_attention` behind it: then q, k
and v are x W + b, whatever makes W. In the last form W is [in, 3 h d], the columns of q, k and v
side by side. If W comes from codes, a Concat joins the three parts; ONNX Runtime folds it with the
codes when it loads the file.

Measured on an H100 with a ViT-B/16 in float16, with CUDA graphs, in milliseconds at batch 1, 8 and
32 (ONNX Runtime 1.31.1): opset 23 0.96, 1.57, 4.1; MultiHeadAttention 0.81, 1.30, 3.55; Attention
with W 0.67, 1.16, 3.47. The two last have skip_norm.py and bias_gelu.py around the attention too.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from exporters.graph import add_constant, array_of, copy_type, dimensions
from exporters.opsets import ONNXRUNTIME_DOMAIN
from exporters.passes.products import Product, product_behind

OPERATOR = "MultiHeadAttention"


def name_multi_head(graph: ir.Graph) -> None:
    """Turn every Attention of opset 23 on tokens, without a mask, into a MultiHeadAttention."""
    for node in [node for node in graph if node.op_type == "Attention" and node.domain == ""]:
        # Heads [b, h, n, d] and a mask need opset 23.
        if "q_num_heads" not in node.attributes or len(node.inputs) != 3:
            continue
        query_heads, key_heads = (
            node.attributes[f"{kind}_num_heads"].as_int() for kind in ("q", "kv")
        )
        # Grouped heads, and values of another width, stay as they are.
        widths = {dimensions(value)[-1] for value in node.inputs if value is not None}
        if query_heads == key_heads and len(widths) == 1:
            # Without a scale both operators would take 1 / √d; the model may have another one.
            attributes = {"num_heads": query_heads, "scale": node.attributes["scale"].as_float()}
            _replace(graph, node, OPERATOR, node.inputs, attributes)


def project_in_attention(graph: ir.Graph) -> None:
    """Move the products that make q, k and v into the attention. If they read different tokens,
    as behind `drop_unread_tokens`, or are no plain products, move their biases alone."""
    for node in [node for node in graph if node.op_type == OPERATOR]:
        products = [product_behind(value) for value in node.inputs if value is not None]
        attributes = {
            "num_heads": node.attributes["num_heads"].as_int(),
            "scale": node.attributes["scale"].as_float(),
        }
        # One product of three times the width keeps a GPU busier than three, and is one launch.
        weights = [product.weight for product in products if product.weight is not None]
        if len(weights) == len(products) and len({product.x for product in products}) == 1:
            joined = _side_by_side(graph, node, weights), _joined_bias(graph, node, products)
            _replace(graph, node, "Attention", [products[0].x, *joined], attributes)
        # The operator adds the biases while it moves the heads: three Adds less.
        elif any(product.bias is not None for product in products):
            inputs = [product.result for product in products]
            bias = _joined_bias(graph, node, products)
            _replace(graph, node, OPERATOR, [*inputs, bias], attributes)


def _joined_bias(graph: ir.Graph, node: ir.Node, products: Sequence[Product]) -> ir.Value:
    """The biases [3 h d] of q, k and v; zeros for one that is absent, such as BEiT's of k."""
    dtype = node.outputs[0].dtype
    assert dtype is not None  # the tracer knows every type
    none = np.zeros(dimensions(node.outputs[0])[-1], dtype.numpy())
    arrays = [array_of(product.bias) for product in products]
    joined = np.concatenate([none if array is None else array for array in arrays])
    return add_constant(graph, f"{node.name}.bias", joined)


def _side_by_side(graph: ir.Graph, node: ir.Node, weights: Sequence[ir.Value]) -> ir.Value:
    """W [in, 3 h d] from the weights of q, k and v."""
    arrays = [array_of(weight) for weight in weights]
    floats = [array for array in arrays if array is not None]
    # Floats are joined here; codes stay as narrow as they are until the file is loaded.
    if len(floats) == len(weights):
        return add_constant(graph, f"{node.name}.weight", np.concatenate(floats, 1))
    # All columns of q, then of k, then of v, as the operator reads them.
    joined = ir.node("Concat", weights, attributes={"axis": 1}, name=f"{node.name}_weight")
    joined.outputs[0].name, joined.outputs[0].type = joined.name, node.outputs[0].type
    graph.insert_before(node, joined)
    return joined.outputs[0]


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int | float],
) -> None:
    made = ir.node(
        op_type, inputs, domain=ONNXRUNTIME_DOMAIN, attributes=attributes, name=node.name
    )
    copy_type(made.outputs[0], node.outputs[0])
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], node.outputs, made.outputs)
