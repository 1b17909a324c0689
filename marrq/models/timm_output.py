"""A model of timm as a function from pixels to named tensors.

    tokens      what forward_features gives: [batch, tokens, channels], or a map of features
    features    what enters the classifier: [batch, channels]
    logits      [batch, classes]

By default a model gives what its own forward gives, which is its logits, or its features if it has
no classifier; then it needs no wrapper.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from marrq.models.named_outputs import LOGITS, NamedOutputs, as_returned, check_offered

FEATURES, TOKENS = "features", "tokens"


def default_output(model: nn.Module) -> str:
    """What the model's own forward gives."""
    # Models that only encode have no number of classes, and others have none of them.
    return LOGITS if getattr(model, "num_classes", None) else FEATURES


def with_outputs(model: nn.Module, outputs: Sequence[str]) -> nn.Module:
    """The model, wrapped if it has to give more or other outputs than its own forward gives.

    Raises MarrqError if it does not give them.
    """
    default = default_output(model)
    if tuple(outputs) == (default,):
        return model
    # Not every model of timm splits its forward.
    splits = hasattr(model, "forward_features") and hasattr(model, "forward_head")
    others = [FEATURES, TOKENS] if splits else []
    offered = dict.fromkeys([default, *others])
    check_offered(outputs, list(offered), type(model).__name__)
    return TimmOutputs(model, outputs)


class TimmOutputs(NamedOutputs):
    """A model of timm that returns the outputs of some names."""

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs of a batch. pixels: [batch, channels, height, width]."""
        # torch types the attributes of a module as tensors or modules.
        model: Any = self.model
        tokens = model.forward_features(pixels)
        return as_returned(self._output(name, tokens) for name in self.outputs)

    def _output(self, name: str, tokens: Tensor) -> Tensor:
        if name == TOKENS:
            return tokens
        model: Any = self.model
        return cast(Tensor, model.forward_head(tokens, pre_logits=name == FEATURES))
