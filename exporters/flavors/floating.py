"""The float baselines: the model an artifact was made from, in float32 or in float16, traced like
the quantized one.

The float16 graph takes and gives float32, so that every graph of a model is fed and read alike. On
the CPU provider, which has few float16 kernels, ONNX Runtime runs it as a graph of casts: compare
with float32 too."""

import copy
from typing import cast

import onnx_ir as ir
from torch import Tensor, nn

from exporters.trace import trace
from marrq.models.load import VisionModel

OPSET = 20
"""The lowest that has Gelu."""


class _Half(nn.Module):
    """A model in float16 with a float32 interface."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.model(pixels.half())).float()


def export_float32(model: VisionModel) -> ir.Model:
    """The model as it is."""
    return trace(model.module, model.preprocessing.input_size, OPSET, model.output)


def export_float16(model: VisionModel) -> ir.Model:
    """Weights and arithmetic in float16."""
    return trace(_Half(model.module), model.preprocessing.input_size, OPSET, model.output)
