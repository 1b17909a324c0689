"""From an image file to the model's input: the model's own preprocessing.

Calibration, evaluation and bench use this preprocessing and no other. It is timm's evaluation
transform, described in timm's terms. The image processor of a transformers model is translated into
these terms, or refused if they cannot express it. The artifact and every exported graph carry the
description.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from marrq.errors import MarrqError

PIL_INTERPOLATION = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
"""Names of Pillow's numbered filters, which image processors give under `resample`."""

KNOWN_PROCESSOR_STEPS = {
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_center_crop",
    "do_convert_rgb",
}
"""Steps of an image processor that Preprocessing can express."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, scale to 0 … 1, normalize.

    input_size: (channels, height, width), in pixels.
    interpolation: timm's name.
    crop_pct: share of the resized image's side that the crop keeps.
    crop_mode: `center`, `squash` or `border`.
    mean, std: one number per channel, for values in 0 … 1.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """The inverse of `dataclasses.asdict` after JSON, which has lists and no tuples."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**plain)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """A function from an image to float32 [channels, height, width]."""
        resize: Callable[[Image.Image], Tensor] = create_transform(
            self.input_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        # Grey, palette and transparent images become what the model was trained on.
        mode = "L" if self.input_size[0] == 1 else "RGB"
        return lambda image: resize(image.convert(mode))


def from_image_processor(processor: dict[str, Any]) -> Preprocessing:
    """The image processor of a transformers model in timm's terms.

    processor: its `to_dict()`.

    Raises MarrqError if the processor does not resize, or has a step that timm's terms cannot
    express.
    """
    steps = {step for step, on in processor.items() if step.startswith("do_") and on}
    # A step that is ignored would change pixels without a word, so an unknown step is refused.
    unknown = steps - KNOWN_PROCESSOR_STEPS
    if unknown or "do_resize" not in steps:
        raise MarrqError(
            "the image processor's steps cannot be expressed: "
            f"{', '.join(sorted(unknown)) or 'it does not resize'}"
        )
    height, width, resized, mode = _sizes(processor)
    mean, std = _normalization(processor)
    return Preprocessing(
        input_size=(3, height, width),
        interpolation=PIL_INTERPOLATION[int(processor["resample"])],
        crop_pct=_crop_pct(height, resized),
        crop_mode=mode,
        mean=mean,
        std=std,
    )


def _sizes(processor: dict[str, Any]) -> tuple[int, int, int, str]:
    """Height and width of the input, the size after resizing, and timm's crop mode."""
    size = processor["size"]
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    if "shortest_edge" in size:
        # The shorter side is resized to the size and the aspect ratio is kept: timm's "center".
        edge = size["shortest_edge"]
        target = crop or {"height": edge, "width": edge}
        return target["height"], target["width"], edge, "center"
    # Both sides are resized, and the aspect ratio is lost: timm's "squash".
    target = crop or size
    return target["height"], target["width"], size["height"], "squash"


def _normalization(processor: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for values in 0 … 1."""
    rescale = processor["rescale_factor"] if processor.get("do_rescale") else 1.0
    # The processor normalizes pixel · rescale, timm normalizes pixel / 255: with
    # r = 1 / (255 · rescale), (p · rescale - mean) / std = (p / 255 - mean · r) / (std · r).
    ratio = 1 / (255 * rescale)
    if not processor.get("do_normalize"):
        # mean = 0 and std = 1 in the formula above.
        return (0.0,) * 3, (ratio,) * 3
    return (
        tuple(value * ratio for value in processor["image_mean"]),
        tuple(value * ratio for value in processor["image_std"]),
    )


def _crop_pct(target: int, resized: int) -> float:
    """The share p for which timm's floor(target / p) is `resized`."""
    # timm resizes to floor(target / p) and crops to the target: p = target / resized.
    exact = target / resized
    # The division may round so that floor gives resized - 1; the next smaller p gives `resized`.
    return exact if math.floor(target / exact) == resized else math.nextafter(exact, 0)
