"""Which size the image processors of transformers resize to, and which they cut to.

Most processors resize to `size` and cut `crop_size` out of the middle. A few have a rule of their
own in place of the first step (transformers/models/NAME/image_processing_NAME.py):

    ConvNext      s < 384: the shorter side becomes ⌊s / crop_pct⌋, and s × s is cut out;
                  else both sides become s
    LeViT         the shorter side becomes ⌊s · 256 / 224⌋
    PoolFormer    the shorter side becomes ⌊s / crop_pct⌋, or both sides if they differ
    DPT           both sides become the nearest multiples of `ensure_multiple_of`
    SAM           the longer side becomes s, and the image is filled up to `pad_size`
"""

from collections.abc import Callable, Mapping
from typing import Any

from marrq.errors import MarrqError

Size = tuple[int, int]
"""Height and width, in pixels."""

Sizes = tuple[Size, Size | None, str]
"""The size of the model's input, the size before the crop (None: the image is not resized), and the
crop mode (marrq/models/resizing.py)."""

Fields = Mapping[str, Any]
"""What `to_dict()` of an image processor gives."""

CONVNEXT_WARPS = 384
"""From this size on ConvNext resizes both sides and cuts nothing off."""


WAY_OUT = (
    "choose a processor with one height and width, or set size to them in preprocessor_config.json"
)


def name_of(processor: Fields) -> str:
    """The class of an image processor."""
    # Earlier checkpoints call the class with torchvision so.
    return str(processor.get("image_processor_type", "the image processor")).removesuffix("Fast")


def sizes_of(processor: Fields) -> Sizes:
    """The sizes of an image processor.

    Raises MarrqError if they are not the same for every image, or cannot be expressed.
    """
    crop = _height_and_width(processor, "crop_size") if processor.get("do_center_crop") else None
    size, resized, crop_mode = crop, None, "center"
    if processor.get("do_resize"):
        rule = RULES.get(name_of(processor), _plain)
        uncut, resized, crop_mode = rule(processor, processor.get("size") or {})
        # ConvNext and SAM end at a size of their own; a crop after that would be a second one.
        if crop is not None and uncut is not None and crop_mode != "squash":
            raise MarrqError(
                f"{name_of(processor)} crops twice, by its own rule and to crop_size: set "
                "do_center_crop to false in preprocessor_config.json"
            )
        size = crop or uncut
    # What has no size in the end is as large as the image makes it.
    if size is None:
        raise MarrqError(
            f"{name_of(processor)} gives images of different sizes ({_size_text(processor)}), and "
            f"a graph takes one: {WAY_OUT}"
        )
    if processor.get("do_pad") and processor.get("pad_size") and crop_mode != "corner":
        _check_no_padding(processor, size)
    return size, resized, crop_mode


def _check_no_padding(processor: Fields, size: Size) -> None:
    """Raise MarrqError if images are filled up after all other steps."""
    padded = _height_and_width(processor, "pad_size")
    if padded != size:
        raise MarrqError(
            f"{name_of(processor)} fills images of {size} up to {padded}: set do_pad to false in "
            "preprocessor_config.json"
        )


def _height_and_width(processor: Fields, key: str) -> Size:
    given = processor.get(key) or {}
    if "height" not in given or "width" not in given:
        raise MarrqError(
            f"{key} of {name_of(processor)} has no height and width: correct "
            "preprocessor_config.json"
        )
    return given["height"], given["width"]


Rule = Callable[[Fields, Mapping[str, Any]], tuple[Size | None, Size, str]]
"""From a processor and its size to: the size of the result if nothing is cut off after it (None if
that depends on the image), the size before the crop, and the crop mode."""


def _plain(processor: Fields, size: Mapping[str, Any]) -> tuple[Size | None, Size, str]:
    if size.get("height") and size.get("width") and not processor.get("keep_aspect_ratio"):
        both = size["height"], size["width"]
        return both, both, "squash"
    # With a longest_edge beside it, the shorter side depends on the image.
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return None, (size["shortest_edge"],) * 2, "center"
    raise MarrqError(
        f"{name_of(processor)} gives images of different sizes ({_size_text(processor)}), and a "
        f"graph takes one: {WAY_OUT}"
    )


def _size_text(processor: Fields) -> str:
    """What a processor says about sizes."""
    keys = ("size", "keep_aspect_ratio", "min_pixels", "max_pixels", "patch_size")
    said = {key: processor[key] for key in keys if processor.get(key)}
    return ", ".join(f"{key} {value}" for key, value in said.items()) or "no size"


def _convnext(processor: Fields, size: Mapping[str, Any]) -> tuple[Size | None, Size, str]:
    edge = size.get("shortest_edge")
    if not edge:
        raise MarrqError(
            f"size of {name_of(processor)} has no shortest_edge: correct preprocessor_config.json"
        )
    if edge >= CONVNEXT_WARPS:
        return (edge, edge), (edge, edge), "squash"
    return (edge, edge), (int(edge / processor["crop_pct"]),) * 2, "center"


def _levit(processor: Fields, size: Mapping[str, Any]) -> tuple[Size | None, Size, str]:
    if size.get("shortest_edge"):
        return None, (int((256 / 224) * size["shortest_edge"]),) * 2, "center"
    return _plain(processor, size)


def _poolformer(processor: Fields, size: Mapping[str, Any]) -> tuple[Size | None, Size, str]:
    share = processor.get("crop_pct")
    if share is None:
        return _plain(processor, size)
    height, width = (size.get(side) or size.get("shortest_edge") for side in ("height", "width"))
    if not (height and width):
        return _plain(processor, size)
    larger = int(height / share), int(width / share)
    # A square is taken for the shorter side, which keeps the aspect ratio.
    return (None, larger, "center") if height == width else (larger, larger, "squash")


def _dpt(processor: Fields, size: Mapping[str, Any]) -> tuple[Size | None, Size, str]:
    _, (height, width), crop_mode = _plain(processor, size)
    # Rounded half to even, as Python does.
    multiple = processor.get("ensure_multiple_of") or 1
    rounded = round(height / multiple) * multiple, round(width / multiple) * multiple
    return rounded, rounded, crop_mode


def _sam(processor: Fields, size: Mapping[str, Any]) -> tuple[Size | None, Size, str]:
    # Only a square that the longer side fills is of one size for every image.
    edge, filled = size.get("longest_edge"), _height_and_width(processor, "pad_size")
    if not (edge and processor.get("do_pad") and edge == max(filled) == min(filled)):
        raise MarrqError(
            f"{name_of(processor)} gives images of different sizes ({_size_text(processor)}), and "
            "a graph takes one: set do_pad, and pad_size to the longest_edge, in "
            "preprocessor_config.json"
        )
    return filled, filled, "corner"


RULES: dict[str, Rule] = {
    "ConvNextImageProcessor": _convnext,
    "LevitImageProcessor": _levit,
    "PoolFormerImageProcessor": _poolformer,
    "DPTImageProcessor": _dpt,
    "SamImageProcessor": _sam,
}
"""Rules that are not the plain one, by the class of the processor."""
