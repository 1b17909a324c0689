"""The float flavours: the model that an artifact was made from, traced like the quantized model.

The float16 graph takes and gives float32, so that every graph of a model is fed and read alike.
ONNX Runtime's CPU provider has few float16 kernels and runs that graph as a graph of casts; compare
with float32 too.
"""

import copy
from collections.abc import Callable
from typing import cast

import onnx_ir as ir
from torch import Tensor, nn

from exporters.opsets import OPSET
from exporters.trace import trace
from marrq.models.load import VisionModel


class _Half(nn.Module):
    """A model in float16 between float32 inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        # The module that torch traces: casts, and the model between them.
        super().__init__()
        # half() changes a module in place, and the caller still needs the float32 model.
        self.model = copy.deepcopy(model).half()

    def forward(self, pixels: Tensor) -> Tensor:
        # Casts at both ends, so that the interface of the graph is float32.
        return cast(Tensor, self.model(pixels.half())).float()


def export_float32(model: VisionModel, device: str) -> ir.Model:
    """The model as it is. device: of exporters/choices.py."""
    return trace(model.module, model.preprocessing.input_size, OPSET, model.output)


def export_float16(model: VisionModel, device: str) -> ir.Model:
    """Weights and arithmetic in float16. device: of exporters/choices.py."""
    return trace(_Half(model.module), model.preprocessing.input_size, OPSET, model.output)


# Bits of a weight are stated, not counted: every tensor of the model has this type.
FLOAT_FLAVORS: dict[str, tuple[Callable[[VisionModel, str], ir.Model], int]] = {
    "fp32": (export_float32, 32),
    "fp16": (export_float16, 16),
}
"""The exporter and the bits of a weight of each float flavour."""
