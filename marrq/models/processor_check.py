"""Does an image processor of transformers do what its settings tell, and no more?

The settings are translated into marrq's terms (marrq/models/preprocessing.py). A class may do more
than its settings tell: it may cut a large image into parts, or crop before it resizes. So a few
images are given to the processor itself, and its pixels are compared.
"""

import itertools
import math
from typing import Any

import torch
from PIL import Image

from marrq.errors import MarrqError
from marrq.models.preprocessing import MODES, Preprocessing

PROBES = ((64, 64), (85, 53), (31, 40))
"""Widths and heights of small images with which a processor is compared: square, wide, and high."""
LARGEST_DIFFERENCE = 1e-4
"""Between two pixels of the model's input that count as the same. A level of 255 is 0.02 there, and
float32 rounds to 1e-6."""


def check_same_pixels(processor: Any, preprocessing: Preprocessing) -> None:
    """Compare the pixels of a few images with those of the image processor itself.

    processor: an instance, as AutoImageProcessor loads it.

    Raises MarrqError if one differs: the processor then does something that its settings do not
    tell.
    """
    name, transform = type(processor).__name__, preprocessing.transform()
    # Processors that cut an image into parts do so with images that are larger than the input.
    _, input_height, input_width = preprocessing.input_size
    probes = (*PROBES, (2 * input_width + 1, 3 * input_height // 2))
    modes = [MODES[preprocessing.input_size[0]]]
    modes += ["RGBA"] if preprocessing.transparency == "white" else []
    for (width, height), mode in itertools.product(probes, modes):
        image = _probe(width, height, mode)
        try:
            theirs = processor(images=image, return_tensors="pt")["pixel_values"]
        except Exception as error:
            # Pairs of images, boxes or text are missing, or a package; each raises its own error.
            raise MarrqError(
                f"{name} makes no pixels of an image of mode {mode} alone ({_first_line(error)}): "
                "choose a model whose input is one image"
            ) from error
        shape = tuple(getattr(theirs, "shape", ()))
        if len(shape) != 4 or len(theirs) != 1:
            raise MarrqError(
                f"{name} makes a video or several parts of an image, {shape}: choose a model whose "
                "input is one image"
            )
        # [1, channels, height, width] on both sides
        mine = transform(image)[None]
        same = mine.shape == theirs.shape
        difference = (mine - theirs).abs().max().item() if same else math.inf
        if difference > LARGEST_DIFFERENCE:
            found = f"by {difference:.3f}" if same else f"in size, {shape}"
            raise MarrqError(
                f"{name} does what its settings do not tell, its pixels of an image of {width} × "
                f"{height} differ {found}: name another image_processor_type in "
                "preprocessor_config.json if the model was trained with a plain one"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _probe(width: int, height: int, mode: str) -> Image.Image:
    """An image of noise, which every filter changes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (height, width, 4), dtype=torch.uint8, generator=generator)
    image = Image.frombytes("RGBA", (width, height), pixels.numpy().tobytes())
    return image if mode == "RGBA" else image.convert(mode)
