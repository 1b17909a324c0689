"""A model of transformers as a function from a tensor to a tensor.

Models of transformers return a dictionary of outputs. Tracing, quantization and measurement need
one tensor. This file does not import transformers, which takes seconds.
"""

from collections.abc import Container
from typing import cast

from torch import Tensor, nn

from marrq.errors import MarrqError

OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
"""Outputs of transformers that describe the image, in the order of preference."""


class TransformersOutput(nn.Module):
    """A model of transformers that returns the first of `OUTPUTS` that the model has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits or features of a batch. pixels: [batch, channels, height, width].

        Raises MarrqError if the model returns none of `OUTPUTS`.
        """
        # By keyword: a model of images and text has other arguments first.
        output = self.model(pixel_values=pixels)
        return cast(Tensor, output[self.chosen(output)])

    def chosen(self, output: Container[str]) -> str:
        """The name of the output that is taken. output: what the model returned."""
        # A classifier may give hidden states beside its logits: the first name that is there wins.
        name = next((name for name in OUTPUTS if name in output), None)
        if name is None:
            raise MarrqError(
                f"{type(self.model).__name__} returns none of {', '.join(OUTPUTS)}: choose a "
                "classifier or a feature extractor"
            )
        return name
