"""The images of a bench: which they are, and what the measuring gets of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from marrq.errors import MarrqError
from marrq.workflows.bench_options import BenchOptions, check_drop
from runtime.measure.embedded import FEWEST
from runtime.measure.images import NO_TARGET, Batches, ImageData, MeasuredImages
from runtime.metadata import Metadata, OutputKind
from runtime.session import Model

if TYPE_CHECKING:
    from marrq.models.images import ImageSet
    from marrq.models.images.gallery import MeasuredSets
    from marrq.models.preprocessing import Preprocessing

IMAGES_AT_ONCE = 8


def images_for(path: Path, data: str | None, options: BenchOptions) -> "MeasuredSets":
    """The images to measure on. path: an artifact or an ONNX file, which knows the name of the
    float model and the classes before anything is exported.

    Raises MarrqError if the images have no targets and a limit counts right answers, and for fewer
    images than a limit can be held to.
    """
    from marrq.artifact.config import labels_from_json
    from marrq.artifact.folder import read_config
    from marrq.models.images.gallery import find_measured
    from marrq.workflows.checks import data_for

    if path.is_file():
        opened = Model(path, options.session)
        metadata = checked_metadata(path, opened)
        source, labels = metadata.source_name, metadata.labels
    else:
        config = read_config(path)
        source, labels = config["model"]["name"], labels_from_json(config["labels"])
        # Its exports have the classes that were given.
        if options.classes is not None:
            labels = options.classes.names
    images = find_measured(data_for(source, data), labels, options.gallery_images)
    if options.limits.max_drop is not None:
        check_drop(images.measured, labels)
    if options.limits.min_cosine is not None and len(images.measured) < FEWEST:
        raise MarrqError(
            f"--min-cosine needs {FEWEST} images or more, and {images.measured.name!r} has "
            f"{len(images.measured)}: give more"
        )
    return images


def checked_metadata(path: Path, opened: Model) -> Metadata:
    """The metadata of a file. Raises MarrqError for a file that the bench cannot feed.

    path: what the user named.
    """
    metadata = opened.metadata()
    if not metadata.is_marrqs:
        raise MarrqError(
            f"{str(path)!r} was not written by `marrq export`: it does not say how its "
            "images are preprocessed"
        )
    # A graph that normalizes images itself takes uint8, and the bench feeds normalized pixels.
    if opened.input.type != "tensor(float)":
        raise MarrqError(
            f"{str(path)!r} takes {opened.input.type}, not normalized pixels: bench it as "
            "exported without --preprocess"
        )
    return metadata


def describe(images: "MeasuredSets", preprocessing: "Preprocessing") -> MeasuredImages:
    """What the measuring gets of the images."""
    measured, gallery = images.measured, images.gallery
    return MeasuredImages(
        _data(measured),
        _batches(measured, preprocessing),
        None if gallery is None else _data(gallery),
        () if gallery is None else _batches(gallery, preprocessing),
    )


def _batches(images: "ImageSet", preprocessing: "Preprocessing") -> Batches:
    """Inputs and targets. Read when the bench asks for them: all images together may not fit into
    memory."""
    targets = np.array(images.targets or [NO_TARGET] * len(images))
    for number, pixels in enumerate(images.batches(preprocessing, IMAGES_AT_ONCE)):
        yield pixels.numpy(), targets[number * IMAGES_AT_ONCE :][: len(pixels)]


def _data(images: "ImageSet") -> ImageData:
    return ImageData(images.name, len(images), images.sha256)


def unmeasured(images: "MeasuredSets", kind: OutputKind) -> tuple[str, ...]:
    """What is not measured on these images, and what k-NN looks among."""
    why, count = images.measured.why_unlabelled, len(images.measured)
    if kind == "dense":
        return ()
    if kind == "features" and count < FEWEST:
        return (f"embeddings are not compared: that takes {FEWEST} images or more",)
    if not images.measured.targets:
        what = "k-NN and retrieval are" if kind == "features" else "accuracy is"
        return (f"{what} not measured: {why}",)
    return images.notes
