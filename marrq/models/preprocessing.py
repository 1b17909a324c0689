"""From an image file to the model's input: the model's own preprocessing, the only one that
calibration, evaluation and bench use.

It is timm's evaluation transform, described by timm's own terms. A transformers image processor is
translated into the same terms, or refused when they cannot express it. The description is stored in
the artifact and in every exported graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from marrq.errors import MarrqError


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, scale to 0 … 1, normalize.

    input_size: (channels, height, width); interpolation: timm's name; crop_pct: share of the
    resized image that the crop keeps; crop_mode: `center`, `squash` or `border`; mean, std: per
    channel, of values in 0 … 1."""

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """The inverse of `dataclasses.asdict` after a trip through JSON, which has no tuples."""
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
        mode = "L" if self.input_size[0] == 1 else "RGB"
        return lambda image: resize(image.convert(mode))


PIL_INTERPOLATION = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
KNOWN_PROCESSOR_STEPS = {
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_center_crop",
    "do_convert_rgb",
}


def from_image_processor(processor: dict[str, Any]) -> Preprocessing:
    """A transformers image processor, as its `to_dict()`, in timm's terms. Raises MarrqError for a
    step that these cannot express."""
    unknown = {
        step for step, on in processor.items() if step.startswith("do_") and on
    } - KNOWN_PROCESSOR_STEPS
    if unknown or not processor.get("do_resize"):
        raise MarrqError(
            "the image processor's steps cannot be expressed: "
            f"{', '.join(sorted(unknown)) or 'it does not resize'}"
        )
    size, crop = (
        processor["size"],
        processor.get("crop_size") if processor.get("do_center_crop") else None,
    )
    if "shortest_edge" in size:
        target = crop or {"height": size["shortest_edge"], "width": size["shortest_edge"]}
        resized, mode = size["shortest_edge"], "center"
    else:
        target = crop or size
        resized, mode = size["height"], "squash"
    rescale = processor["rescale_factor"] if processor.get("do_rescale") else 1.0
    normalized = processor.get("do_normalize")
    # A processor normalizes x · rescale; timm normalizes x / 255.
    ratio = 1 / (255 * rescale)
    return Preprocessing(
        input_size=(3, target["height"], target["width"]),
        interpolation=PIL_INTERPOLATION[int(processor["resample"])],
        crop_pct=_crop_pct(target["height"], resized),
        crop_mode=mode,
        mean=tuple(value * ratio for value in processor["image_mean"])
        if normalized
        else (0.0,) * 3,
        std=tuple(value * ratio for value in processor["image_std"])
        if normalized
        else (ratio,) * 3,
    )


def _crop_pct(target: int, resized: int) -> float:
    """The share p for which timm's floor(target / p) is `resized`, whatever the rounding of the
    division."""
    exact = target / resized
    return exact if math.floor(target / exact) == resized else math.nextafter(exact, 0)
