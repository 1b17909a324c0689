"""The images that a bench measures on."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.records import Record

NO_TARGET = -1
"""The target of every image if the images have no classes."""

# Preprocessed inputs [batch, channels, height, width] and targets [batch]: indices of the model's
# classes, or of the class folders if the model gives embeddings.
Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True)
class ImageData(Record):
    """A set of images. hash: over the list of their names."""

    path: str
    images: int
    hash: str


@dataclass(frozen=True)
class MeasuredImages:
    """The images that answers are measured on, and for embeddings of images with classes those
    that k-NN looks among; None for the measured images themselves. Each can be read once."""

    data: ImageData
    batches: Batches
    gallery: ImageData | None = None
    gallery_batches: Batches = ()
