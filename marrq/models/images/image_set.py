"""The images of a folder, or of the demo: for calibration as they are, for measurement with the
class of each.

Calibration images are a seeded random draw. The artifact stores a hash of their names.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from PIL import Image
from torch import Tensor

from marrq.errors import MarrqError
from marrq.files import check_data_folder
from marrq.models.images.classes import Folders, classes_of
from marrq.models.images.counts import CALIBRATION_IMAGES, FEW_IMAGES
from marrq.models.images.folders import (
    Split,
    images_below,
    no_classes,
    no_images,
    split_folder,
    subfolders,
    too_few,
)
from marrq.models.images.notes import DROPPED, ON_WHITE, Notes
from marrq.models.images.pixels import Location, is_transparent, read_image
from marrq.models.load import DEMO_FOLDER
from marrq.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class ImageSet:
    """Image files, with their targets if their classes are known.

    name: the folder as the user named it.
    files: at any depth.
    paths: of the files from the folder with the images, `class/name.png`.
    targets: one class index for each file, indices of the model's logits; none if the classes
        of the files are not known.
    why_unlabelled: a sentence that says why there are no targets; empty if there are.
    notes: what was noted of the files when they were read; subsets share it.
    """

    name: str
    files: tuple[Location, ...]
    paths: tuple[str, ...]
    targets: tuple[int, ...]
    why_unlabelled: str = ""
    notes: Notes = field(default_factory=Notes, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def sha256(self) -> str:
        """A hash over the paths, in order."""
        # Names of no valid UTF-8 are hashed by their bytes.
        return hashlib.sha256("\n".join(self.paths).encode(errors="surrogateescape")).hexdigest()

    def description(self) -> dict[str, str | int]:
        """Name, number of images and hash, as reports give them."""
        return {"path": self.name, "images": len(self), "hash": self.sha256}

    def labelled(self) -> tuple[int, ...]:
        """The targets, for a caller that counts right answers. Raises MarrqError if there are
        none."""
        if not self.targets:
            raise MarrqError(f"accuracy cannot be measured: {self.why_unlabelled}")
        return self.targets

    def noted(self) -> tuple[str, ...]:
        """Sentences about the images that were read so far, of this set and its subsets."""
        return self.notes.sentences()

    def subset(self, rows: Sequence[int] | slice) -> "ImageSet":
        """Some of the images, in the order of `rows`."""
        # A slice stops at the end by itself.
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows
        return ImageSet(
            self.name,
            tuple(self.files[row] for row in chosen),
            tuple(self.paths[row] for row in chosen),
            tuple(self.targets[row] for row in chosen) if self.targets else (),
            self.why_unlabelled,
            # The same object, so that what is read of a subset is noted of the whole.
            self.notes,
        )

    def samples(self, wanted: int | None) -> int:
        """How many images calibrate: as many as are wanted; None for the default, which is
        CALIBRATION_IMAGES, or all if there are fewer."""
        if wanted is not None:
            return wanted
        if len(self) < FEW_IMAGES:
            self.notes.whole.add(
                f"{self.name!r} has {len(self)} images to calibrate on, and fewer than "
                f"{FEW_IMAGES} cost accuracy: give more"
            )
        return min(CALIBRATION_IMAGES, len(self))

    def draw(self, samples: int, seed: int) -> "ImageSet":
        """A random subset of `samples` images, in random order.

        Raises MarrqError if there are fewer images.
        """
        if samples > len(self):
            raise too_few(self.name, len(self), samples)
        # A generator of its own: the draw depends on the seed alone.
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[:samples].tolist())

    def batches(self, preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
        """Inputs float32 [batch, channels, height, width], in the order of the files.

        A batch is read from disk when it is asked for. Raises MarrqError for a file that cannot be
        read.
        """
        transform = preprocessing.transform()
        for start in range(0, len(self), batch_size):
            files = self.files[start : start + batch_size]
            # Files differ in size: each is resized and cropped before they are stacked.
            yield torch.stack([self._input(file, preprocessing, transform) for file in files])

    def _input(
        self,
        file: Location,
        preprocessing: Preprocessing,
        transform: Callable[[Image.Image], Tensor],
    ) -> Tensor:
        image = self._read(file, preprocessing)
        try:
            return transform(image)
        except MarrqError as error:
            raise MarrqError(f"image {str(file)!r} does not fit: {error}") from error

    def _read(self, file: Location, preprocessing: Preprocessing) -> Image.Image:
        image = read_image(file, self.notes)
        # A model with four channels takes the alpha.
        if preprocessing.input_size[0] != len("RGBA") and is_transparent(image):
            on_white = preprocessing.transparency == "white"
            self.notes.add(file, ON_WHITE if on_white else DROPPED)
        return image

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
        part = self.images.subset(rows)
        return next(part.batches(self.preprocessing, len(part)))


def find_images(name: str | Path, split: Split, labels: tuple[str, ...] | None = None) -> ImageSet:
    """The images of a folder, or of the demo.

    name: a folder of images, or `demo`.
    split: `train` for calibration, `val` for measurement; which subfolder that is says
        marrq/models/images/folders.py.
    labels: class names in the order of the model's logits; None or none of them if labels do not
        matter.

    If the folders are classes of the model (marrq/models/images/classes.py), the images have
    targets, and images beside these folders are passed over, as torchvision does. Otherwise all
    images at any depth are taken, without targets.

    Raises MarrqError if the folder does not exist, there is no image, or subfolders of it may be
    splits in two ways.
    """
    # A Path is a name too, but what records it takes texts alone.
    name = str(name)
    if split not in get_args(Split):
        raise MarrqError(f"the split is train or val: got {split!r}")
    check_data_folder(name)
    labels = labels or ()
    root = _root(name, split, labels)
    # Class folder by class folder, so that each image's class is known.
    inner = subfolders(root)
    found = {folder.name: list(images_below(folder, root)) for folder in inner}
    folders = Folders(
        str(root),
        tuple(folder for folder, images in found.items() if images),
        tuple(folder for folder, images in found.items() if not images),
    )
    # Whatever keeps the folders from being classes, the images are there for calibration; who
    # counts right answers gets the reason.
    try:
        classes = _classes(folders, labels)
    except MarrqError as error:
        # Images beside the folders are images too, now that no folder is a class.
        everything = list(images_below(root))
        if not everything:
            raise no_images(root) from error
        paths, files = zip(*everything, strict=True)
        return ImageSet(name, files, paths, (), str(error))
    # Sorted by class folder and name, as `images_below` sorts: the draw does not depend on labels.
    rows = [
        (file, f"{folder}/{path}", classes[folder])
        for folder in folders.filled
        for path, file in found[folder]
    ]
    files, paths, targets = zip(*rows, strict=True)
    return ImageSet(name, files, paths, targets)


def _classes(folders: Folders, labels: tuple[str, ...]) -> dict[str, int]:
    """The class of each folder with images. Raises MarrqError if there are no classes."""
    if not labels:
        raise MarrqError("the model has no classes, it gives features")
    if not folders.filled:
        raise MarrqError(no_classes(folders.root))
    return classes_of(folders, labels)


def _root(name: str, split: Split, labels: tuple[str, ...]) -> Location:
    """The folder with the images for a purpose."""
    # The demo's zip has both folders, with digits as classes.
    if name == "demo":
        return zipfile.Path(DEMO_FOLDER / "images.zip") / split

    def are_classes(folders: Sequence[str]) -> bool:
        try:
            _classes(Folders(name, tuple(folders)), labels)
        except MarrqError:
            return False
        return True

    return split_folder(Path(name), split, are_classes)
