"""Load a pretrained vision transformer with all that belongs to it: the origin of its weights, its
preprocessing, its labels.

    demo                              the small ViT that travels inside this package
    vit_small_patch16_224.augreg…     a timm name; the weights come from the hub
    hf-hub:ORG/NAME                   a timm checkpoint on the hub
    local-dir:FOLDER                  a checkpoint of timm or transformers in a folder
    FOLDER or ORG/NAME                the same folder; a transformers checkpoint on the hub

A name is checked before transformers is imported and before anything is read but config.json.
A model is a function from pixels to named tensors (marrq/models/named_outputs.py). A user may
choose other outputs than the default ones.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from marrq.errors import MarrqError
from marrq.models import timm_models
from marrq.models.checkpoint import Checkpoint
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.named_outputs import LOGITS, check_names
from marrq.models.preprocessing import Preprocessing
from marrq.models.weights import SUFFIXES

DEMO_FOLDER = Path(__file__).parents[1] / "demo"

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""ORG/NAME on the hub: one slash, so that a path to a missing folder is not looked for there."""

ADAPTER = "adapter_config.json"
"""What PEFT writes beside the weights of an adapter."""

Library = Literal["timm", "transformers"]


@dataclass(frozen=True)
class ModelSource:
    """Where a float model comes from, and what builds it again.

    name: what `load_model` takes; paths are absolute.
    architecture: what `build` needs, as JSON.
    weights_sha256: hash over the names and values of all tensors of the model.
    outputs: their names in order; empty in files of older exports, which have the default ones.
    """

    name: str
    library: Library
    architecture: dict[str, Any]
    weights_sha256: str
    outputs: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ModelSource":
        """The inverse of `asdict`, through JSON. Raises TypeError for other fields, and MarrqError
        for outputs that are no names."""
        # JSON has lists in place of tuples. Files of older exports do not name their outputs.
        names = fields.get("outputs")
        return cls(**{**fields, "outputs": check_names(names) if names else ()})


@dataclass(frozen=True)
class VisionModel:
    """A float model with what belongs to it.

    module: in evaluation mode; maps float32 [batch, channels, height, width] to one Tensor
        [batch, …] if there is one output, else to a tuple of them.
    labels: class names in the order of the logits; "0", "1", … if the checkpoint has no names;
        empty for a model without logits.
    notes: sentences about how the weights were read, such as a prefix that was dropped.
    outputs: names of what the module returns, in order.
    classes: what made logits of features (marrq/zero_shot.py); None for the model's own outputs.
    """

    module: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    outputs: tuple[str, ...] = (LOGITS,)
    classes: ClassEmbeddings | None = None


def load_model(name: str | Path, outputs: Sequence[str] = ()) -> VisionModel:
    """The float model of that name (see the top of this file), on the CPU.

    outputs: names of what it shall give, in order; none for the default ones, which are the logits
    (and boxes) of a model that has some, and else its features. A timm model may give `logits`,
    `features` and `tokens`, a transformers model every tensor that its forward returns.

    Raises MarrqError if the name is unknown, the model cannot be loaded or does not give these
    outputs, or a weight is NaN or infinite.
    """
    name = str(name)
    if outputs:
        check_names(tuple(outputs))
    # A name that can be no model is refused before anything else is imported or read.
    try:
        origin = _resolve(name)
        model = _load(origin, tuple(outputs))
    except MarrqError:
        raise
    except Exception as error:
        # timm, transformers and the hub raise a dozen kinds of errors; the user needs one sentence.
        raise MarrqError(f"cannot load model {name!r}: {_reason(error)}") from error
    _check_finite(model)
    return model


def library_of(name: str) -> Library:
    """The library of a model, which nothing is loaded for. Raises MarrqError for a name that can be
    no model."""
    try:
        return _resolve(name).library
    # A config.json that is no text, or no JSON.
    except ValueError as error:
        raise MarrqError(f"cannot load model {name!r}: {_reason(error)}") from error


def load_source(source: ModelSource) -> VisionModel:
    """The float model that an artifact was made from.

    Raises MarrqError if it cannot be loaded, or if its weights are other ones now.
    """
    # The name may mean other weights today: a folder was changed, or a checkpoint on the hub.
    model = load_model(source.name, source.outputs)
    if model.source.weights_sha256 != source.weights_sha256:
        raise MarrqError(
            f"model {source.name!r} has other weights now than when the artifact was made: "
            "quantize it again"
        )
    return model


def build(source: ModelSource) -> nn.Module:
    """The architecture of the source, in evaluation mode, without the weights of the source."""
    # An artifact brings its own tensors, so nothing is downloaded.
    if source.library == "timm":
        return timm_models.build(source.architecture, source.outputs)
    from marrq.models import transformers_models

    return transformers_models.build(source.architecture, source.outputs)


def weights_sha256(module: nn.Module) -> str:
    """A hash over the names and bytes of all tensors of a module."""
    # Sorted by name: the order of modules must not matter, only names and values.
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Origin:
    """A name that was looked up.

    name: for ModelSource; loads the same model from any working directory.
    location: what the library takes.
    """

    library: Library
    name: str
    location: str


def _resolve(name: str) -> _Origin:
    """Look a name up, without the network. Raises MarrqError if it can be no model."""
    scheme, _, rest = name.partition(":")
    if name == "demo":
        return _Origin("timm", name, f"local-dir:{DEMO_FOLDER}")
    if scheme == "hf-hub":
        return _Origin("timm", name, name)
    # A folder of this name comes before a timm name: what is at hand is what the user means.
    folder = Path(rest if scheme == "local-dir" else name)
    is_weights = name.endswith(SUFFIXES) and folder.is_file()
    if scheme == "local-dir" or folder.is_dir() or is_weights:
        return _resolve_folder(folder)
    if timm_models.is_known(name):
        return _Origin("timm", name, name)
    # Whether the hub has this checkpoint is known only when it is loaded.
    if HUB_NAME.fullmatch(name):
        return _Origin("transformers", name, name)
    known = timm_models.similar(name)
    likely = f" (did you mean {known}?)" if known else ""
    raise MarrqError(
        f"unknown model {name!r}{likely}, and no folder of that name exists: give demo, a timm "
        "name, hf-hub:…, local-dir:…, or a transformers id or folder"
    )


def _resolve_folder(folder: Path) -> _Origin:
    """Tell timm's checkpoint folders from those of transformers."""
    file = folder / "config.json"
    if not folder.exists():
        raise MarrqError(
            f"{str(folder)!r} does not exist: give a timm or transformers checkpoint folder"
        )
    if folder.is_file():
        raise MarrqError(
            f"{str(folder)!r} is a file: give a folder with this file and a config.json that names "
            "the architecture, the classes and how images are prepared (marrq/models/README.md)"
        )
    # An adapter has a config.json beside it at times, and a base model elsewhere in any case.
    if (folder / ADAPTER).is_file():
        raise _adapter_error(folder)
    if not file.is_file():
        raise MarrqError(
            f"model folder {str(folder)!r} has no config.json: give a timm or transformers "
            "checkpoint folder"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise MarrqError(
            f"config.json of model folder {str(folder)!r} is no table: give a timm or "
            "transformers checkpoint folder"
        )
    # An absolute path, so that the artifact finds its model from any working directory.
    path = str(folder.resolve())
    # Both libraries write a config.json: timm's has "architecture", that of transformers has
    # "architectures".
    if "architecture" in config:
        return _Origin("timm", f"local-dir:{path}", f"local-dir:{path}")
    return _Origin("transformers", path, path)


def _adapter_error(folder: Path) -> MarrqError:
    base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    return MarrqError(
        f"{str(folder)!r} holds an adapter ({base.get('peft_type', 'PEFT')}) and no whole model: "
        f"merge it into {base.get('base_model_name_or_path')!r} first, with "
        "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(MERGED)"
    )


def _load(origin: _Origin, outputs: tuple[str, ...]) -> VisionModel:
    checkpoint = _read(origin, outputs)
    labels = checkpoint.labels()
    # A config of transformers holds values that JSON cannot express, such as dtypes.
    architecture = json.loads(json.dumps(checkpoint.architecture, default=str))
    digest = weights_sha256(checkpoint.module)
    source = ModelSource(origin.name, origin.library, architecture, digest, checkpoint.outputs)
    return VisionModel(
        checkpoint.module,
        source,
        checkpoint.preprocessing,
        labels,
        checkpoint.notes,
        checkpoint.outputs,
    )


def _read(origin: _Origin, outputs: tuple[str, ...]) -> Checkpoint:
    if origin.library == "timm":
        return timm_models.read(origin.location, outputs)
    # transformers takes seconds to import, and a model of timm does not need it.
    from marrq.models import transformers_models

    return transformers_models.read(origin.location, outputs)


def _check_finite(model: VisionModel) -> None:
    """Refuse weights with NaN: they would spread to every statistic without a message."""
    parameters = dict(model.module.named_parameters())
    for key, tensor in model.module.state_dict().items():
        # A buffer may hold an infinite bound, which clips nothing (Gemma's encoder).
        broken = ~tensor.isfinite() if key in parameters else tensor.isnan()
        if tensor.is_floating_point() and broken.any():
            raise MarrqError(
                f"model {model.source.name!r} has NaN or infinite values in {key}: load other "
                "weights"
            )


def _reason(error: Exception) -> str:
    """An error's message, for one sentence to the user."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Some errors have no message; then the class says at least what happened.
    if not lines:
        return type(error).__name__
    # The message of torch and timm in this case invites the user to run the pickle.
    if "weights only" in lines[0].lower().replace("_", " "):
        return (
            "its weights are a pickle of more than tensors, which could run code; give it as "
            "safetensors"
        )
    # torch announces what is wrong, and says it in the next line.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
