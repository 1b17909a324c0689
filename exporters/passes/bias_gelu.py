"""The bias before a GELU moves into its operator, for GPUs.

    Gelu(y + b)                       →  BiasGelu(y, b)    com.microsoft
    Gelu(y + b; approximate = tanh)   →  FastGelu(y, b)    com.microsoft

BiasGelu computes y Φ(y) by the error function, FastGelu by the approximation with tanh: each keeps
the formula that the model has.
"""

import onnx_ir as ir

from exporters.graph import copy_type
from exporters.opsets import ONNXRUNTIME_DOMAIN
from exporters.passes.products import product_behind

OPERATORS = {"none": "BiasGelu", "tanh": "FastGelu"}
"""By the attribute `approximate` of Gelu."""


def gelu_with_bias(graph: ir.Graph) -> None:
    """Join every Gelu with the bias before it."""
    for gelu in [node for node in graph if node.op_type == "Gelu" and node.domain == ""]:
        assert gelu.inputs[0] is not None  # what a Gelu reads
        # The bias of fc1, or of the gate of a gated MLP.
        before = product_behind(gelu.inputs[0])
        if before.bias is None:
            continue
        # The formula is that of the standard's default unless the node says otherwise.
        given = gelu.attributes.get("approximate")
        operator = OPERATORS["none" if given is None else given.as_string()]
        made = ir.node(
            operator, [before.result, before.bias], domain=ONNXRUNTIME_DOMAIN, name=gelu.name
        )
        copy_type(made.outputs[0], gelu.outputs[0])
        ir.convenience.replace_nodes_and_values(
            graph, gelu, [gelu], [made], gelu.outputs, made.outputs
        )
