"""Models of timm: read a checkpoint, or build its architecture without weights."""

import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.models.checkpoint import Checkpoint
from marrq.models.preprocessing import Preprocessing


def is_known(name: str) -> bool:
    """Whether timm has an architecture of this name. name: with or without a pretrained tag."""
    return bool(timm.is_model(name.partition(".")[0]))


def read(location: str) -> Checkpoint:
    """The checkpoint at a location.

    location: a timm name, `hf-hub:ORG/NAME`, or `local-dir:FOLDER`.
    """
    # float32, whatever the checkpoint was stored in: statistics and baselines need it.
    module = with_joined_biases(timm.create_model(location, pretrained=True)).float().eval()
    architecture, arguments, class_names = _described(location)
    # The preprocessing that the weights were trained with, from the checkpoint's own config.
    preprocessing = Preprocessing.from_timm(resolve_model_data_config(module))
    _check_channels(preprocessing, arguments)
    return Checkpoint(
        module,
        # `arguments` come last: the checkpoint's own number of classes wins.
        {"model_name": architecture, "num_classes": module.num_classes, **arguments},
        preprocessing,
        class_names,
        classifies=bool(module.num_classes),
    )


def build(architecture: dict[str, Any]) -> nn.Module:
    """A model in evaluation mode without the checkpoint's weights. architecture: see Checkpoint."""
    return with_joined_biases(timm.create_model(**architecture, pretrained=False)).eval()


def _check_channels(preprocessing: Preprocessing, arguments: dict[str, Any]) -> None:
    """Raise MarrqError if the model takes another number of channels than its images get."""
    # timm writes pretrained_cfg as it was before `in_chans` changed the model.
    takes, gets = arguments.get("in_chans", 3), preprocessing.input_size[0]
    if takes != gets:
        raise MarrqError(
            f"the model takes {takes} channels, and its images get {gets}: correct input_size, "
            "mean and std of pretrained_cfg in its config.json"
        )


def _described(location: str) -> tuple[str, dict[str, Any], list[str] | None]:
    """Name of the architecture, arguments that build it, and class names of a checkpoint."""
    scheme, _, rest = location.partition(":")
    if scheme == "local-dir":
        config = json.loads((Path(rest) / "config.json").read_text())
        return config["architecture"], config.get("model_args", {}), config.get("label_names")
    if scheme == "hf-hub":
        settings, architecture, arguments = load_model_config_from_hf(rest)
        return architecture, arguments, settings.get("label_names")
    # A name of timm itself: the architecture is what stands before the pretrained tag.
    return location.partition(".")[0], {}, None


def with_joined_biases(model: nn.Module) -> nn.Module:
    """The model, changed in place so that all its linears are used by calling them.

    timm's BEiT, EVA and Swin v2 keep the biases of q, k and v beside a `qkv` without bias, and pass
    its weight and the joined biases to F.linear. If these biases are None, timm calls `qkv`. So the
    joined biases become the bias of `qkv`: the same function, bit for bit.
    """
    for module in model.modules():
        # Without biases timm calls `qkv` already, and there is nothing to join.
        linear = getattr(module, "qkv", None)
        biases = [getattr(module, f"{part}_bias", None) for part in "qkv"]
        if (
            isinstance(linear, nn.Linear)
            and linear.bias is None
            and all(isinstance(bias, Tensor) for bias in biases)
        ):
            linear.bias = nn.Parameter(torch.cat(cast(list[Tensor], biases)).detach())
            module.q_bias = module.k_bias = module.v_bias = None
    return model
