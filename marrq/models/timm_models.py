"""Models of timm: read a checkpoint, or build its architecture without weights."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.models import (
    clean_state_dict,
    load_model_config_from_hf,
    load_state_dict_from_hf,
)
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.models.checkpoint import Checkpoint, named_classes
from marrq.models.preprocessing import Preprocessing
from marrq.models.timm_output import default_output, with_outputs
from marrq.models.weights import Misfit, shared_prefix, weights_file

HUB_WEIGHTS = "pytorch_model.bin"
"""The file that timm asks the hub for; timm takes safetensors in its place if there are any."""

INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Under which key training puts the weights beside an optimizer; the first that is there, as in
timm's `load_state_dict`."""


def is_known(name: str) -> bool:
    """Whether timm has an architecture of this name. name: with or without a pretrained tag."""
    return bool(timm.is_model(name.partition(".")[0]))


def similar(name: str) -> str:
    """The architecture whose name is most like this one; empty if none is."""
    near = get_close_matches(name.partition(".")[0], timm.list_models(), n=1, cutoff=0.8)
    return near[0] if near else ""


def read(location: str, outputs: tuple[str, ...] = ()) -> Checkpoint:
    """The checkpoint at a location.

    location: a timm name, `hf-hub:ORG/NAME`, or `local-dir:FOLDER`.
    outputs: names of marrq/models/timm_output.py; none for what the model's own forward gives.
    Raises ValueError if the weights do not fit the architecture, and MarrqError for an output that
        the model does not give.
    """
    scheme, _, place = location.partition(":")
    if scheme in ("local-dir", "hf-hub"):
        config = _config(scheme, place)
        module, notes = _with_weights(config, _tensors(scheme, place, config))
        architecture, arguments = config["architecture"], config["model_args"]
        class_names = named_classes(_class_names(config))
    else:
        module, notes = timm.create_model(location, pretrained=True), ()
        # The architecture of a name of timm is what stands before the pretrained tag.
        architecture, arguments, class_names = location.partition(".")[0], {}, None
    # float32, whatever the checkpoint was stored in: statistics and baselines need it.
    module = with_joined_biases(module).float().eval()
    # The preprocessing that the weights were trained with, from the checkpoint's own config.
    preprocessing = Preprocessing.from_timm(resolve_model_data_config(module))
    # Models that only encode have no number of classes.
    classes = {"num_classes": module.num_classes} if hasattr(module, "num_classes") else {}
    outputs = outputs or (default_output(module),)
    return Checkpoint(
        with_outputs(module, outputs),
        # `arguments` come last: the checkpoint's own number of classes wins.
        {"model_name": architecture, **classes, **arguments},
        preprocessing,
        class_names,
        outputs=outputs,
        notes=notes,
    )


def build(architecture: dict[str, Any], outputs: Sequence[str]) -> nn.Module:
    """A model in evaluation mode without the checkpoint's weights. architecture, outputs: see
    Checkpoint."""
    model = with_joined_biases(timm.create_model(**architecture, pretrained=False)).eval()
    return with_outputs(model, outputs)


def _config(scheme: str, place: str) -> dict[str, Any]:
    """The config.json of a checkpoint, with `model_args` in any case."""
    if scheme == "hf-hub":
        settings, architecture, arguments = load_model_config_from_hf(place)
        return {"architecture": architecture, "model_args": arguments, "pretrained_cfg": settings}
    text = (Path(place) / "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    # timm would take ImageNet's mean and 224 pixels for granted. Old folders have them at the top.
    if "pretrained_cfg" not in config and "mean" not in config:
        raise MarrqError(
            f"config.json of {place!r} does not say how images were prepared for training: add "
            '"pretrained_cfg": {"input_size": [3, 224, 224], "mean": […], "std": […], '
            '"interpolation": "bicubic", "crop_pct": 0.9}'
        )
    # transformers' wrapper of timm writes null.
    config["model_args"] = config.get("model_args") or {}
    # The wrapper without a classifier still writes a number of classes.
    if config.get("architectures") == ["TimmWrapperModel"]:
        config["num_classes"] = config["model_args"]["num_classes"] = 0
    return config


def _class_names(config: dict[str, Any]) -> list[str] | None:
    """Names of the classes as newer and older releases of timm write them."""
    settings = config.get("pretrained_cfg", config)
    found = (config.get("label_names"), settings.get("label_names"), settings.get("labels"))
    return next((names for names in found if names), None)


def _tensors(scheme: str, place: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint by the names that it has."""
    if scheme == "local-dir":
        return _file_tensors(weights_file(Path(place)))
    name = config.get("pretrained_cfg", config).get("hf_hub_filename") or HUB_WEIGHTS
    return cast(dict[str, Tensor], load_state_dict_from_hf(place, name))


def _file_tensors(file: Path) -> dict[str, Tensor]:
    """The weights of a file. timm's `load_state_dict` reads the same, and drops prefixes of torch
    without a word."""
    if file.suffix == ".safetensors":
        return load_file(file)
    # timm's training puts its command line beside the weights, which is a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, map_location="cpu", weights_only=True)
    # Weights beside an optimizer, or a moving average of them.
    found = (content[key] for key in INSIDE if content.get(key) is not None)
    return cast(dict[str, Tensor], next(found, content))


def _with_weights(
    config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with its weights, and sentences about how they were read."""
    module = _created(config)
    wanted = module.state_dict()
    # Names may be older ones, which timm converts: prefixes of torch are known to timm by name.
    cleaned = clean_state_dict(tensors)
    of_torch = shared_prefix(tensors, cleaned)
    prefix = of_torch + shared_prefix(cleaned if of_torch else tensors, wanted)
    notes = (f"{prefix!r} before all names of weights was dropped",) if prefix else ()
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    misfit = Misfit.between(tensors, wanted)
    if not misfit:
        module.load_state_dict(tensors)
        return module, notes
    try:
        # timm converts older names, and positions of another image size.
        return _created(config, tensors), notes
    # What timm's converters raise depends on the family.
    except Exception as error:
        raise misfit.error() from error


def _created(config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Any:
    """The model that a config describes. tensors: weights that timm converts and puts in."""
    # timm reads a config from a folder only, and not as transformers' wrapper writes it.
    with tempfile.TemporaryDirectory() as folder:
        # Folders of old releases have no `model_args`, and timm takes none in them.
        kept = {key: value for key, value in config.items() if key != "model_args" or value}
        (Path(folder) / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        # An empty source, so that timm takes the tensors and reads no file.
        given = {"source": "", "state_dict": tensors}
        # With another number of classes timm would leave the head random.
        if "num_classes" in config["model_args"]:
            given["num_classes"] = config["model_args"]["num_classes"]
        module: Any = timm.create_model(
            f"local-dir:{folder}", pretrained=tensors is not None, pretrained_cfg_overlay=given
        )
    # The tensors would stay in memory beside the model.
    module.pretrained_cfg.pop("state_dict", None)
    return module


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
