"""Labelled images: folders `root/class/name.png`, with `root/train` and `root/val` understood, and
the digits of the demo.

Calibration images are a seeded random draw; their file list is hashed into the artifact.
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
from marrq.models.load import DEMO_FOLDER
from marrq.models.preprocessing import Preprocessing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
"""What a file is read as, whatever its suffix: Pillow would hand PostScript to an interpreter."""
MAX_ASPECT = 256
"""Of the longer side of an image to the shorter, which resizing brings to the size of the model's
input."""

Location = Path | zipfile.Path


@dataclass(frozen=True)
class ImageSet:
    """Image files with their targets; targets index the model's logits."""

    name: str
    files: tuple[Location, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def sha256(self) -> str:
        """A hash over the list of class/file names, in order."""
        return hashlib.sha256(
            "\n".join(_class_and_name(file) for file in self.files).encode()
        ).hexdigest()

    def description(self) -> dict[str, str | int]:
        """Name, number and file-list hash, as reports give them."""
        return {"path": self.name, "images": len(self), "hash": self.sha256}

    def draw(self, samples: int, seed: int) -> "ImageSet":
        """A random subset of that size, in random order."""
        if samples > len(self):
            raise MarrqError(
                f"{self.name!r} has {len(self)} images for calibration, fewer than the {samples} "
                "samples: lower --samples"
            )
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[
            :samples
        ].tolist()
        return ImageSet(
            self.name,
            tuple(self.files[row] for row in rows),
            tuple(self.targets[row] for row in rows),
        )

    def batches(
        self, preprocessing: Preprocessing, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs float32 [batch, channels, height, width] and targets [batch], read when asked
        for."""
        transform = preprocessing.transform()
        for start in range(0, len(self), batch_size):
            files = self.files[start : start + batch_size]
            pixels = torch.stack([transform(read_image(file)) for file in files])
            yield pixels, torch.tensor(self.targets[start : start + batch_size])

    def pixels(self, preprocessing: Preprocessing) -> "Pixels":
        """All inputs, to be sliced."""
        return Pixels(self, preprocessing)


@dataclass(frozen=True)
class Pixels:
    """The inputs of an image set, read from disk when they are sliced: float32 [images, channels,
    height, width]."""

    images: ImageSet
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Tensor:
        part = ImageSet(self.images.name, self.images.files[rows], self.images.targets[rows])
        return next(part.batches(self.preprocessing, len(part)))[0]


def find_images(name: str, split: Literal["train", "val"], labels: tuple[str, ...]) -> ImageSet:
    """The images of a folder, or of the demo.

    Where the folder has a subfolder for the split, that is taken, else the folder itself. labels:
    the model's class names; class folders must be among them. A model that only numbers its classes
    gets the sorted folders, one a class, as is usual in training. Raises MarrqError naming what is
    missing or unknown."""
    root: Location = zipfile.Path(DEMO_FOLDER / "images.zip") if name == "demo" else Path(name)
    if not root.is_dir():
        raise MarrqError(
            f"data folder {name!r} does not exist: give a folder of class folders, or demo"
        )
    if (root / split).is_dir():
        root = root / split
    folders = sorted(
        (entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name
    )
    numbered = labels == tuple(str(index) for index in range(len(labels)))
    classes = (
        tuple(folder.name for folder in folders)
        if numbered and len(folders) == len(labels)
        else labels
    )
    files: list[Location] = []
    targets: list[int] = []
    for folder in folders:
        if folder.name not in classes:
            raise MarrqError(
                f"class folder {str(folder)!r} is not among the model's {len(classes)} classes: "
                "rename or remove it"
            )
        found = sorted(
            (entry for entry in folder.iterdir() if _is_image(entry)), key=lambda entry: entry.name
        )
        files += found
        targets += [classes.index(folder.name)] * len(found)
    if not files:
        raise MarrqError(
            f"no images in {str(root)!r}: it must hold class folders with {', '.join(SUFFIXES)} "
            "files"
        )
    return ImageSet(name, tuple(files), tuple(targets))


def _class_and_name(file: Location) -> str:
    return "/".join(str(file).replace(os.sep, "/").split("/")[-2:])


def _is_image(entry: Location) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")


def read_image(file: Location) -> Image.Image:
    """The image, with its pixels read. Raises MarrqError when there is none, a broken one, or one
    that a small file blows up to fill the memory: more pixels than Pillow warns of, or so long and
    thin that resizing makes as many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with file.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ValueError(f"its sides are as {image.width} to {image.height}")
                image.load()
                return image
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
        raise MarrqError(
            f"cannot read image {str(file)!r}: {error}; remove or replace it"
        ) from error
