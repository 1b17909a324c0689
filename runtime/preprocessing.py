"""From an image to the model's input, by what the ONNX file itself says, in NumPy and Pillow alone:
what a server has to do.

The file's metadata `marrq.preprocessing` hold the terms of timm's evaluation transform:

    convert to L or RGB → resize by Pillow → crop or pad about the centre → x / 255
    → (x - mean) / std

    center    the shorter side becomes ⌊size / crop_pct⌋; what is outside the centre is cut off
    squash    both sides become ⌊size / crop_pct⌋, whatever the aspect ratio
    border    the longer side becomes ⌊size / crop_pct⌋; the rest is filled up with the mean

marrq/models/preprocessing.py has the transform that the model was quantized with. This one is
written anew and shares no code with it, so that the bench can tell if the two differ.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import BenchError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class ServedPreprocessing:
    """The terms of the metadata, and the function that they describe.

    input_size: (channels, height, width), 1 channel for grey images, 3 for RGB.
    interpolation: a key of INTERPOLATIONS.
    crop_pct: share of the resized image that the crop keeps.
    crop_mode: one of CROP_MODES.
    mean, std: per channel, of values in 0 … 1.

    Raises BenchError for an interpolation or a crop mode that is unknown.
    """

    input_size: Sequence[int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def read(cls, metadata: str) -> "ServedPreprocessing":
        """From the metadata `marrq.preprocessing` of a file. Raises BenchError if a term is missing
        or unknown."""
        try:
            return cls(**json.loads(metadata))
        except (TypeError, ValueError) as error:
            raise BenchError(
                f"the file's preprocessing {metadata!r} cannot be read ({error}): export it again"
            ) from error

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS or self.crop_mode not in CROP_MODES:
            raise BenchError(
                f"the file's preprocessing resizes by {self.interpolation!r} and crops by "
                f"{self.crop_mode!r}: known are "
                f"{', '.join(INTERPOLATIONS)}, and {', '.join(CROP_MODES)}"
            )

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """The model's input of one image: float32 [channels, height, width]."""
        # Divided by 255 in float32, as torchvision's ToTensor does: float64 would round otherwise.
        x = self.pixels(image).astype(np.float32) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return np.ascontiguousarray(np.divide(x - mean, std, dtype=np.float32).transpose(2, 0, 1))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """One image resized and cut, not normalized: [height, width, channels]."""
        # A grey model gets grey images, whatever the files are.
        image = image.convert("L" if self.input_size[0] == 1 else "RGB")
        width, height = self._resized(*image.size)
        return self._about_the_centre(
            np.asarray(image.resize((width, height), INTERPOLATIONS[self.interpolation])).reshape(
                height, width, -1
            )
        )

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        # An image is resized to more than the input takes, and the crop cuts it down.
        target_height, target_width = (
            math.floor(side / self.crop_pct) for side in self.input_size[1:]
        )
        if self.crop_mode == "squash":
            return target_width, target_height
        if self.crop_mode == "center" and target_height == target_width:
            # timm rounds this case down, and the others to the nearest.
            short, longer = (
                target_width,
                int(target_width * max(width, height) / min(width, height)),
            )
            return (short, longer) if width <= height else (longer, short)
        # Border fits the image into the target; centre covers the target with it.
        ratios = height / target_height, width / target_width
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(width / ratio), round(height / ratio)

    def _about_the_centre(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The part of an image [height, width, channels] that the input takes; an image that is too
        small is filled up."""
        # Only `border` fills with the mean; a centre crop of a small image is filled with black.
        fill = np.array(
            [round(255 * value) for value in self.mean] if self.crop_mode == "border" else 0,
            np.uint8,
        )
        for axis, wanted in enumerate(self.input_size[1:]):
            missing = max(wanted - image.shape[axis], 0)
            if missing:
                # An odd pixel goes behind the image, as torchvision's center_crop puts it.
                before, after = (
                    (*image.shape[:axis], part, *image.shape[axis + 1 :])
                    for part in (missing // 2, (missing + 1) // 2)
                )
                image = np.concatenate(
                    [np.broadcast_to(fill, before), image, np.broadcast_to(fill, after)], axis
                )
            # Rounded half to even, as timm and torchvision do.
            start = round((image.shape[axis] - wanted) / 2)
            image = image.take(range(start, start + wanted), axis)
        return image
