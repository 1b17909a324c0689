"""LayerScale moves into the linear before it.

    γ ∘ (W x + b)  =  (γ ∘ W) x + γ ∘ b        γ: a constant per output channel

With W = s ∘ (q - z) only the scales s and the bias change; the codes q stay the artifact's.
"""

import onnx_ir as ir

from exporters.graph import only_consumer, output_shape
from exporters.trace import OUTPUT_SCALE, placeholders


def absorb_scales(graph: ir.Graph) -> None:
    """Turn a Mul by a constant [out] right behind a linear into the linear's `output_scale`."""
    for node in placeholders(graph):
        multiply = only_consumer(node, "Mul")
        # γ may stand on either side of the product.
        factor = _other_input(multiply, node) if multiply is not None else None
        if multiply is None or factor is None or factor.const_value is None:
            continue
        # A constant of another shape is not per channel, for example a scalar or a position.
        if factor.const_value.shape != output_shape(node)[-1:]:
            continue
        node.attributes[OUTPUT_SCALE] = ir.AttrTensor(OUTPUT_SCALE, factor.const_value)
        # From here on the placeholder gives γ ∘ (W x + b).
        multiply.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove(multiply, safe=True)


def _other_input(multiply: ir.Node, node: ir.Node) -> ir.Value | None:
    """What the output of `node` is multiplied by."""
    return next((value for value in multiply.inputs if value is not node.outputs[0]), None)
