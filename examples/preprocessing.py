"""Are the pixels those of the library that a model comes from? Every image processor of
transformers and every pretrained config of timm, beside marrq.

    python examples/preprocessing.py > preprocessing.json

The reference is the library's own code: `create_transform` of timm, and of transformers the class
that AutoImageProcessor loads by default. Each is given images of noise of four sizes. Compared are
marrq's pixels (marrq/models/preprocessing.py, torch), and those that an exported file's metadata
give (runtime/preprocessing.py, NumPy and Pillow). A difference is the largest one over all images,
in levels of 255 of a pixel. What marrq refuses is listed with its reason.

A processor is compared with its default settings; some are compared with more. For each processor
that has a PIL variant, the difference between the two variants is given too.

It takes about four minutes and needs marrq, timm and transformers, and no network.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

SCHEMA = "marrq.preprocessing/1"

SIZES = ((640, 428), (224, 224), (97, 301), (31, 40))
"""Widths and heights: a photograph, a square, high and odd, and smaller than any input."""

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ViTImageProcessor": [
        {"size": {"height": 192, "width": 256}, "resample": 3},
        {"resample": 0},
        {"resample": 1},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_center_crop": True, "crop_size": {"height": 160, "width": 192}},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 96, "width": 96}},
        {"do_convert_rgb": True},
        {"image_mean": [0.5], "image_std": [0.25]},
        {"image_mean": [0.5] * 4, "image_std": [0.25] * 4},
    ],
    "CLIPImageProcessor": [
        {"size": {"height": 256, "width": 320}},
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 225, "width": 193}},
        {"size": {"shortest_edge": 96}},
    ],
    "ConvNextImageProcessor": [
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
        {"size": {"shortest_edge": 383}, "crop_pct": 0.95},
    ],
    "LevitImageProcessor": [
        {"size": {"height": 240, "width": 256}},
        {"size": {"shortest_edge": 192}},
    ],
    "PoolFormerImageProcessor": [
        {"crop_pct": 0.95},
        {"size": {"height": 224, "width": 224}},
        {"size": {"height": 224, "width": 256}},
    ],
    "DPTImageProcessor": [
        {"ensure_multiple_of": 14},
        {"size": {"height": 518, "width": 392}, "ensure_multiple_of": 14, "resample": 3},
    ],
    "EfficientNetImageProcessor": [
        {"include_top": False},
        {"rescale_offset": True, "rescale_factor": 1 / 127.5},
        {"do_center_crop": True, "resample": 0},
    ],
    "MobileViTImageProcessor": [
        {"size": {"shortest_edge": 288}},
        {"do_flip_channel_order": False},
    ],
    "BeitImageProcessor": [
        {"size": {"height": 256, "width": 256}, "do_center_crop": True, "do_reduce_labels": True},
    ],
    "DINOv3ViTImageProcessor": [
        {"resample": 3},
        {"size": {"height": 256, "width": 192}},
    ],
    "TimmWrapperImageProcessor": [
        {"pretrained_cfg": {"input_size": (3, 224, 224), "interpolation": "bilinear"}},
    ],
    "DetrImageProcessor": [{"size": {"height": 320, "width": 320}}],
    "YolosImageProcessor": [{"size": {"height": 320, "width": 320}}],
}
"""Settings that are compared besides the default ones, by processor."""


def image(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """An image of noise, which every filter changes. size: width and height."""
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def levels(left: Any, right: Any, preprocessing: Any) -> float:
    """The largest difference of two inputs [channels, height, width] in levels of 255, as they were
    before the division by std; infinite for two shapes."""
    left, right = np.asarray(left), np.asarray(right)
    if left.shape != right.shape:
        return float("inf")
    std = np.array(preprocessing.std)[:, None, None]
    return float((np.abs(left - right) * std).max() * 255)


def compare(
    preprocessing: Any, reference: Callable[[Image.Image], Any], mode: str = "RGB"
) -> tuple[float, float]:
    """The largest difference of marrq's pixels, and of those of a file's metadata, from the
    reference, over all sizes."""
    from runtime.preprocessing import ServedPreprocessing

    transform = preprocessing.transform()
    served = ServedPreprocessing.read(json.dumps(asdict(preprocessing)))
    found = []
    for size in SIZES:
        given = image(size, mode)
        expected = reference(given)
        pair = (transform(given), served(given))
        found.append([levels(pixels, expected, preprocessing) for pixels in pair])
    mine, files = zip(*found, strict=True)
    return max(mine), max(files)


def timm_rows() -> Iterator[dict[str, Any]]:
    """A row for each way of preprocessing that timm's pretrained configs have."""
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg, list_models, list_pretrained

    from marrq.models.preprocessing import Preprocessing

    configs: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name in sorted({*list_models(), *list_pretrained()}):
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
        configs.setdefault(repr(sorted(config.items())), (config, []))[1].append(name)
    for config, names in configs.values():
        preprocessing = Preprocessing.from_timm(config)
        mine, files = compare(preprocessing, create_transform(**config))
        yield row(preprocessing, mine, files) | {"models": len(names), "example": names[0]}


def transformers_rows() -> Iterator[dict[str, Any]]:
    """A row for each image processor of transformers, or more if it is compared with several
    settings."""
    for name, processor, settings in processors():
        base = {"processor": name, "settings": settings}
        if processor is None:
            yield base | {"refused": "it cannot be made without a checkpoint"}
            continue
        yield base | transformers_row(processor, len(settings.get("image_mean", "RGB")))


def processors() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, instance (None if it needs arguments) and settings of what AutoImageProcessor loads."""
    from transformers.models.auto import image_processing_auto as auto

    names = {
        backends.get("torchvision") or backends["pil"]
        for backends in auto.IMAGE_PROCESSOR_MAPPING_NAMES.values()
    }
    for name in sorted(names):
        kind = auto.get_image_processor_class_from_name(name)
        for settings in [{}, *SETTINGS.get(name, [])]:
            try:
                yield name, kind(**settings), settings
            except (ImportError, TypeError):
                yield name, None, settings


def transformers_row(processor: Any, channels: int) -> dict[str, Any]:
    """The differences of a processor, or why it is refused. channels: of the images."""
    from marrq.errors import MarrqError
    from marrq.models.preprocessing import MODES, from_image_processor
    from marrq.models.processor_check import check_same_pixels

    def reference(given: Image.Image) -> Any:
        return processor(images=given, return_tensors="pt")["pixel_values"][0]

    try:
        preprocessing = from_image_processor(processor.to_dict(), channels)
        check_same_pixels(processor, preprocessing)
    except MarrqError as error:
        return {"refused": str(error)}
    modes = [MODES[channels]] + ["RGBA"] * (preprocessing.transparency == "white")
    found = [compare(preprocessing, reference, mode) for mode in modes]
    mine, files = (max(values) for values in zip(*found, strict=True))
    return row(preprocessing, mine, files) | {"pil_levels": pil_levels(processor, preprocessing)}


def pil_levels(processor: Any, preprocessing: Any) -> float | None:
    """By how many levels of 255 the PIL variant of a processor differs from it; None if there is
    no such variant."""
    from transformers.models.auto import image_processing_auto as auto

    from marrq.models.preprocessing import MODES

    kind = auto.get_image_processor_class_from_name(f"{type(processor).__name__}Pil")
    if kind is None:
        return None
    mode = MODES[preprocessing.input_size[0]]
    found = []
    try:
        variant = kind(**processor.to_dict())
        for size in SIZES:
            first, second = (
                np.asarray(one(images=image(size, mode), return_tensors="np")["pixel_values"][0])
                for one in (processor, variant)
            )
            found.append(levels(first, second, preprocessing))
    except (ImportError, ValueError):
        return None
    return max(found)


def row(preprocessing: Any, mine: float, files: float) -> dict[str, Any]:
    """Terms of preprocessing, with the differences of marrq's pixels and of a file's in levels."""
    terms = ("input_size", "resized", "crop_mode", "interpolation", "resampling")
    return {key: getattr(preprocessing, key) for key in terms} | {
        "levels": mine,
        "levels_of_file": files,
    }


def main() -> None:
    """Print the comparison as JSON."""
    from importlib.metadata import version

    warnings.simplefilter("ignore")
    packages = ("marrq", "timm", "transformers", "torch", "torchvision", "pillow", "numpy")
    report = {
        "schema": SCHEMA,
        "versions": {name: version(name) for name in packages},
        "sizes": SIZES,
        "timm": list(timm_rows()),
        "transformers": list(transformers_rows()),
    }
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
