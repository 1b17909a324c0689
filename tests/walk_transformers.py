"""Image classifiers and image encoders of transformers at tiny size, each class once.

A class is taken if it is among transformers' image classifiers, backbones or base models, takes
pixels first, and can be built from its config. The config is made small by the names of its fields,
which transformers' families share: `hidden_size`, `depths`, `image_size`. All other fields stay as
transformers made them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import randomized
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.utils import logging
from walked_kind import CLASSES, Kind

MAPPINGS = (
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "num_channels": 3,
    "projection_dim": 16,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "window_size": 4,
    "num_labels": CLASSES,
    "head_dim": 16,
    "mlp_dim": 48,
}
"""Fields that are one number."""

LISTED = {
    "depths": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "hidden_sizes": 32,
    "embed_dims": 32,
    "depth": 1,
    "num_encoder_blocks": 1,
}
"""Fields that are a list: the number that stands at each place."""

STAGED = 64
"""Side of the images of a model that has stages of its own, in pixels."""

WRAPPED: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1},
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
}

TWO_STAGES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "depths": [2, 1],
    "num_heads": [2, 2],
}

CHANGED: dict[str, dict[str, Any]] = {
    "SwinForImageClassification": TWO_STAGES,
    "SwinModel": TWO_STAGES,
    "DonutSwinForImageClassification": {"image_size": 128},
    "DonutSwinModel": {"image_size": 128},
    "HieraForImageClassification": {"image_size": [64, 64]},
    "HieraModel": {"image_size": [64, 64]},
    "HieraBackbone": {"image_size": [64, 64]},
    "MobileViTV2ForImageClassification": {"image_size": 64},
    "MobileViTV2Model": {"image_size": 64},
    "MobileViTForImageClassification": {"image_size": 64},
    "MobileViTModel": {"image_size": 64},
    "CvtForImageClassification": {"embed_dim": [16, 32, 32]},
    "CvtModel": {"embed_dim": [16, 32, 32]},
    "TimmWrapperForImageClassification": WRAPPED,
    "TimmWrapperModel": WRAPPED,
    "LevitForImageClassification": {"image_size": 224, "hidden_sizes": [32, 48, 64]},
    "LevitForImageClassificationWithTeacher": {"image_size": 224, "hidden_sizes": [32, 48, 64]},
    "LevitModel": {"image_size": 224, "hidden_sizes": [32, 48, 64]},
}
"""What a class needs besides."""


OTHER = (
    "Detr|DFine|Deimv2|Dino.*Grounding|Grounding|Former(Model|Swin)|Mask|Sam|Tam|Seg|Yolos|TableT"
    "|LoFTR|LightGlue|PPDoc|PPOCR|UVDoc|Scene|Video|Vivit|Timesformer|Blip|Kosmos|OmDet|GLPN|DPT"
    "|DepthPro|SR|TextText|BackboneV"
)
"""Classes that detect, segment, match, read text, or take videos or texts too: no encoders."""


def kinds() -> Iterator[Kind]:
    """One kind for each class."""
    names = {name for mapping in MAPPINGS for name in _listed(getattr(modeling_auto, mapping))}
    for name in sorted(names):
        if not re.search(OTHER, name) and _takes_pixels(name):
            yield Kind("transformers", name, "", 0)


def _listed(mapping: dict[str, Any]) -> Iterator[str]:
    for names in mapping.values():
        yield from (names,) if isinstance(names, str) else names


def _takes_pixels(name: str) -> bool:
    try:
        return getattr(transformers, name).main_input_name == "pixel_values"
    # The class needs a package that is not installed, or is gone.
    except Exception:
        return False


@contextmanager
def tiny(kind: Kind) -> Iterator[None]:
    """Nothing: the config itself is small."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield


def config_of(kind: Kind) -> Any:
    """A small config of the class; sets the side of the kind's images."""
    config_class = getattr(transformers, kind.name).config_class
    default = config_class()
    if hasattr(default, "vision_config") and not isinstance(default.vision_config, dict):
        vision = _shrunk(type(default.vision_config)(), {})
        kind.size = _side(vision)
        return config_class(vision_config=vision, num_labels=CLASSES)
    values = _shrunk(default, CHANGED.get(kind.name, {}))
    kind.size = _side(values)
    return config_class(**values)


def _side(values: dict[str, Any]) -> int:
    side = values.get("image_size", STAGED)
    if "model_args" in values:
        side = values["model_args"]["img_size"]
    return side if isinstance(side, int) else side[0]


def _shrunk(default: Any, changed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that are replaced, with their small values."""
    values: dict[str, Any] = {}
    stages = 0
    for name, value in default.to_dict().items():
        if isinstance(value, list | tuple) and name in LISTED:
            values[name] = [LISTED[name]] * len(value)
            stages = max(stages, len(value))
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            values[name] = SMALL[name]
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
            values[name] = [SMALL[name]] * len(value)
    values["num_labels"] = CLASSES
    if stages:
        # Patches of a model with stages are small already.
        values.pop("patch_size", None)
        values["image_size"] = STAGED
        if not hasattr(default, "image_size"):
            del values["image_size"]
        if "embed_dim" in values:
            values.pop("hidden_sizes", None)
            values.pop("hidden_size", None)
    return {**values, **changed}


def build(kind: Kind) -> nn.Module:
    """The tiny model."""
    config = config_of(kind)
    return randomized(getattr(transformers, kind.name)(config))


def write_checkpoint(kind: Kind, folder: Path) -> None:
    """A folder as transformers writes it."""
    model = build(kind)
    # A class that takes more than pixels is marrq's to refuse; shapes that do not meet are not.
    with torch.no_grad(), suppress(TypeError, AttributeError):
        model(pixel_values=kind.images(1))
    model.save_pretrained(folder)
    if "TimmWrapper" not in kind.name:
        size = {"height": kind.size, "width": kind.size}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
