"""How far dense outputs are from those of the float32 model: token features, masks, depth, boxes.

Such an output has thousands of numbers an image, so it is compared batch by batch, and nothing of
it is kept but sums. An image's output counts as one vector:

    cosine          of the vectors of both models: mean over the images, and the least
    relative error  √(Σ ‖a - b‖² / Σ ‖b‖²) over all images; b: of the float32 model
    agreement       share of positions with the same arg max along the axis of the classes

Only the logits have an axis of classes: the four numbers of a box are no classes, also if a model
has four. It is the axis that has as many entries as the model has labels; if there is none, the
last one if it has one entry more, for the class "no object" of detectors such as DETR. An output
without such an axis has no agreement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.cosines import Cosines, cosines, summarized
from runtime.metadata import LOGITS

# [images, …].
Outputs = NDArray[np.float32]


@dataclass(frozen=True)
class OutputError(Cosines):
    """How far one output is from that of the float32 model."""

    output: str
    # NaN, in JSON null, if float32 gives 0 throughout and the model does not.
    relative_error: float
    # Share of positions with the same class; None without an axis of classes.
    agreement: float | None


class OutputComparison:
    """Adds up how far an output is from the float32 model's, batch by batch."""

    def __init__(self, name: str, classes: int) -> None:
        """name: of the output. classes: number of the model's labels."""
        self._name, self._classes = name, classes if name == LOGITS else 0
        self._cosines: list[NDArray[np.float64]] = []
        # Sums of squares: of the differences, and of the float32 model's numbers.
        self._wrong, self._power = 0.0, 0.0
        # Positions with the same class, and all; none without an axis of classes.
        self._same, self._positions = 0, 0

    def add(self, reference: Outputs, found: Outputs) -> None:
        """Compare a batch. Both: [images, …]."""
        expected, flat = (x.reshape(len(x), -1).astype(np.float64) for x in (reference, found))
        self._cosines.append(cosines(expected, flat))
        self._wrong += float(np.square(flat - expected).sum())
        self._power += float(np.square(expected).sum())
        axis = class_axis(reference.shape[1:], self._classes)
        if axis is not None:
            # The batch is the first axis.
            same = reference.argmax(axis + 1) == found.argmax(axis + 1)
            self._same, self._positions = self._same + int(same.sum()), self._positions + same.size

    def result(self) -> OutputError:
        """What was found in all batches."""
        # Of an output that is 0 in both models nothing is lost.
        error = math.sqrt(self._wrong / self._power) if self._power else math.nan
        return OutputError(
            **vars(summarized(np.concatenate(self._cosines))),
            output=self._name,
            relative_error=error if self._wrong else 0.0,
            agreement=self._same / self._positions if self._positions else None,
        )


def class_axis(dims: Sequence[int], classes: int) -> int | None:
    """The axis of the classes, or None. dims: lengths of the axes behind the batch."""
    if not classes:
        return None
    places = [place for place, length in enumerate(dims) if length == classes]
    # Which of two such axes is meant, cannot be told; and a single class is always the best one.
    if len(places) == 1 and classes > 1:
        return places[0]
    has_no_object = len(dims) > 1 and not places and dims[-1] == classes + 1
    return len(dims) - 1 if has_no_object else None
