"""The float flavours: the model that an artifact was made from, traced like the quantized model.

The graph goes through the passes of the low-bit graphs, so that a candidate is compared with the
fastest float graph that marrq can write. Its linears are placeholders on the way
(exporters/lowering/floats.py).

The float16 graph takes and gives float32, so that every graph of a model is fed and read alike.
ONNX Runtime's CPU provider has few float16 kernels and runs that graph as a graph of casts; compare
with float32 too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from exporters.float16 import to_float16
from exporters.lowering.floats import put_linears, take_linears
from exporters.opsets import (
    ONNXRUNTIME_DOMAIN,
    OPSET,
    lowest_opset,
)
from exporters.passes import finish, prepare
from exporters.trace import trace
from marrq.models.load import VisionModel


@dataclass(frozen=True)
class Floating:
    """A float flavour.

    bits: of a weight, 32 or 16. Every tensor of the model has this type.
    fuse: attention as one operator, which is faster and needs a newer ONNX Runtime; else as two
    products.
    """

    bits: int
    fuse: bool = True

    def lower(self, model: VisionModel, device: str) -> ir.Model:
        """The graph for a device. Raises MarrqError if torch cannot export the model."""
        graph = trace(model.module, model.preprocessing.input_size, OPSET, model.outputs)
        self.rewrite(graph, device)
        return graph

    def rewrite(self, graph: ir.Model, device: str) -> None:
        """Rewrite a trace in place. device: of exporters/choices.py."""
        # The passes look for placeholders, which a float trace has none of.
        linears = take_linears(graph.graph)
        prepare(graph, self.fuse, device)
        # Constants are multiplied in float32 and rounded once.
        if self.bits == 16:
            to_float16(graph)
        put_linears(graph.graph, linears)
        finish(graph, device)
        # A family without Attention of the standard needs no opset 23.
        graph.opset_imports[""] = lowest_opset(graph.graph)
        if any(node.domain == ONNXRUNTIME_DOMAIN for node in graph.graph):
            graph.opset_imports[ONNXRUNTIME_DOMAIN] = 1


FLOAT_FLAVORS: dict[str, Callable[..., Floating]] = {
    "fp32": partial(Floating, 32),
    "fp16": partial(Floating, 16),
}
"""Flavours of a float model. An option of a flavour is an argument."""
