"""One image file as 8-bit pixels: grey, RGB, or one of both with alpha.

A file is read for what it is, whatever it is called: Pillow looks at its first bytes, as it does
for torchvision's ImageFolder and timm's ImageDataset. What these two make of a file by
`convert("RGB")` is what `convert("RGB")` makes of the image here, with one exception:

    file                             here               convert("RGB") of torchvision and timm
    ------------------------------   ----------------   ---------------------------------------
    grey in 9 … 16 bits              the upper 8 bits   clipped: all above 255 is white
    integers or floats of 32 bits,   refused by name    clipped to 0 … 255
    signed samples, white as 0

Clipping makes white images of most photographs. The upper 8 bits are what Pillow takes of colour in
16 bits, and black and white are as PNG, TIFF and PPM define them. Where the file does not say what
white is, there is no right pixel.

Of several frames (GIF, APNG, WebP, TIFF, MPO) the first is taken. EXIF orientation is not applied,
but for TIFF, where Pillow itself applies it; nor are colour profiles. All of this is as in
torchvision and timm; transformers' own `load_image` turns an image as EXIF says. What a viewer
would show otherwise is noted (marrq/models/images/notes.py).
"""

import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from marrq.errors import MarrqError
from marrq.models.images.notes import DEPTH, FRAMES, ORIENTATION, Notes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "JPEG2000")
"""Formats that a file is read as. Without the list Pillow would hand a PostScript file to an
interpreter, and try forty rare decoders on a stranger's bytes."""

MAX_ASPECT = 256
"""Largest ratio of an image's sides. Resizing multiplies the longer side by as much as the shorter,
so a long and thin image would fill the memory."""

UPRIGHT = 1
"""EXIF's orientation of an image that is as it is to be shown."""

BLACK_IS_ZERO = 1
UNSIGNED = 1

Location = Path | zipfile.Path


def read_image(file: Location, notes: Notes | None = None) -> Image.Image:
    """The image, with its pixels in memory; its mode is L, LA, RGB or RGBA.

    notes: gets what a viewer would show otherwise.

    Raises MarrqError if the file is no image, is broken, has pixels of unknown range, or is a small
    file with an image that would fill the memory: with more pixels than Pillow warns of, or with a
    side more than MAX_ASPECT times longer than the other.
    """
    try:
        # Reading from a pipe would wait for ever.
        if isinstance(file, Path) and not file.is_file():
            raise ValueError("there is no such file")
        with warnings.catch_warnings():
            # Pillow only warns of an image with very many pixels; here the warning is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with file.open("rb") as stream, Image.open(stream, formats=_formats()) as image:
                # The header tells the size, so the check comes before the pixels are decoded.
                _check_size(image)
                frames = getattr(image, "n_frames", 1)
                image.load()
                found = {
                    ORIENTATION: _orientation(image) != UPRIGHT,
                    FRAMES: frames > 1,
                    DEPTH: image.mode.startswith("I"),
                }
                pixels = _in_eight_bits(image)
    except Exception as error:
        # Pillow's decoders raise a dozen kinds of errors for a broken file.
        raise MarrqError(
            f"cannot read image {str(file)!r}: {_reason(error)}; remove or replace it"
        ) from error
    if notes is not None:
        notes.add(file, *(note for note, holds in found.items() if holds))
    return pixels


def is_transparent(image: Image.Image) -> bool:
    """Whether a pixel of an image that `read_image` gave is not opaque."""
    # Many files have an alpha channel that is 255 everywhere.
    return "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255)


def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image) -> None:
    if min(image.size) < 1:
        raise ValueError(f"it has {image.width} × {image.height} pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"its sides are as {image.width} to {image.height}")


def _orientation(image: Image.Image) -> int:
    # Pillow turns a TIFF while it loads it, and removes the tag.
    return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The loaded image as L, LA, RGB or RGBA. Raises ValueError if its pixels have no known range,
    or Pillow cannot convert them."""
    if image.format == "TIFF":
        _check_samples(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _upper_bits(image)
    grey = image.mode in ("1", "L", "LA", "La")
    # Palettes, and grey and colour in PNG, name a transparent colour beside the pixels.
    if image.has_transparency_data:
        return _converted(image, "LA" if grey and image.mode != "1" else "RGBA")
    return _converted(image, "L" if grey else "RGB")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    is_plain = image.mode == mode and not image.info.get("transparency")
    return image if is_plain else image.convert(mode)


def _check_samples(image: Image.Image) -> None:
    """Refuse a TIFF whose numbers Pillow would take for others than they are."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    # Pillow reads signed bytes as unsigned ones, so that -1 becomes white.
    formats = tags.get(SAMPLEFORMAT, UNSIGNED)
    formats = formats if isinstance(formats, tuple) else (formats,)
    if any(kind != UNSIGNED for kind in formats):
        raise ValueError("its samples are signed or floating-point numbers, whose white is unknown")
    # Of more than 8 bits Pillow does not invert what is stored with white as 0.
    inverted = tags.get(PHOTOMETRIC_INTERPRETATION) != BLACK_IS_ZERO
    if image.mode.startswith("I;") and inverted:
        raise ValueError("it is grey in more than 8 bits with white as 0")


def _upper_bits(image: Image.Image) -> Image.Image:
    """Grey in 9 … 16 bits as the upper 8 of them: L, or LA if a value is transparent."""
    bits = _bits(image)
    if bits is None:
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode}, and the file does not say which number "
            "is white"
        )
    values = np.asarray(image)
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    # PNG may name one value that is transparent.
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    return Image.merge(
        "LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    )


def _bits(image: Image.Image) -> int | None:
    """In how many bits grey is stored from black to white; None if that is not known."""
    if image.mode.startswith("I;") and image.format == "PNG":
        return 16
    # Pillow scales PPM of any maximum above 255 to 0 … 65535.
    if image.mode == "I" and image.format == "PPM":
        return 16
    if image.mode.startswith("I;") and image.format == "TIFF":
        return int(image.tag_v2[BITSPERSAMPLE][0])  # type: ignore[attr-defined]
    return None


def _reason(error: Exception) -> str:
    # Pillow's own sentence shows the address of an object in memory.
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return str(error) or type(error).__name__
