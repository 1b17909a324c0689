"""A checkpoint in terms that timm and transformers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from marrq.errors import MarrqError
from marrq.models.preprocessing import Preprocessing

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Checkpoint:
    """What a library reads from a checkpoint.

    module: model in evaluation mode, float32, from images to one tensor.
    architecture: what the library needs to build the module without its weights.
    class_names: as the checkpoint names its classes; None if it does not.
    classifies: whether the module returns logits.
    notes: sentences about how the weights were read.
    """

    module: nn.Module
    architecture: dict[str, Any]
    preprocessing: Preprocessing
    class_names: list[str] | None
    classifies: bool
    notes: tuple[str, ...] = ()

    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits; none for a model that gives features.

        A model that does not name its classes gets WordNet synsets if it has 1,000 classes, as the
        folders of ImageNet-1k are named and sorted; else "0", "1", …

        Raises MarrqError if the numbers of logits and of names differ.
        """
        # Features have a last dimension too, but no classes.
        if not self.classifies:
            return ()
        count = self._count_logits()
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
    def _count_logits(self) -> int:
        # A trial forward counts them: the config of a checkpoint may be wrong.
        return int(self.module(torch.zeros(1, *self.preprocessing.input_size)).shape[-1])


def named_classes(names: Sequence[str] | None) -> list[str] | None:
    """Class names, or None if they are transformers' placeholders or there are none."""
    # transformers writes LABEL_0, LABEL_1, … if nobody has named the classes.
    if not names or list(names) == [f"LABEL_{index}" for index in range(len(names))]:
        return None
    return list(names)
