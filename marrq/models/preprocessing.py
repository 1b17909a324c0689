"""From an image to the model's input: the model's own preprocessing.

Calibration, evaluation and bench use this preprocessing and no other. The artifact and every
exported file carry its terms:

    mode of the image → resize and cut → x in 0 … 1 → red and blue exchanged → (x - mean) / std

They express timm's evaluation transform, and the image processors of transformers that give every
image the same size; any other processor is refused by name. The reference is the class that
AutoImageProcessor loads by default, which is the one with torchvision. When a model is loaded, its
pixels are compared with those of the processor itself (marrq/models/processor_check.py), so that a
step that marrq does not know ends in a refusal.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.functional import normalize

from marrq.errors import MarrqError
from marrq.models.processor_sizes import name_of, sizes_of
from marrq.models.resizing import CROP_MODES, PILLOW_MODES, TENSOR_MODES, by_pillow, by_tensors

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of an image with so many channels."""

PIL_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Names of Pillow's numbered filters, which image processors give under `resample`. torchvision
resizes tensors by no other."""

KNOWN_STEPS = {
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_center_crop",
    "do_convert_rgb",
    "do_flip_channel_order",
    "do_pad",
    # Of labels and boxes, not of the image.
    "do_reduce_labels",
    "do_convert_annotations",
}
"""Steps of an image processor that Preprocessing can express."""

FLOAT_FIRST = {"DINOv3ViTImageProcessor"}
"""Processors that resize what is in 0 … 1 already."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, scale to 0 … 1, normalize.

    input_size: (channels, height, width), in pixels.
    interpolation: Pillow's name of the filter.
    resized: (height, width) before the crop; of `center` the shorter side is resized to it, of
        `border` and `corner` the longer one. None: the image is not resized.
    crop_mode: `center`, `squash`, `border` or `corner` (marrq/models/resizing.py).
    mean, std: one number per channel of the input, for values in 0 … 1.
    resampling: `pillow`, `uint8-tensor` or `float32-tensor` (marrq/models/resizing.py).
    transparency: `drop`, or `white` for a white background.
    bgr: whether the input has blue first.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    resized: tuple[int, int] | None
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: str = "pillow"
    transparency: str = "drop"
    bgr: bool = False

    @classmethod
    def from_timm(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """The evaluation transform of timm. fields: input_size, interpolation, crop_pct, crop_mode,
        mean and std, as timm's `resolve_data_config` gives them.

        Raises MarrqError if mean or std have another number of channels than input_size, if no
        image has so many, or if the interpolation is random.
        """
        channels, height, width = fields["input_size"]
        check_channels(channels)
        normal: dict[str, tuple[float, ...]] = {}
        for name in ("mean", "std"):
            # timm takes one number for all channels.
            given = tuple(fields[name])
            normal[name] = given * channels if len(given) == 1 else given
            if len(normal[name]) != channels:
                raise MarrqError(
                    f"{name} has {len(given)} numbers and input_size {channels} channels: correct "
                    "pretrained_cfg in the model's config.json"
                )
        if fields["interpolation"] == "random":
            raise MarrqError(
                "the model's images are resized by a random filter: name one as interpolation in "
                "pretrained_cfg of its config.json"
            )
        return cls(
            input_size=(channels, height, width),
            interpolation=fields["interpolation"],
            resized=resized_by(fields["crop_pct"], (height, width)),
            crop_mode=fields["crop_mode"],
            mean=normal["mean"],
            std=normal["std"],
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `dataclasses.asdict` after JSON, which has lists and no tuples. Raises
        ValueError for a crop_pct that is no share."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        # Earlier artifacts hold timm's terms, in which the size before the crop is a quotient.
        if "crop_pct" in plain:
            plain["resized"] = resized_by(plain.pop("crop_pct"), plain["input_size"][1:])
        return cls(**plain)

    def check_names(self) -> None:
        """Raise ValueError if a term has a value that it cannot have."""
        tensors = self.resampling != "pillow"
        if self.resampling not in CROP_MODES or self.crop_mode not in CROP_MODES[self.resampling]:
            raise ValueError(f"{self.resampling!r} has no crop mode {self.crop_mode!r}")
        if self.interpolation not in (TENSOR_MODES if tensors else PILLOW_MODES):
            raise ValueError(f"{self.resampling!r} does not resize by {self.interpolation!r}")
        if self.transparency not in ("drop", "white") or not isinstance(self.bgr, bool):
            raise ValueError("transparency or bgr are none of an image's")
        if self.bgr and self.input_size[0] < 3:
            raise ValueError("an image without colours has no order of them")
        # transformers resizes one shorter side, and no two.
        if tensors and self.crop_mode != "squash" and len(set(self.resized or ())) > 1:
            raise ValueError(f"{self.resized!r} is no shorter side")

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """A function from an image to float32 [channels, height, width].

        Raises MarrqError if no image file has so many channels. The function raises MarrqError for
        an image without a channel that the model takes.
        """
        channels, *size = self.input_size
        check_channels(channels)
        if self.resampling == "pillow":
            fill = [round(255 * value) for value in self.mean]
            cut = by_pillow(
                (size[0], size[1]), self.resized, self.interpolation, self.crop_mode, fill
            )
        else:
            cut = by_tensors(
                (size[0], size[1]),
                self.resized,
                self.interpolation,
                self.crop_mode,
                self.resampling,
            )
        return lambda image: self._normalized(cut(coloured(image, channels, self.transparency)))

    def _normalized(self, pixels: Tensor) -> Tensor:
        """pixels: in 0 … 1, float32 [channels, height, width]."""
        if self.bgr:
            # Red and blue change places; a fourth channel stays.
            pixels = pixels[[2, 1, 0, *range(3, len(pixels))]]
        normal = normalize(pixels, list(self.mean), list(self.std))
        # Of `corner` what fills up is zero in the model's input, whatever the mean is.
        missing = [wanted - has for wanted, has in zip(self.input_size, normal.shape, strict=True)]
        return pad(normal, (0, missing[2], 0, missing[1]))


def check_channels(channels: int) -> None:
    """Raise MarrqError if no image file has so many channels."""
    if channels not in MODES:
        raise MarrqError(
            f"the model takes {channels} channels, and image files have 1, 3 or 4: choose a model "
            "of so many"
        )


def resized_by(crop_pct: float, size: tuple[int, ...]) -> tuple[int, int]:
    """The size before the crop, in timm's terms: ⌊side / crop_pct⌋. Raises ValueError for a
    crop_pct that is no share."""
    if not (isinstance(crop_pct, int | float) and crop_pct > 0):
        raise ValueError(f"crop_pct {crop_pct!r} is no share of an image")
    height, width = (math.floor(side / crop_pct) for side in size)
    return height, width


def coloured(image: Image.Image, channels: int, transparency: str) -> Image.Image:
    """The image with 1, 3 or 4 channels.

    transparency: what a transparent image becomes that loses its fourth channel.

    Raises MarrqError if the image has no fourth channel and the model takes one.
    """
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    if channels == 4 and not has_alpha:
        # Pillow would make one up, which is the same everywhere.
        raise MarrqError(
            f"the model takes 4 channels, and an image of mode {image.mode} has no fourth: give "
            "RGBA images"
        )
    if channels == 3 and has_alpha and transparency == "white":
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(MODES[channels])


def from_image_processor(processor: Mapping[str, Any], channels: int = 3) -> Preprocessing:
    """The image processor of a transformers model in these terms.

    processor: its `to_dict()`. channels: that the model takes.

    Raises MarrqError if the processor has a step that the terms cannot express, or gives images of
    different sizes.
    """
    check_channels(channels)
    # A wrapper of timm's models holds timm's own terms.
    if "data_config" in processor:
        return Preprocessing.from_timm(processor["data_config"])
    steps = {step for step, on in processor.items() if step.startswith("do_") and on}
    # A step that is ignored would change pixels without a word, so an unknown step is refused.
    unknown = steps - KNOWN_STEPS
    if unknown:
        raise MarrqError(
            f"{name_of(processor)} does {', '.join(sorted(unknown))}, which cannot be expressed: "
            "choose a model whose processor resizes, crops and normalizes"
        )
    resample = processor.get("resample")
    # torchvision's own choice if the processor names no filter.
    interpolation = PIL_INTERPOLATION.get(2 if resample is None else int(resample))
    if interpolation is None:
        raise MarrqError(
            f"{name_of(processor)} resizes by filter {resample}, which torchvision does not have "
            f"for tensors: set resample to one of {', '.join(map(str, PIL_INTERPOLATION))} in "
            "preprocessor_config.json"
        )
    size, resized, crop_mode = sizes_of(processor)
    mean, std = _normalization(processor, channels)
    return Preprocessing(
        input_size=(channels, *size),
        interpolation=interpolation,
        resized=resized,
        crop_mode=crop_mode,
        mean=mean,
        std=std,
        resampling="float32-tensor" if name_of(processor) in FLOAT_FIRST else "uint8-tensor",
        # transformers lays a transparent image on white, if it changes an image's mode at all.
        transparency="white" if processor.get("do_convert_rgb") else "drop",
        bgr=bool(processor.get("do_flip_channel_order")),
    )


def _normalization(
    processor: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for values in 0 … 1."""
    rescale = processor["rescale_factor"] if processor.get("do_rescale") else 1.0
    # EfficientNet's rescale_offset takes 1 off between rescaling and normalization.
    offset = 1.0 if processor.get("do_rescale") and processor.get("rescale_offset") else 0.0
    mean, std = (0.0,) * channels, (1.0,) * channels
    if processor.get("do_normalize"):
        mean = _per_channel(processor, "image_mean", channels)
        std = _per_channel(processor, "image_std", channels)
    # EfficientNet's include_top divides by std once more.
    again = (
        _per_channel(processor, "image_std", channels)
        if processor.get("include_top")
        else (1.0,) * channels
    )
    # With p the pixel and r = 1 / (255 · rescale):
    # ((p · rescale - offset) - mean) / std = (p / 255 - (offset + mean) · r) / (std · r).
    ratio = 1 / (255 * rescale)
    return (
        tuple((offset + value) * ratio for value in mean),
        tuple(first * second * ratio for first, second in zip(std, again, strict=True)),
    )


def _per_channel(processor: Mapping[str, Any], key: str, channels: int) -> tuple[float, ...]:
    """The numbers under a key. One number stands for all channels."""
    given = processor[key]
    numbers = (given,) if isinstance(given, int | float) else tuple(given)
    numbers = numbers * channels if len(numbers) == 1 else numbers
    if len(numbers) != channels:
        raise MarrqError(
            f"{key} of {name_of(processor)} has {len(numbers)} numbers, and the model takes "
            f"{channels} channels: correct preprocessor_config.json"
        )
    return numbers
