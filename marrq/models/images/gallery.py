"""The images that a model is measured on, and for embeddings those that k-NN looks among.

A model that gives embeddings knows no classes, so the classes of images are those of their folders:
each folder directly below the folder with the images is a class, as torchvision has it. Whatever
the folders are called, the model need not know their names.

k-NN looks for the class of an image among the images of `train`, the gallery. A folder without a
`train` of its own has no gallery: each image is looked for among the other measured images.
"""

from dataclasses import dataclass, replace

from marrq.errors import MarrqError
from marrq.models.images.counts import GALLERY_IMAGES
from marrq.models.images.image_set import ImageSet, find_images


@dataclass(frozen=True)
class MeasuredSets:
    """The images to measure on.

    measured: with targets, if their classes are known.
    gallery: what k-NN looks among, with targets of the same classes; None for the measured images.
    notes: sentences about what k-NN looks among.
    """

    measured: ImageSet
    gallery: ImageSet | None = None
    notes: tuple[str, ...] = ()


def find_measured(
    name: str, labels: tuple[str, ...], gallery_images: int = GALLERY_IMAGES
) -> MeasuredSets:
    """The images of a folder, or of the demo.

    labels: of the model; none if it has no classes. gallery_images: draw so many of the gallery at
    random, if it has more.

    Raises MarrqError as `find_images`.
    """
    measured = find_images(name, "val", labels)
    # A model with classes is measured by its own, and needs no neighbours.
    if labels:
        return MeasuredSets(measured)
    try:
        folders = class_folders(measured)
    except MarrqError as error:
        return MeasuredSets(replace(measured, why_unlabelled=str(error)))
    try:
        gallery, among = _gallery(name, measured)
    except MarrqError as error:
        labelled = replace(measured, targets=_numbered(folders, folders), why_unlabelled="")
        note = f"k-NN looks among the measured images themselves, each left out once: {error}"
        return MeasuredSets(labelled, notes=(note,))
    # One numbering for both: an image may be taken for a class that `train` alone has.
    known = [*folders, *among]
    labelled = replace(measured, targets=_numbered(folders, known), why_unlabelled="")
    found = replace(gallery, targets=_numbered(among, known), why_unlabelled="")
    if len(found) <= gallery_images:
        return MeasuredSets(labelled, found)
    # By a fixed seed: all models, in whatever run, look among the same images.
    note = f"k-NN looks among {gallery_images:,} of the {len(found):,} images of train, drawn at "
    return MeasuredSets(labelled, found.draw(gallery_images, 0), (f"{note}random",))


def class_folders(images: ImageSet) -> list[str]:
    """The class folder of each image. Raises MarrqError if the images have no classes."""
    outside = next((path for path in images.paths if "/" not in path), None)
    if outside is not None:
        raise MarrqError(
            f"the image {outside!r} of {images.name!r} is in no class folder: put all images into "
            "one folder for each class"
        )
    folders = [path.partition("/")[0] for path in images.paths]
    if len(set(folders)) == 1:
        raise MarrqError(
            f"all images of {images.name!r} are in the folder {folders[0]!r}: put them into one "
            "folder for each class"
        )
    return folders


def _gallery(name: str, measured: ImageSet) -> tuple[ImageSet, list[str]]:
    """The images of `train` and their class folders. Raises MarrqError if there are none of their
    own, or they have no classes."""
    found = find_images(name, "train")
    # A folder without splits gives all of its images for both purposes.
    if list(map(str, found.files)) == list(map(str, measured.files)):
        raise MarrqError(f"{name!r} has no train/")
    return found, class_folders(found)


def _numbered(folders: list[str], known: list[str]) -> tuple[int, ...]:
    """The place of each folder among all that are known, sorted."""
    numbers = {folder: number for number, folder in enumerate(sorted(set(known)))}
    return tuple(numbers[folder] for folder in folders)
