"""Load a pretrained vision transformer with all that belongs to it: its weights' origin, its
preprocessing, its labels.

demo                              the small ViT that travels inside this package
vit_small_patch16_224.augreg…     a timm name (weights from the hub)
hf-hub:… / local-dir:…            a timm checkpoint on the hub / in a folder
a folder or org/name              a transformers model of the class that its config.json names; of one of images and text the vision tower

A model without classes, timm's without a head and transformers' without logits, gives features.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import transformers
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.models.preprocessing import Preprocessing, from_image_processor

DEMO_FOLDER = Path(__file__).parents[1] / "demo"

NO_CODE = {"trust_remote_code": False}
"""No code of a checkpoint is run, and nobody is asked whether it may."""

ATTENTION = "eager"
"""How transformers models compute attention: as plain products, which every family can be traced
with."""


@dataclass(frozen=True)
class ModelSource:
    """Where a float model comes from, and what builds it again.

    name: what `load_model` takes; architecture: what `build` needs, as JSON; weights_sha256: over
    names and values of all its tensors."""

    name: str
    library: Literal["timm", "transformers"]
    architecture: dict[str, Any]
    weights_sha256: str


@dataclass(frozen=True)
class VisionModel:
    """A model in evaluation mode that maps float32 [batch, channels, height, width] to logits
    [batch, classes], or to features [batch, …].

    labels: class names in the order of the logits; "0", "1", … where the model does not tell; none
    where it has no classes."""

    module: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]

    @property
    def output(self) -> str:
        """What the model gives."""
        return output_name(self.labels)


def output_name(labels: tuple[str, ...]) -> str:
    """What a model with these classes gives."""
    return "logits" if labels else "features"


OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
"""What a transformers model may give that describes the image, in the order of preference."""


class TransformersOutput(nn.Module):
    """A transformers model as a function from a tensor to a tensor: the first of `OUTPUTS` that it
    gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits or features of a batch."""
        output = self.model(pixel_values=pixels)
        name = next((name for name in OUTPUTS if name in output), None)
        if name is None:
            raise MarrqError(
                f"{type(self.model).__name__} gives none of {', '.join(OUTPUTS)}: give a "
                "classifier or feature extractor"
            )
        return cast(Tensor, output[name])


def load_model(name: str) -> VisionModel:
    """The float model of that name, on the CPU. Raises MarrqError when it is unknown or cannot be
    loaded."""
    try:
        loader, argument = _resolve(name)
        model = loader(argument)
    except MarrqError:
        raise
    except (
        Exception
    ) as error:  # timm, transformers and the hub raise a dozen kinds; the user needs one sentence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "weights_only" in reason:  # what torch and timm say here invites to run it
            reason = "its weights are a pickle of more than tensors, which could run code; give it as safetensors"
        raise MarrqError(f"cannot load model {name!r}: {reason}") from error
    broken = [
        key
        for key, tensor in model.module.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise MarrqError(
            f"model {name!r} has NaN or infinite values in {broken[0]}: load other weights"
        )
    return model


def build(source: ModelSource) -> nn.Module:
    """The architecture of the source without its weights."""
    if source.library == "timm":
        return with_joined_biases(timm.create_model(**source.architecture, pretrained=False)).eval()
    config = transformers.AutoConfig.for_model(**source.architecture, attn_implementation=ATTENTION)
    return TransformersOutput(_transformers_class(config)(config, **_options(config))).eval()


def load_source(source: ModelSource) -> VisionModel:
    """The float model an artifact was made from, checked to be the same weights."""
    model = load_model(source.name)
    if model.source.weights_sha256 != source.weights_sha256:
        raise MarrqError(
            f"model {source.name!r} has other weights now than when the artifact was made: "
            "quantize it again"
        )
    return model


def _resolve(name: str) -> tuple[Callable[[str], VisionModel], str]:
    """The loader for a name, and the name with local paths made absolute so that it can be loaded
    again from anywhere."""
    scheme, _, rest = name.partition(":")
    if name == "demo":
        return _load_timm, name
    if scheme == "hf-hub":
        return _load_timm, name
    folder = Path(rest if scheme == "local-dir" else name)
    if scheme == "local-dir" or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MarrqError(
                f"model folder {str(folder)!r} has no config.json: give a timm or transformers "
                "checkpoint folder"
            )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise MarrqError(
                f"config.json of model folder {str(folder)!r} is no table: give a timm or "
                "transformers checkpoint folder"
            )
        is_timm = "architecture" in config
        return (
            (_load_timm, f"local-dir:{folder.resolve()}")
            if is_timm
            else (_load_transformers, str(folder.resolve()))
        )
    if timm.is_model(name.partition(".")[0]):
        return _load_timm, name
    if "/" in name:
        return _load_transformers, name
    raise MarrqError(
        f"unknown model {name!r}: give demo, a timm name, hf-hub:…, local-dir:…, or a transformers "
        "id or folder"
    )


def _load_timm(name: str) -> VisionModel:
    path = f"local-dir:{DEMO_FOLDER}" if name == "demo" else name
    module = with_joined_biases(timm.create_model(path, pretrained=True)).float().eval()
    scheme, _, location = path.partition(":")
    if scheme == "local-dir":
        config = json.loads((Path(location) / "config.json").read_text())
        architecture, arguments, labels = (
            config["architecture"],
            config.get("model_args", {}),
            config.get("label_names"),
        )
    elif scheme == "hf-hub":
        settings, architecture, arguments = load_model_config_from_hf(location)
        labels = settings.get("label_names")
    else:
        architecture, arguments, labels = name.partition(".")[0], {}, None
    data = resolve_model_data_config(module)
    preprocessing = Preprocessing.from_json(
        {
            key: data[key]
            for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
        }
    )
    description = {"model_name": architecture, "num_classes": module.num_classes, **arguments}
    return _vision_model(
        module,
        name,
        "timm",
        description,
        preprocessing,
        labels,
        classifies=bool(module.num_classes),
    )


def with_joined_biases(model: nn.Module) -> nn.Module:
    """The model, whose linears are all used by calling them: the same function, bit for bit.

    timm's BEiT, EVA and Swin v2 keep biases of q, k and v beside a `qkv` that has none, and pass
    its weight and the joined biases to F.linear. Where there are no such biases they call `qkv`; so
    the joined biases become its own."""
    for module in model.modules():
        linear, biases = (
            getattr(module, "qkv", None),
            [getattr(module, f"{part}_bias", None) for part in "qkv"],
        )
        if (
            isinstance(linear, nn.Linear)
            and linear.bias is None
            and all(isinstance(bias, Tensor) for bias in biases)
        ):
            linear.bias = nn.Parameter(torch.cat(cast(list[Tensor], biases)).detach())
            module.q_bias = module.k_bias = module.v_bias = None
    return model


def _load_transformers(name: str) -> VisionModel:
    config = transformers.AutoConfig.from_pretrained(name, **NO_CODE)
    kind = _transformers_class(config)
    module, missing = _with_weights(kind, name, {})
    if missing and all(
        key.startswith("pooler.") for key in missing
    ):  # as of DINO's ViT: what it would give is random
        module, missing = _with_weights(kind, name, {POOLING: False})
    if missing:
        raise MarrqError(
            f"the checkpoint has no {missing[0]}, which a {kind.__name__} needs: name another "
            "class in its config.json"
        )
    processor = from_image_processor(
        transformers.AutoImageProcessor.from_pretrained(name, **NO_CODE).to_dict()
    )
    with torch.no_grad():
        classifies = "logits" in module(pixel_values=torch.zeros(1, *processor.input_size))
    config = module.config.to_dict() | {"architectures": [kind.__name__]}
    names = (
        [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
        if classifies
        else []
    )
    labels = None if names == [f"LABEL_{index}" for index in range(len(names))] else names
    return _vision_model(
        TransformersOutput(module), name, "transformers", config, processor, labels, classifies
    )


POOLING = "add_pooling_layer"
"""The argument of transformers' models that leaves their pooling layer out; kept in the
architecture where it is off."""


def _with_weights(kind: Any, name: str, options: dict[str, bool]) -> tuple[Any, list[str]]:
    """The model in evaluation mode, and what the checkpoint lacks of its weights, sorted."""
    module, loaded = kind.from_pretrained(
        name, attn_implementation=ATTENTION, output_loading_info=True, **options
    )
    for option, value in options.items():
        setattr(module.config, option, value)
    return module.float().eval(), sorted(loaded["missing_keys"])


def _options(config: Any) -> dict[str, bool]:
    """Arguments of a model that its config does not hold by itself."""
    return {POOLING: False} if getattr(config, POOLING, True) is False else {}


def _transformers_class(config: Any) -> Any:
    """The class that a checkpoint was saved from; where that takes text too, the one of its vision
    tower, with projection if it has one. Raises MarrqError where config.json names no class of
    transformers."""
    name = config.architectures[0] if config.architectures else ""
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise MarrqError(
            f"config.json names {name!r} under architectures, no class of transformers "
            f"{transformers.__version__}: mend it"
        )
    if kind.main_input_name == "pixel_values":
        return kind
    if not hasattr(config, "vision_config"):
        raise MarrqError(f"{name} takes {kind.main_input_name}: give a model of images")
    tower: Any = transformers.MODEL_MAPPING[type(config.vision_config)]
    return getattr(transformers, f"{tower.__name__}WithProjection", tower)


def _vision_model(
    module: nn.Module,
    name: str,
    library: Literal["timm", "transformers"],
    architecture: dict[str, Any],
    preprocessing: Preprocessing,
    labels: list[str] | None,
    classifies: bool,
) -> VisionModel:
    count = _num_classes(module, preprocessing) if classifies else 0
    if (
        labels is None or not classifies
    ):  # ImageNet-1k's folders are named by WordNet synsets, in the order of its classes
        labels = (
            ImageNetInfo().label_names()
            if count == 1000
            else [str(index) for index in range(count)]
        )
    if len(labels) != count:
        raise MarrqError(
            f"the model has {count} outputs and {len(labels)} class names: mend its config.json"
        )
    architecture = json.loads(json.dumps(architecture, default=str))
    source = ModelSource(name, library, architecture, weights_sha256(module))
    return VisionModel(module, source, preprocessing, tuple(labels))


@torch.no_grad()
def _num_classes(module: nn.Module, preprocessing: Preprocessing) -> int:
    return int(module(torch.zeros(1, *preprocessing.input_size)).shape[-1])


def weights_sha256(module: nn.Module) -> str:
    """A hash over the names and bytes of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
