"""A model of transformers as a function from pixels to named tensors.

Models of transformers return a dictionary. Tracing, quantization and measurement need tensors in a
fixed order, so the names that are taken are chosen once, when the model is loaded. This file does
not import transformers, which takes seconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.models.named_outputs import LOGITS, NamedOutputs, as_returned

OUTPUTS = (
    (LOGITS, "pred_boxes"),
    ("predicted_depth",),
    ("image_embeds",),
    ("pooler_output",),
    ("last_hidden_state",),
)
"""Outputs of transformers that describe the image. The first group whose first name the model gives
is taken: a classifier may give hidden states beside its logits."""


def default_outputs(output: Mapping[str, Any], model: str) -> tuple[str, ...]:
    """The names that are taken if the user names none.

    output: what the model returned. model: the name of its class.
    Raises MarrqError if the model returns none of `OUTPUTS`.
    """
    for group in OUTPUTS:
        if group[0] in output:
            return tuple(name for name in group if name in output)
    raise MarrqError(
        f"{model} returns none of {', '.join(group[0] for group in OUTPUTS)}: choose a classifier "
        "or a feature extractor"
    )


def offered_outputs(output: Mapping[str, Any]) -> list[str]:
    """The names that a user may choose from: those of tensors."""
    # Hidden states and attentions are tuples of tensors.
    return [name for name, value in output.items() if isinstance(value, Tensor)]


class TransformersOutput(NamedOutputs):
    """A model of transformers that returns the outputs of some names."""

    def __init__(self, model: nn.Module, outputs: Sequence[str] = (LOGITS,)) -> None:
        """outputs: keys of what the model returns."""
        super().__init__(model, outputs)

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs of a batch. pixels: [batch, channels, height, width]."""
        # By keyword: a model of images and text has other arguments first.
        found = self.model(pixel_values=pixels)
        return as_returned(found[name] for name in self.outputs)
