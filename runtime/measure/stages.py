"""What an output becomes on the way from float weights in torch to a file that a server feeds, told
image by image.

Of an image no more is kept than what parity says of it: the cosine between the two sides of each
stage, and the best class if the output has classes. Outputs for each pixel of hundreds of images
would not fit into memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.cosines import cosines
from runtime.metadata import OutputKind

Array = NDArray[np.float32]
Cosines = NDArray[np.float64]
Classes = NDArray[np.int64]


@dataclass(frozen=True)
class StageOutput:
    """One output of the same images, [images, …]: logits, embeddings, or numbers of each pixel."""

    # Of the float model in torch; None if it is not at hand.
    original: Array | None
    # Of the quantized model in torch.
    simulated: Array
    # Of the quantized model in torch, with pixels nudged by a millionth.
    nudged: Array
    # Of the file, on the pixels that torch gets.
    exported: Array
    # Of the file, on the pixels of its own preprocessing.
    served: Array


@dataclass(frozen=True)
class BestClasses:
    """The class with the largest logit, [images], of each side of StageOutput."""

    original: Classes | None
    simulated: Classes
    nudged: Classes
    exported: Classes
    served: Classes

    @classmethod
    def of(cls, output: StageOutput) -> "BestClasses":
        """The best classes of logits [images, classes]."""
        return cls(
            original=None if output.original is None else output.original.argmax(1),
            simulated=output.simulated.argmax(1),
            nudged=output.nudged.argmax(1),
            exported=output.exported.argmax(1),
            served=output.served.argmax(1),
        )

    @classmethod
    def joined(cls, batches: Sequence["BestClasses"]) -> "BestClasses":
        """The same of the images of several batches."""
        originals = [batch.original for batch in batches if batch.original is not None]
        return cls(
            original=np.concatenate(originals) if originals else None,
            simulated=np.concatenate([batch.simulated for batch in batches]),
            nudged=np.concatenate([batch.nudged for batch in batches]),
            exported=np.concatenate([batch.exported for batch in batches]),
            served=np.concatenate([batch.served for batch in batches]),
        )


@dataclass(frozen=True)
class ComparedOutput:
    """What parity knows of one output: cosines between two sides, [images].

    quantized: float and simulated torch; None if the float model is not at hand.
    nudged: simulated torch, without and with the nudge.
    exported: simulated torch and the file.
    served: the file, on torch's pixels and on those of its own preprocessing.
    finite: whether the file gives numbers alone, [images].
    best: None for an output without classes.
    """

    quantized: Cosines | None
    nudged: Cosines
    exported: Cosines
    served: Cosines
    finite: NDArray[np.bool_]
    best: BestClasses | None


def compared(output: StageOutput, kind: OutputKind = "classes") -> ComparedOutput:
    """Compare the sides of one output for a batch of images."""
    simulated, exported = _rows(output.simulated), _rows(output.exported)
    finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(exported), axis=1)
    return ComparedOutput(
        quantized=None if output.original is None else cosines(_rows(output.original), simulated),
        nudged=cosines(simulated, _rows(output.nudged)),
        exported=cosines(simulated, exported),
        served=cosines(exported, _rows(output.served)),
        finite=finite,
        best=BestClasses.of(output) if kind == "classes" else None,
    )


def joined(batches: Sequence[ComparedOutput]) -> ComparedOutput:
    """The same of the images of several batches."""
    quantized = [batch.quantized for batch in batches if batch.quantized is not None]
    best = [batch.best for batch in batches if batch.best is not None]
    return ComparedOutput(
        quantized=np.concatenate(quantized) if quantized else None,
        nudged=np.concatenate([batch.nudged for batch in batches]),
        exported=np.concatenate([batch.exported for batch in batches]),
        served=np.concatenate([batch.served for batch in batches]),
        finite=np.concatenate([batch.finite for batch in batches]),
        best=BestClasses.joined(best) if best else None,
    )


def _rows(output: Array) -> Array:
    """Whatever an output is of an image, it is one vector: [images, numbers]."""
    return output.reshape(len(output), -1)
