"""Which files of a folder are images for calibration, and which for measurement.

Images are found at any depth, through links too, in the order of their paths. What people do not
see is passed over at every level: hidden files and folders, and those that systems leave behind.

A folder may have subfolders for the two purposes:

    calibration    train
    measurement    val, validation or valid; if there is none of them, test

A folder without any of these four kinds serves both. A name counts in upper and lower case. A
subfolder of these names may be a class too, as `train` is in CIFAR-100 and COCO: it is one if it
holds images and no folders of images, and all folders beside it are classes of the model.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from marrq.errors import MarrqError
from marrq.models.images.counts import FEWEST_IMAGES
from marrq.models.images.pixels import FORMATS, Location

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".mpo", ".avif", ".jp2", ".j2k"),
)
"""How the name of an image ends, in upper or lower case: the usual suffixes of the formats that are
read. torchvision takes .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff and .webp alone, timm .png,
.jpg and .jpeg."""

SYSTEM_NAMES = {
    *("__macosx", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot", "$recycle.bin"),
    *("recycler", "system volume information", "lost+found", "__pycache__"),
}
"""What macOS, Synology, QNAP, Windows, Linux and Python leave in folders, in lower case."""

Split = Literal["train", "val"]

SPLITS: dict[Split, tuple[tuple[str, ...], ...]] = {
    "train": (("train",),),
    "val": (("val", "validation", "valid"), ("test",)),
}
"""Names of the subfolders for a purpose: the first group that is there. Two names of one group are
two readings."""

SPLIT_NAMES = {name for groups in SPLITS.values() for group in groups for name in group}


def images_below(folder: Location, root: Location | None = None) -> Iterator[tuple[str, Location]]:
    """The images of a folder at any depth, each with its path from the folder, `class/name.png`.

    root: a folder above, to which no link is followed.

    Sorted by the parts of the path: the same order on every machine, so that a seed draws the same
    images. Raises MarrqError for a folder that cannot be listed.
    """
    above = frozenset() if root is None else frozenset({os.path.realpath(str(root))})
    return (found for found in _walk(folder, "", above) if _is_image(found[1].name))


def _walk(folder: Location, above: str, parents: frozenset[str]) -> Iterator[tuple[str, Location]]:
    """All files that people see. above: the path to the folder. parents: folders above it."""
    here = os.path.realpath(str(folder))
    # A link to a folder above would be followed for ever.
    if here in parents:
        return
    for name, is_folder in _entries(folder):
        if is_folder:
            yield from _walk(folder / name, f"{above}{name}/", parents | {here})
        else:
            yield above + name, folder / name


def subfolders(folder: Location) -> list[Location]:
    """The folders that people see in a folder, sorted by name."""
    return [folder / name for name, is_folder in _entries(folder) if is_folder]


def holds_images(folder: Location) -> bool:
    """Whether there is an image at any depth."""
    # The walk ends with the first image.
    return next(images_below(folder), None) is not None


def no_images(folder: Location) -> MarrqError:
    """The error for a folder without images; names what the folder holds instead."""
    text = f"no images in {str(folder)!r}: it must hold files of {', '.join(FORMATS)}"
    names = (file.name.lower() for _, file in _walk(folder, "", frozenset()) if "." in file.name)
    # A folder of .heic files looks full of images to its owner.
    for suffix, count in Counter(name.rpartition(".")[2] for name in names).most_common(1):
        text += f"; it has {count} .{suffix} files"
    return MarrqError(text)


def too_few(name: str, count: int, samples: int) -> MarrqError:
    """The error for fewer images than samples."""
    if samples <= FEWEST_IMAGES:
        return MarrqError(
            f"{name!r} has {count} of the {FEWEST_IMAGES} images that calibration needs at least: "
            "add images"
        )
    return MarrqError(
        f"{name!r} has {count} images for calibration, fewer than the {samples} samples: lower "
        "--samples"
    )


def no_classes(folder: object) -> str:
    """Why images that lie beside each other have no classes."""
    return (
        f"the images in {str(folder)!r} are in no class folders: put them into one folder for each "
        "class"
    )


def check_images(name: str, samples: int | None = None) -> None:
    """Raise MarrqError for a folder that cannot serve, whatever the classes of the model are.

    name: of an existing folder. samples: how many images to calibrate on; None for images to
    measure on.

    `find_images` finds the same, and more, when the model is known. No more images are listed here
    than are needed, since a folder may hold millions.
    """
    if samples is not None:
        _check_calibration(name, samples)
        return
    folder = _folder_for(Path(name), "val")
    if folder is not None and not holds_images(folder):
        raise no_images(folder)


def _check_calibration(name: str, samples: int) -> None:
    folder = _folder_for(Path(name), "train")
    if folder is None:
        return
    count = sum(1 for _ in islice(images_below(folder), samples))
    if count == 0:
        raise no_images(folder)
    if count < samples:
        raise too_few(name, count, samples)


class _ClassesDecide(Exception):
    """Which folder is meant depends on the classes of the model."""


def _folder_for(root: Path, split: Split) -> Path | None:
    """The folder with the images for a purpose; None if the classes of the model decide."""

    def are_classes(folders: Sequence[str]) -> bool:
        raise _ClassesDecide

    try:
        return split_folder(root, split, are_classes)
    except _ClassesDecide:
        return None


def split_folder(root: Path, split: Split, are_classes: Callable[[Sequence[str]], bool]) -> Path:
    """The folder with the images for a purpose: a subfolder of `root`, or `root` itself.

    split: `train` for calibration, `val` for measurement.
    are_classes: whether folders of these names are the model's classes.

    Raises MarrqError if two subfolders may be meant, and if `root` has subfolders for the other
    purpose alone: the images to measure on must not be taken for calibration without a word.
    """
    folders = subfolders(root)
    # Names are compared as a file system without capitals would.
    splits = [folder for folder in folders if folder.name.casefold() in SPLIT_NAMES]
    if not splits or _are_classes(splits, folders, are_classes):
        return root
    for group in SPLITS[split]:
        # The first group that is there: nobody measures on `test` while there is a `val`.
        found = [folder for folder in splits if folder.name.casefold() in group]
        if len(found) > 1:
            raise MarrqError(
                f"{str(root)!r} has {_named(found)}, and either may be meant: give one of them, or "
                "rename the other"
            )
        if found:
            return Path(str(found[0]))
    # Only subfolders for the other purpose are left.
    purpose = "calibrate" if split == "train" else "measure"
    wanted = " or ".join(f"{name}/" for group in SPLITS[split] for name in group)
    raise MarrqError(
        f"{str(root)!r} has {_named(splits)}, and no {wanted} to {purpose} on: give "
        f"{str(splits[0])!r} itself to take its images"
    )


def _are_classes(
    splits: list[Location], folders: list[Location], are_classes: Callable[[Sequence[str]], bool]
) -> bool:
    """Whether subfolders with names of splits are classes. Raises MarrqError if that cannot be
    told."""
    # A split holds class folders; only one that holds images at once may be a class.
    if any(holds_images(inner) for folder in splits for inner in subfolders(folder)):
        return False
    # The labels of the model decide, if all folders are classes.
    filled = [folder for folder in folders if holds_images(folder)]
    if are_classes([folder.name for folder in filled]):
        return True
    # Several splits side by side, or nothing beside one: a folder of flat splits.
    others = [folder for folder in filled if folder not in splits]
    if len(splits) > 1 or not others:
        return False
    raise MarrqError(
        f"{str(splits[0])!r} may be for {splits[0].name!r} alone, or a class beside "
        f"{others[0].name!r}: give {str(splits[0])!r} itself, or rename it"
    )


def _named(folders: list[Location]) -> str:
    return " and ".join(f"{folder.name}/" for folder in folders)


def _entries(folder: Location) -> list[tuple[str, bool]]:
    """Names of what people see in a folder, sorted, with whether it is a folder.

    Names and no paths: of a million files most are never asked for, and a path costs more than the
    listing."""
    try:
        if isinstance(folder, zipfile.Path):
            found = [(entry.name, entry.is_dir()) for entry in folder.iterdir()]
        else:
            # The listing tells folders from files; asking for each of a million takes minutes.
            with os.scandir(folder) as listing:
                found = [(entry.name, entry.is_dir()) for entry in listing]
    except OSError as error:
        raise MarrqError(
            f"folder {str(folder)!r} cannot be listed ({error.strerror}): correct its permissions"
        ) from error
    return sorted(entry for entry in found if _is_visible(entry[0]))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in SYSTEM_NAMES
