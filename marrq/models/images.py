"""Labelled images: folders `root/class/name.png`, and the digits of the demo.

If the folder has subfolders `train` and `val`, calibration takes the first and measurement the
second. Calibration images are a seeded random draw. The artifact stores a hash of their names.
"""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from marrq.errors import MarrqError
from marrq.files import check_data_folder
from marrq.models.load import DEMO_FOLDER
from marrq.models.preprocessing import Preprocessing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that a file is read as, whatever its suffix. Without the list Pillow would hand a
PostScript file to an interpreter."""

MAX_ASPECT = 256
"""Largest ratio of an image's sides. Resizing multiplies the longer side by as much as the shorter,
so a long and thin image would fill the memory."""

Location = Path | zipfile.Path


@dataclass(frozen=True)
class ImageSet:
    """Image files with their targets.

    name: the folder as the user named it.
    targets: one class index for each file; indices of the model's logits.
    """

    name: str
    files: tuple[Location, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def sha256(self) -> str:
        """A hash over the names `class/file`, in order."""
        names = "\n".join(_class_and_name(file) for file in self.files)
        return hashlib.sha256(names.encode()).hexdigest()

    def description(self) -> dict[str, str | int]:
        """Name, number of images and hash, as reports give them."""
        return {"path": self.name, "images": len(self), "hash": self.sha256}

    def draw(self, samples: int, seed: int) -> "ImageSet":
        """A random subset of `samples` images, in random order.

        Raises MarrqError if there are fewer images.
        """
        if samples > len(self):
            raise MarrqError(
                f"{self.name!r} has {len(self)} images for calibration, fewer than the {samples} "
                "samples: lower --samples"
            )
        # A generator of its own: the draw depends on the seed alone.
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rows = order[:samples].tolist()
        return ImageSet(
            self.name,
            tuple(self.files[row] for row in rows),
            tuple(self.targets[row] for row in rows),
        )

    def batches(
        self, preprocessing: Preprocessing, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs float32 [batch, channels, height, width] and targets [batch].

        A batch is read from disk when it is asked for. Raises MarrqError for a file that cannot be
        read.
        """
        transform = preprocessing.transform()
        for start in range(0, len(self), batch_size):
            files = self.files[start : start + batch_size]
            # Files differ in size: each is resized and cropped before they are stacked.
            pixels = torch.stack([transform(read_image(file)) for file in files])
            yield pixels, torch.tensor(self.targets[start : start + batch_size])

    def pixels(self, preprocessing: Preprocessing) -> "Pixels":
        """All inputs, as a sequence to be sliced."""
        return Pixels(self, preprocessing)


@dataclass(frozen=True)
class Pixels:
    """The inputs of an image set. A slice is read from disk: float32 [images, channels, height,
    width]."""

    images: ImageSet
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Tensor:
        # One batch, whatever its size: the caller decides how many images fit in memory.
        part = ImageSet(self.images.name, self.images.files[rows], self.images.targets[rows])
        return next(part.batches(self.preprocessing, len(part)))[0]


def find_images(
    name: str, split: Literal["train", "val"], labels: tuple[str, ...] | None = None
) -> ImageSet:
    """The images of a folder, or of the demo.

    name: a folder of class folders, or `demo`.
    split: the subfolder to take; a folder without this subfolder is taken itself.
    labels: class names in the order of the model's logits; every class folder must be among them.
        If the names are only numbers, "0", "1", …, and there are as many folders, the sorted
        folders are the classes, as is usual in training. With None the sorted folders are the
        classes too.

    Raises MarrqError if the folder does not exist, a class folder is unknown, or there is no image.
    """
    # Sorted folders and files: the same list on every machine, so a seed draws the same images.
    root = _split_root(name, split)
    folders = _sorted_by_name(entry for entry in root.iterdir() if entry.is_dir())
    classes = _classes(tuple(folder.name for folder in folders), labels)
    files: list[Location] = []
    targets: list[int] = []
    for folder in folders:
        if folder.name not in classes:
            raise MarrqError(
                f"class folder {str(folder)!r} is not among the model's {len(classes)} classes: "
                "rename or remove it"
            )
        found = _sorted_by_name(entry for entry in folder.iterdir() if _is_image(entry))
        files += found
        # A target is the position of the class among the model's logits.
        targets += [classes.index(folder.name)] * len(found)
    if not files:
        raise MarrqError(
            f"no images in {str(root)!r}: it must hold class folders with {', '.join(SUFFIXES)} "
            "files"
        )
    return ImageSet(name, tuple(files), tuple(targets))


def read_image(file: Location) -> Image.Image:
    """The image, with its pixels in memory.

    Raises MarrqError if the file is no image, is broken, or is a small file with an image that
    would fill the memory: with more pixels than Pillow warns of, or with a side more than
    MAX_ASPECT times longer than the other.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns of an image with very many pixels; here the warning is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with file.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
                # The header tells the size, so the check comes before the pixels are decoded.
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ValueError(f"its sides are as {image.width} to {image.height}")
                image.load()
                return image
    except Exception as error:
        # Pillow's decoders raise a dozen kinds of errors for a broken file.
        raise MarrqError(
            f"cannot read image {str(file)!r}: {error}; remove or replace it"
        ) from error


def _split_root(name: str, split: str) -> Location:
    check_data_folder(name)
    root: Location = zipfile.Path(DEMO_FOLDER / "images.zip") if name == "demo" else Path(name)
    return root / split if (root / split).is_dir() else root


def _classes(folders: tuple[str, ...], labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """Class names in the order of the targets. folders: names of the class folders, sorted."""
    if labels is None:
        return folders
    # "0", "1", … are placeholders: the sorted folders give the classes their names.
    numbered = labels == tuple(str(index) for index in range(len(labels)))
    return folders if numbered and len(folders) == len(labels) else labels


def _sorted_by_name(entries: Iterator[Location]) -> list[Location]:
    # zipfile.Path has no order of its own.
    return sorted(entries, key=lambda entry: entry.name)


def _class_and_name(file: Location) -> str:
    # The same names on every operating system, wherever the folder is.
    return "/".join(str(file).replace(os.sep, "/").split("/")[-2:])


def _is_image(entry: Location) -> bool:
    # Hidden files such as ._0.png are no images.
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
