"""The types that TensorRT computes a float16 graph in without losing digits, on a strongly typed
graph: what the file says is what runs.

    norms_in_float32    x → Cast(float32) → LayerNormalization → Cast(float16)
                        Squares of a token's channels leave float16 at 256, and their sum sooner.
    scale_queries       softmax((s q) kᵀ) in place of softmax(s (q kᵀ))
                        The scores never leave float16 before they are scaled, and q has fewer
                        numbers than the scores.

Everything else, attention's core included, stays in float16: TensorRT fuses attention if no Cast
and no Q/DQ stands in it.
"""

import numpy as np
import onnx_ir as ir

from exporters.graph import add_constant, array_of, copy_type, only_consumer, producer

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def norms_in_float32(graph: ir.Graph) -> None:
    """Run every LayerNormalization of a float16 graph in float32."""
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        # Its weight and bias are constants, which widen without a node.
        for index, value in enumerate(norm.inputs):
            array = array_of(value)
            if array is not None:
                name = f"{norm.name}.input_{index}"
                norm.replace_input_with(index, add_constant(graph, name, array.astype(np.float32)))
        x, result = norm.inputs[0], norm.outputs[0]
        widened = _cast(norm, x, FLOAT, "float32")
        graph.insert_before(norm, widened)
        norm.replace_input_with(0, widened.outputs[0])
        # The result keeps its readers through the Cast behind it.
        narrowed = _cast(norm, result, HALF, "float16")
        result.replace_all_uses_with(narrowed.outputs[0])
        narrowed.replace_input_with(0, result)
        # A new type: `dtype` would change the type of every value that shares it.
        result.type = ir.TensorType(FLOAT)
        graph.insert_after(norm, narrowed)


def scale_queries(graph: ir.Graph) -> None:
    """Move the factor of attention's scores to the queries."""
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        # From the Softmax backwards: + mask, · s, q kᵀ.
        scores = softmax.inputs[0]
        masked = producer(scores, "Add")
        scaled = producer(masked.inputs[0] if masked is not None else scores, "Mul")
        product = producer(scaled.inputs[0], "MatMul") if scaled is not None else None
        factor = array_of(scaled.inputs[1]) if scaled is not None else None
        # Other readers of the product would see other numbers; a factor per head is no scalar.
        if product is None or scaled is None or factor is None or factor.size != 1:
            continue
        # The scores without their factor must be nobody else's.
        if only_consumer(product, "Mul") is not scaled:
            continue
        query = product.inputs[0]
        # s as a scalar, since its shape [1] would be broadcast just as well.
        constant = add_constant(graph, f"{scaled.name}.query_scale", factor.reshape(()))
        moved = ir.node("Mul", [query, constant], name=f"{scaled.name}/query")
        moved.outputs[0].name = moved.name
        assert query is not None  # a product has two inputs
        copy_type(moved.outputs[0], query)
        graph.insert_before(product, moved)
        product.replace_input_with(0, moved.outputs[0])
        scaled.outputs[0].replace_all_uses_with(product.outputs[0])
        graph.remove(scaled, safe=True)


def _cast(node: ir.Node, value: ir.Value | None, dtype: ir.DataType, name: str) -> ir.Node:
    """A Cast of a value of the node's, without a place in the graph."""
    assert value is not None  # the caller has it from a node
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{value.name}/{name}")
    output = cast.outputs[0]
    output.name, output.shape, output.type = cast.name, value.shape, ir.TensorType(dtype)
    return cast
