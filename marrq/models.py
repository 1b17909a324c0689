"""Load a pretrained vision transformer with all that belongs to it: its weights' origin, its preprocessing, its labels.

demo                              the small ViT that travels inside this package
vit_small_patch16_224.augreg…     a timm name (weights from the hub)
hf-hub:… / local-dir:…            a timm checkpoint on the hub / in a folder
a folder or org/name              a transformers image-classification model
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
from marrq.preprocessing import Preprocessing, from_image_processor

DEMO_FOLDER = Path(__file__).parent / "demo"

ATTENTION = "eager"
"""How transformers models compute attention: as plain products, which every family can be traced with."""


@dataclass(frozen=True)
class ModelSource:
    """Where a float model comes from, and what builds it again.

    name: what `load_model` takes; architecture: what `build` needs, as JSON; weights_sha256: over names and values of all its tensors.
    """

    name: str
    library: Literal["timm", "transformers"]
    architecture: dict[str, Any]
    weights_sha256: str


@dataclass(frozen=True)
class VisionModel:
    """A model in evaluation mode that maps float32 [batch, channels, height, width] to logits [batch, classes].

    labels: class names in the order of the logits; "0", "1", … where the model does not tell.
    """

    module: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]


class TransformersLogits(nn.Module):
    """A transformers classifier as a function from a tensor to a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of a batch."""
        return cast(Tensor, self.model(pixel_values=pixels).logits)


def load_model(name: str) -> VisionModel:
    """The float model of that name, on the CPU. Raises MarrqError when it is unknown or cannot be loaded."""
    loader, argument = _resolve(name)
    try:
        model = loader(argument)
    except MarrqError:
        raise
    except Exception as error:  # timm, transformers and the hub raise a dozen kinds; the user needs one sentence
        reason = str(error).strip().splitlines()
        raise MarrqError(f"cannot load model {name!r}: {reason[0] if reason else type(error).__name__}") from error
    broken = [key for key, tensor in model.module.state_dict().items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise MarrqError(f"model {name!r} has NaN or infinite values in {broken[0]}: load other weights")
    return model


def build(source: ModelSource) -> nn.Module:
    """The architecture of the source without its weights."""
    if source.library == "timm":
        return timm.create_model(**source.architecture, pretrained=False).eval()
    config = transformers.AutoConfig.for_model(**source.architecture)
    return TransformersLogits(transformers.AutoModelForImageClassification.from_config(config, attn_implementation=ATTENTION)).eval()


def load_source(source: ModelSource) -> VisionModel:
    """The float model an artifact was made from, checked to be the same weights."""
    model = load_model(source.name)
    if model.source.weights_sha256 != source.weights_sha256:
        raise MarrqError(f"model {source.name!r} has other weights now than when the artifact was made: quantize it again")
    return model


def _resolve(name: str) -> tuple[Callable[[str], VisionModel], str]:
    """The loader for a name, and the name with local paths made absolute so that it can be loaded again from anywhere."""
    scheme, _, rest = name.partition(":")
    if name == "demo":
        return _load_timm, name
    if scheme == "hf-hub":
        return _load_timm, name
    folder = Path(rest if scheme == "local-dir" else name)
    if scheme == "local-dir" or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MarrqError(f"model folder {str(folder)!r} has no config.json: give a timm or transformers checkpoint folder")
        is_timm = "architecture" in json.loads((folder / "config.json").read_text())
        return (_load_timm, f"local-dir:{folder.resolve()}") if is_timm else (_load_transformers, str(folder.resolve()))
    if timm.is_model(name.partition(".")[0]):
        return _load_timm, name
    if "/" in name:
        return _load_transformers, name
    raise MarrqError(f"unknown model {name!r}: give demo, a timm name, hf-hub:…, local-dir:…, or a transformers id or folder")


def _load_timm(name: str) -> VisionModel:
    path = f"local-dir:{DEMO_FOLDER}" if name == "demo" else name
    module = timm.create_model(path, pretrained=True).float().eval()
    scheme, _, location = path.partition(":")
    if scheme == "local-dir":
        config = json.loads((Path(location) / "config.json").read_text())
        architecture, arguments, labels = config["architecture"], config.get("model_args", {}), config.get("label_names")
    elif scheme == "hf-hub":
        settings, architecture, arguments = load_model_config_from_hf(location)
        labels = settings.get("label_names")
    else:
        architecture, arguments, labels = name.partition(".")[0], {}, None
    data = resolve_model_data_config(module)
    preprocessing = Preprocessing.from_json(
        {key: data[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")}
    )
    description = {"model_name": architecture, "num_classes": module.num_classes, **arguments}
    return _vision_model(module, name, "timm", description, preprocessing, labels)


def _load_transformers(name: str) -> VisionModel:
    module = transformers.AutoModelForImageClassification.from_pretrained(name, attn_implementation=ATTENTION).float().eval()
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    config = module.config.to_dict()
    names = [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
    labels = None if names == [f"LABEL_{index}" for index in range(len(names))] else names
    return _vision_model(TransformersLogits(module), name, "transformers", config, from_image_processor(processor.to_dict()), labels)


def _vision_model(
    module: nn.Module,
    name: str,
    library: Literal["timm", "transformers"],
    architecture: dict[str, Any],
    preprocessing: Preprocessing,
    labels: list[str] | None,
) -> VisionModel:
    count = _num_classes(module, preprocessing)
    if labels is None:  # ImageNet-1k's folders are named by WordNet synsets, in the order of its classes
        labels = ImageNetInfo().label_names() if count == 1000 else [str(index) for index in range(count)]
    if len(labels) != count:
        raise MarrqError(f"the model has {count} outputs and {len(labels)} class names: mend its config.json")
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
