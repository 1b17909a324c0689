"""A checkpoint in terms that timm and transformers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from marrq.errors import MarrqError
from marrq.models.named_outputs import LOGITS, as_tuple
from marrq.models.preprocessing import Preprocessing

IMAGENET_CLASSES = 1000

NO_OBJECT = "no object"
"""The name of a detector's last class."""


@dataclass(frozen=True)
class Checkpoint:
    """What a library reads from a checkpoint.

    module: model in evaluation mode, float32, from images to its outputs.
    architecture: what the library needs to build the module without its weights.
    class_names: as the checkpoint names its classes; None if it does not.
    outputs: names of what the module returns, in order.
    notes: sentences about how the weights were read.
    """

    module: nn.Module
    architecture: dict[str, Any]
    preprocessing: Preprocessing
    class_names: list[str] | None
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits; none for a model without logits.

        A model that does not name its classes gets WordNet synsets if it has 1,000 classes, as the
        folders of ImageNet-1k are named and sorted; else "0", "1", …
        Logits of pixels or boxes have names if one of their axes has as many entries.

        Raises MarrqError if the numbers of logits and of names differ.
        """
        # Features have a last dimension too, but no classes.
        if LOGITS not in self.outputs:
            return ()
        shape = self._logits_shape()
        if len(shape) != 2:
            return _dense_labels(self.class_names or [], shape)
        count = shape[-1]
        if self.class_names is not None:
            names = self.class_names
        # 1,000 classes without names are those of ImageNet-1k in practice.
        elif count == IMAGENET_CLASSES:
            names = ImageNetInfo().label_names()
        else:
            names = [str(index) for index in range(count)]
        # A wrong list would give every image after the gap a wrong target.
        if len(names) != count:
            raise MarrqError(
                f"the model has {count} outputs and {len(names)} class names: correct its "
                "config.json"
            )
        return tuple(names)

    @torch.no_grad()
    def _logits_shape(self) -> tuple[int, ...]:
        # A trial forward counts them: the config of a checkpoint may be wrong.
        found = as_tuple(self.module(torch.zeros(1, *self.preprocessing.input_size)))
        return tuple(found[self.outputs.index(LOGITS)].shape)


def _dense_labels(names: Sequence[str], shape: tuple[int, ...]) -> tuple[str, ...]:
    """The names of the classes that one axis of [1, …] stands for; none if no axis does."""
    # Detectors of the kind of DETR have one more entry, for a box that holds nothing.
    if len(names) + 1 in shape[1:] and len(names) not in shape[1:]:
        return (*names, NO_OBJECT)
    return tuple(names) if len(names) in shape[1:] else ()


def named_classes(names: Sequence[str] | None) -> list[str] | None:
    """Class names, or None if they are transformers' placeholders or there are none."""
    # transformers writes LABEL_0, LABEL_1, … if nobody has named the classes.
    if not names or list(names) == [f"LABEL_{index}" for index in range(len(names))]:
        return None
    return list(names)
