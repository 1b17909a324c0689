"""What is known of the embeddings of several models: how like they are to those of the float model,
and, if the images have classes, what they find and what they lose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from runtime.measure.embeddings import Likeness, likeness
from runtime.measure.retrieval import Gallery, Retrieval, find, retrieval
from runtime.measure.similarity import Classes, Features
from runtime.records import Record

FEWEST = 2
"""Images that embeddings can be compared on: an image needs another one beside it."""


@dataclass(frozen=True)
class Embedding(Record):
    """How good a model's embeddings are.

    likeness: to those of the float32 model; None if that is not measured.
    retrieval: what they find; None if the classes of the images are not known.
    """

    likeness: Likeness | None
    retrieval: Retrieval | None


@dataclass(frozen=True)
class Embedded:
    """Embeddings of one model: of the measured images [images, channels], and of the gallery's;
    None without a gallery."""

    measured: Features
    gallery: Features | None = None


@dataclass(frozen=True)
class KnownClasses:
    """Classes of the measured images [images], and of the gallery's; None without a gallery."""

    measured: Classes
    gallery: Classes | None = None


def compare_embeddings(
    models: Mapping[str, Embedded],
    known: KnownClasses | None,
    float32: str | None,
    baseline: str | None,
    rows_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Embedding]:
    """What is known of each model's embeddings, by its name; of no model, if there are fewer than
    two images.

    known: None if the classes are not known. float32: the model that embeddings are compared with;
    baseline: the model that losses are counted from; None if there is none.
    rows_done: called with the number of images of each chunk; the images of a model count once for
    likeness, and once for retrieval.
    """
    if any(len(one.measured) < FEWEST for one in models.values()):
        return {}
    found = {}
    if known is not None:
        for name, one in models.items():
            gallery = None
            if one.gallery is not None and known.gallery is not None:
                gallery = Gallery(one.gallery, known.gallery)
            found[name] = find(one.measured, known.measured, gallery, rows_done)
    rows = {}
    for name, one in models.items():
        alike, seen = None, None
        if float32 is not None:
            alike = likeness(models[float32].measured, one.measured, rows_done)
        if name in found:
            # The baseline loses nothing against itself.
            against = None if baseline in (None, name) else found[str(baseline)]
            seen = retrieval(found[name], against, str(baseline))
        rows[name] = Embedding(alike, seen)
    return rows
