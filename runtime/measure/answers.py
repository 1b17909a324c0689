"""What the models of a bench answer.

Of a model's outputs one is judged: the logits of a classifier, or else the first embedding. It is
kept for all images. All other outputs are compared with the float32 model's batch by batch
(runtime/measure/dense.py), because dense outputs of thousands of images do not fit into memory.

A model that gives NaN or infinity for one image is measured no further: its numbers overflow, and
top-1 of the images that are left would flatter it. The operator that overflows is looked for
instead (runtime/measure/overflow.py). The other models are measured as if it were not there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.measure.dense import OutputComparison, OutputError
from runtime.measure.images import Batches, MeasuredImages
from runtime.measure.measured import Entry, NotFinite
from runtime.measure.overflow import first_overflow
from runtime.metadata import Output, OutputKind
from runtime.session import Model, SessionSettings

Array = NDArray[np.float32]
# What a model gives for a batch, by the names of its outputs.
Given = dict[str, Array]


@dataclass(frozen=True)
class Answers:
    """What one model answers.

    kind: of the output that is judged; `dense` if there is none.
    vectors: of that output, [images, classes or channels]; without rows if there is none.
    gallery: the same of the gallery's images; None without a gallery.
    outputs: how far the other outputs are from the float32 model's.
    failing: the first image [1, channels, height, width] with numbers that are not finite; None if
        all are. broken: how many such images there are.
    """

    kind: OutputKind
    vectors: Array
    gallery: Array | None = None
    outputs: tuple[OutputError, ...] = ()
    failing: Array | None = None
    broken: int = 0

    @property
    def finite(self) -> bool:
        """Whether every number of every image is finite."""
        return self.failing is None


@dataclass(frozen=True)
class Answered:
    """Answers of every model by its file, and the targets of the images [images] and of the
    gallery's; None without a gallery."""

    answers: dict[Path, Answers]
    targets: NDArray[np.int64]
    gallery: NDArray[np.int64] | None = None


def judged_output(outputs: Sequence[Output]) -> Output | None:
    """The output that is judged: classes, or else the first embedding; None if all are dense."""
    for kind in ("classes", "features"):
        for output in outputs:
            if output.kind == kind:
                return output
    return None


class _Witness:
    """An open model, and what it has answered so far."""

    def __init__(self, file: Path, settings: SessionSettings) -> None:
        self.model = Model(file, settings)
        self.judged = judged_output(self.model.outputs)
        metadata = self.model.metadata()
        # A file of another tool names no classes.
        classes = len(metadata.labels) if metadata.is_marrqs else 0
        self.comparisons = {
            output.name: OutputComparison(output.name, classes)
            for output in self.model.outputs
            if output != self.judged
        }
        self.vectors: list[Array] = []
        self.gallery: list[Array] = []
        self.failing: Array | None = None
        self.broken = 0

    def answer(self, pixels: Array, kept: list[Array]) -> Given:
        """Run a batch, and keep the output that is judged."""
        found = self.model.run_all(pixels)
        if self.judged is not None:
            kept.append(found[self.judged.name])
        wrong = np.flatnonzero(~_are_finite(found))
        self.broken += len(wrong)
        # One image is enough to find out which operator overflows.
        if len(wrong) and self.failing is None:
            self.failing = pixels[wrong[:1]]
        return found

    def compare(self, reference: Given, found: Given) -> None:
        """Compare the outputs that are not judged. Both: of one batch."""
        for name, comparison in self.comparisons.items():
            comparison.add(reference[name], found[name])

    def answers(self, is_compared: bool) -> Answers:
        """is_compared: whether there is a float32 model to compare with."""
        comparisons = self.comparisons.values() if is_compared and self.failing is None else ()
        return Answers(
            "dense" if self.judged is None else self.judged.kind,
            np.concatenate(self.vectors) if self.vectors else np.empty((0, 0), np.float32),
            np.concatenate(self.gallery) if self.gallery else None,
            tuple(comparison.result() for comparison in comparisons),
            self.failing,
            self.broken,
        )


def predict(
    entries: Sequence[Entry],
    images: MeasuredImages,
    settings: SessionSettings,
    images_done: Callable[[int], None],
) -> Answered:
    """Answers of every model. The images are read once.

    images_done: called with the number of images of each batch.
    """
    # All sessions are open at once here, since nothing is timed.
    witnesses = {entry.file: _Witness(entry.file, settings) for entry in entries}
    float32 = next((entry.file for entry in entries if entry.flavor == "fp32"), None)
    targets = []
    for pixels, labels in images.batches:
        found = {path: one.answer(pixels, one.vectors) for path, one in witnesses.items()}
        # Infinity less infinity is no error of an output, and nobody asks for it.
        if float32 is not None and witnesses[float32].failing is None:
            for path, one in witnesses.items():
                if one.failing is None:
                    one.compare(found[float32], found[path])
        targets.append(labels)
        images_done(len(labels))
    among = _look_at_gallery(witnesses, images.gallery_batches, images_done)
    # What float32 cannot compute, is nothing to compare with.
    has_reference = float32 is not None and witnesses[float32].failing is None
    answers = {path: one.answers(has_reference) for path, one in witnesses.items()}
    return Answered(answers, np.concatenate(targets), among)


def _look_at_gallery(
    witnesses: dict[Path, _Witness], batches: Batches, images_done: Callable[[int], None]
) -> NDArray[np.int64] | None:
    """Have all models answer the gallery's images: its targets; None if there is none."""
    targets = []
    for pixels, labels in batches:
        for one in witnesses.values():
            one.answer(pixels, one.gallery)
        targets.append(labels)
        images_done(len(labels))
    return np.concatenate(targets) if targets else None


def _are_finite(found: Given) -> NDArray[np.bool_]:
    """Whether all numbers of an image are finite, [images]."""
    whole = [np.isfinite(output).reshape(len(output), -1).all(axis=1) for output in found.values()]
    finite: NDArray[np.bool_] = np.logical_and.reduce(whole)
    return finite


def not_finite(file: Path, answers: Answers) -> NotFinite | None:
    """How many images have numbers that are not finite, and why; None if all are."""
    if answers.failing is None:
        return None
    return NotFinite(answers.broken, first_overflow(file, answers.failing))
