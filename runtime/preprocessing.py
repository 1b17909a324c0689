"""From an image to the model's input, by what the ONNX file itself says, in NumPy and Pillow alone:
what a server has to do.

The file's metadata `marrq.preprocessing` hold the terms:

    convert to L, RGB or RGBA → resize → crop or fill up → x / 255 → exchange red and blue
    → (x - mean) / std

    center    the shorter side becomes `resized`; what is outside the centre is cut off
    squash    both sides become `resized`, whatever the aspect ratio
    border    the longer side becomes `resized`; the rest is filled up with the mean
    corner    the longer side becomes `resized`; what is right of the image and below it is zero in
              the model's input

    pillow            Pillow resizes the image, as timm does it
    uint8-tensor      8-bit pixels are resized as torchvision resizes a tensor, which differs from
                      Pillow by a level of 255 in some pixels (runtime/resampling.py)
    float32-tensor    the same after x / 255, without rounding

marrq/models/preprocessing.py has the transform that the model was quantized with. This one is
written anew and shares no code with it, so that the bench can tell if the two differ.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime import resampling
from runtime.errors import BenchError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border", "corner")
RESAMPLINGS = {
    "pillow": tuple(INTERPOLATIONS),
    "uint8-tensor": resampling.INTERPOLATIONS,
    "float32-tensor": resampling.INTERPOLATIONS,
}
"""Ways of resampling, and the interpolations of each."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of an image with so many channels."""

Pixels = NDArray[np.uint8] | NDArray[np.float32]
"""uint8 in 0 … 255, or float32 in 0 … 1."""


@dataclass(frozen=True)
class ServedPreprocessing:
    """The terms of the metadata, and the function that they describe.

    input_size: (channels, height, width); 1 channel for grey images, 3 for RGB, 4 for RGBA.
    interpolation: a key of INTERPOLATIONS.
    resized: (height, width) before the crop; None if the image is not resized.
    crop_mode: one of CROP_MODES.
    mean, std: per channel of the input, of values in 0 … 1.
    resampling: a key of RESAMPLINGS.
    transparency: `drop`, or `white` for a white background.
    bgr: whether the input has blue first.

    Raises BenchError for a term with an unknown value.
    """

    input_size: Sequence[int]
    interpolation: str
    resized: Sequence[int] | None
    crop_mode: str
    mean: Sequence[float]
    std: Sequence[float]
    resampling: str = "pillow"
    transparency: str = "drop"
    bgr: bool = False

    @classmethod
    def read(cls, metadata: str) -> "ServedPreprocessing":
        """From the metadata `marrq.preprocessing` of a file. Raises BenchError if a term is missing
        or unknown."""
        try:
            terms: dict[str, Any] = json.loads(metadata)
            # Earlier files hold timm's terms, in which the size before the crop is a quotient.
            if "crop_pct" in terms:
                share = terms.pop("crop_pct")
                terms["resized"] = [math.floor(side / share) for side in terms["input_size"][1:]]
            return cls(**terms)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BenchError(
                f"the file's preprocessing {metadata!r} cannot be read ({error}): export it again"
            ) from error

    def __post_init__(self) -> None:
        known = {
            "resampling": tuple(RESAMPLINGS),
            "interpolation": RESAMPLINGS.get(self.resampling, ()),
            "crop_mode": CROP_MODES,
            "transparency": ("drop", "white"),
        }
        for term, values in known.items():
            value = getattr(self, term)
            if value not in values:
                raise BenchError(
                    f"the file's preprocessing has {term} {value!r}, known are "
                    f"{', '.join(values)}: read the file with the marrq that wrote it"
                )

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """The model's input of one image: float32 [channels, height, width].

        Raises BenchError for an image without the channels that the model takes.
        """
        x = self._cut(image)
        if x.dtype == np.uint8:
            # Divided by 255 in float32, as torchvision's ToTensor does: float64 would round
            # otherwise.
            x = x.astype(np.float32) / np.float32(255)
        if self.bgr:
            # A fourth channel keeps its place.
            x = x[..., [2, 1, 0, *range(3, x.shape[-1])]]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        normal = np.divide(x - mean, std, dtype=np.float32)
        # Of `corner` the rest of the input is zero.
        filled = np.zeros((*self.input_size[1:], normal.shape[-1]), np.float32)
        filled[: normal.shape[0], : normal.shape[1]] = normal
        return np.ascontiguousarray(filled.transpose(2, 0, 1))

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """One image resized and cut, not normalized: [height, width, channels], red first.

        Raises BenchError if the model's input cannot be made of 8-bit pixels.
        """
        if self.crop_mode == "corner" or self.resampling == "float32-tensor":
            raise BenchError(
                "the model's images are no 8-bit pixels between resizing and normalization: export "
                "it without --preprocess"
            )
        return self._cut(image).astype(np.uint8, copy=False)

    def _cut(self, image: Image.Image) -> Pixels:
        """One image resized and cut: [height, width, channels]."""
        image = self._coloured(image)
        height, width = self._resized(*image.size)
        pixels: Pixels
        if self.resampling == "pillow":
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
            pixels = np.asarray(image).reshape(height, width, -1)
        else:
            pixels = np.asarray(image).reshape(image.height, image.width, -1)
            if self.resampling == "float32-tensor":
                pixels = pixels.astype(np.float32) / np.float32(255)
            pixels = resampling.resize(pixels, height, width, self.interpolation)
        return pixels if self.crop_mode == "corner" else self._about_the_centre(pixels)

    def _coloured(self, image: Image.Image) -> Image.Image:
        """The image with the channels that the model takes."""
        channels = self.input_size[0]
        if channels not in MODES:
            raise BenchError(
                f"the model takes {channels} channels, and images have 1, 3 or 4: make its input "
                "without this preprocessing"
            )
        # Pillow would clip them to 0 … 255, which makes most of such images white.
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise BenchError(
                f"an image of mode {image.mode} has no 8-bit pixels: convert it to L or RGB first"
            )
        has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
        if channels == 4 and not has_alpha:
            raise BenchError(
                f"the model takes 4 channels, and an image of mode {image.mode} has no fourth: "
                "give RGBA images"
            )
        if channels == 3 and has_alpha and self.transparency == "white":
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert(MODES[channels])

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if self.resized is None:
            return height, width
        target_height, target_width = self.resized
        if self.crop_mode == "squash":
            return target_height, target_width
        if self.crop_mode == "center" and target_height == target_width:
            # Both libraries round this case down, and others to the nearest.
            longer = int(target_width * max(width, height) / min(width, height))
            return (longer, target_width) if width <= height else (target_width, longer)
        if self.crop_mode == "corner":
            scale = target_width / max(width, height)
            return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)
        # Border fits the image into the target; centre covers the target with it.
        ratios = height / target_height, width / target_width
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _about_the_centre(self, image: Pixels) -> Pixels:
        """The part of an image [height, width, channels] that the input takes; an image that is too
        small is filled up."""
        # Only `border` fills with the mean; a centre crop of a small image is filled with black.
        fill = np.array(
            [round(255 * value) for value in self.mean] if self.crop_mode == "border" else 0,
            image.dtype,
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
            start = (image.shape[axis] - wanted) / 2
            # timm and torchvision round half to even, transformers rounds down.
            first = round(start) if self.resampling == "pillow" else int(start)
            image = image.take(range(first, first + wanted), axis)
        return image
