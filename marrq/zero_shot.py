"""A model that gives features, with classes: the same model, followed by

    logit_c = s · ⟨f / ‖f‖, e_c⟩ + b          (marrq/models/class_embeddings.py)

as CLIP and SigLIP compute it (`logits_per_image` of transformers). SigLIP's b is part of the
logits, whose sigmoid is the probability that a text describes the image; the softmax over them, and
which class is best, do not depend on b.

Nothing is quantized here: classes are put in front of an export or a measurement, and any file of
classes fits any artifact of its model. The result is an ordinary classifier for whoever traces,
measures or serves it.
"""

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marrq.errors import MarrqError
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.load import VisionModel
from marrq.models.named_outputs import LOGITS
from marrq.quantized_model import QuantizedModel

HEAD = "zero_shot"
"""Name of the head among the children of a model's module; its tensors are initializers of that
name in a graph."""

AnyModel = TypeVar("AnyModel", bound=VisionModel | QuantizedModel)


class ClassHead(nn.Module):
    """Features [batch, dim] to logits [batch, classes]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, classes: ClassEmbeddings) -> None:
        super().__init__()
        # Not a Linear: this product is no linear of the model, and stays in float.
        self.register_buffer("weight", torch.tensor(classes.embeddings))
        self.register_buffer("scale", torch.tensor([classes.logit_scale]))
        self.register_buffer("bias", torch.full((len(classes.names),), classes.logit_bias))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of a batch. features: [batch, dim]."""
        # f / ‖f‖, [batch, dim]; without an ε, as transformers does.
        unit = features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        # s before the product: [batch, dim] has fewer numbers than [batch, classes] as a rule.
        return linear(unit * self.scale, self.weight, self.bias)


def with_classes(model: AnyModel, classes: ClassEmbeddings) -> AnyModel:
    """The model with logits of these classes in place of its features. Tensors are shared with the
    model given, which stays as it is; linears keep their paths.

    Raises MarrqError if the model has classes, gives something else than one embedding of the
    classes' length, or is another one than the classes were made with.
    """
    name = model.source.name
    # Classes may have numbers as names, too.
    if model.classes is not None or model.labels != _numbers(len(model.labels)):
        raise MarrqError(f"model {name!r} has classes of its own: leave out --classes")
    if classes.weights_sha256 not in ("", model.source.weights_sha256):
        raise MarrqError(
            f"the classes were made with {classes.model!r}, whose weights are not those of "
            f"{name!r}: make them with marrq classes {name}"
        )
    _check_features(model, classes)
    module = _sharing_copy(model.module)
    device = next(module.parameters()).device
    # A hook and no wrapper: in a wrapper all linears would have other paths than in the artifact.
    module.add_module(HEAD, ClassHead(classes).eval().to(device))
    module.register_forward_hook(_classify)
    return replace(model, module=module, labels=classes.names, outputs=(LOGITS,), classes=classes)


def without_classes(model: AnyModel) -> AnyModel:
    """The inverse of `with_classes`."""
    module, labels = _sharing_copy(model.module), labels_without_classes(model)
    # The hook that stays does nothing without the head.
    delattr(module, HEAD)
    return replace(model, module=module, labels=labels, outputs=model.source.outputs, classes=None)


def labels_without_classes(model: VisionModel | QuantizedModel) -> tuple[str, ...]:
    """The labels of a model before it was given classes, if it was."""
    if model.classes is None:
        return model.labels
    is_embedding = LOGITS not in model.source.outputs
    return () if is_embedding else _numbers(model.classes.embeddings.shape[1])


def _numbers(count: int) -> tuple[str, ...]:
    """The labels of outputs that nobody has named. timm calls the projection of a CLIP a classifier
    of as many classes as an embedding has numbers."""
    return tuple(map(str, range(count)))


def _classify(module: nn.Module, inputs: Any, features: Tensor) -> Tensor:
    """A forward hook: the head of the module, if it has one, on what the module returns."""
    head = getattr(module, HEAD, None)
    return features if head is None else head(features)


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A copy of the modules, with the same tensors."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


@torch.no_grad()
def _check_features(model: VisionModel | QuantizedModel, classes: ClassEmbeddings) -> None:
    """Raise MarrqError unless the model gives one vector of the embeddings' length for an image."""
    # A trial forward: a config may be wrong about what the model returns.
    device = next(model.module.parameters()).device
    found = model.module(torch.zeros(1, *model.preprocessing.input_size, device=device))
    names, dim = ", ".join(model.outputs), classes.embeddings.shape[1]
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise MarrqError(
            f"model {model.source.name!r} gives {names}, and classes need one vector an image: "
            "choose one such output when the model is quantized"
        )
    if found.shape[1] != dim:
        raise MarrqError(
            f"model {model.source.name!r} gives {names} of {found.shape[1]} numbers, and the "
            f"classes have {dim}: make them with the text tower of this model"
        )
