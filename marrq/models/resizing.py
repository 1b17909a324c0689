"""From an image to pixels of the model's size, in 0 … 1: resize, then cut or fill up.

The library that a model comes from decides who resizes, and the results differ by up to a level of
255, so each way is the library's own operation:

    pillow            timm: Pillow resizes the image. timm/data/transforms_factory.py,
                      `transforms_imagenet_eval`.
    uint8-tensor      transformers: torchvision resizes a tensor of 8-bit pixels with antialiasing,
                      and rounds to 8 bits. transformers/image_processing_backends.py,
                      `TorchvisionBackend`, which AutoImageProcessor loads if torchvision is there.
    float32-tensor    transformers' DINOv3: the same on pixels in 0 … 1, and nothing is rounded.

The part in the middle is cut out. If an odd number of pixels is cut off, timm rounds the part's
first row and column half to even, and transformers rounds them down.

    center    the shorter side is resized, and what is outside the centre is cut off
    squash    both sides are resized, whatever the aspect ratio
    border    the longer side is resized, and the rest is filled up with the mean (timm)
    corner    the longer side is resized, the image is put into the upper left corner, and the rest
              of the normalized input is zero (transformers' SAM)
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio, str_to_interp_mode
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor
from torchvision.transforms.v2 import functional as tensors

Size = tuple[int, int]
"""Height and width, in pixels."""

PILLOW_MODES = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
"""Ways in which Pillow resizes an image."""

TENSOR_MODES = {
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
}
"""Ways in which torchvision resizes a tensor, by the names that Pillow has for them."""

CROP_MODES = {
    "pillow": ("center", "squash", "border"),
    "uint8-tensor": ("center", "squash", "corner"),
    "float32-tensor": ("center", "squash", "corner"),
}
"""Crop modes of each way of resampling."""


def by_pillow(
    size: Size, resized: Size | None, interpolation: str, crop_mode: str, fill: Any
) -> Callable[[Image.Image], Tensor]:
    """A function from an image to float32 [channels, height, width] in 0 … 1, as timm does it.

    size: of the result. resized: before the crop; None if the image is not resized.
    fill: list of a pixel's 8-bit numbers that `border` fills up with.
    """
    # The same steps as in timm's `create_transform`, which does not take the size before the crop.
    steps: list[Callable[..., object]] = []
    if resized is not None:
        mode = str_to_interp_mode(interpolation)
        if crop_mode == "squash":
            steps.append(Resize(resized, interpolation=mode))
        elif crop_mode == "center" and resized[0] == resized[1]:
            # One number is torchvision's shorter side, which rounds the longer one down.
            steps.append(Resize(resized[0], interpolation=mode))
        else:
            longest = 1.0 if crop_mode == "border" else 0.0
            steps.append(ResizeKeepRatio(resized, longest=longest, interpolation=interpolation))
    crop = CenterCropOrPad(list(size), fill=fill) if crop_mode == "border" else CenterCrop(size)
    steps += [crop, ToTensor()]
    transform: Callable[[Image.Image], Tensor] = Compose(steps)
    return transform


def by_tensors(
    size: Size, resized: Size | None, interpolation: str, crop_mode: str, resampling: str
) -> Callable[[Image.Image], Tensor]:
    """The same as transformers does it. For `corner` the result is the image alone, without what
    fills it up."""

    def transform(image: Image.Image) -> Tensor:
        pixels: Tensor = tensors.pil_to_tensor(image)  # uint8 [channels, height, width]
        if resampling == "float32-tensor":
            # From here on nothing is rounded to levels.
            pixels = pixels.float().div_(255)
        if resized is not None:
            target = _resized(pixels.shape[1:], resized, crop_mode)
            pixels = tensors.resize(pixels, list(target), TENSOR_MODES[interpolation])
        # Of `corner` nothing is cut off; what fills it up has no pixels.
        if crop_mode != "corner":
            pixels = _centre(pixels, size)
        return pixels if pixels.is_floating_point() else pixels.float().div_(255)

    return transform


def _resized(given: torch.Size, resized: Size, crop_mode: str) -> Size:
    """Height and width after resizing. given: of the image."""
    height, width = given
    if crop_mode == "squash":
        return resized
    if crop_mode == "corner":
        # Rounded to the nearest; SAM writes it as ⌊x + 1/2⌋.
        scale = resized[0] * 1.0 / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)
    # The longer side is rounded down, as torchvision does with an image.
    shorter, longer = resized[0], int(resized[0] * max(height, width) / min(height, width))
    return (longer, shorter) if width <= height else (shorter, longer)


def _centre(pixels: Tensor, size: Size) -> Tensor:
    """The part in the middle of [channels, height, width]; black around what is smaller."""
    missing = [max(wanted - has, 0) for wanted, has in zip(size, pixels.shape[1:], strict=True)]
    if any(missing):
        # An odd pixel goes behind the image. Left, top, right, bottom.
        before, after = [side // 2 for side in missing], [(side + 1) // 2 for side in missing]
        pixels = tensors.pad(pixels, [before[1], before[0], after[1], after[0]])
    top, left = ((has - wanted) // 2 for has, wanted in zip(pixels.shape[1:], size, strict=True))
    return pixels[:, top : top + size[0], left : left + size[1]]
