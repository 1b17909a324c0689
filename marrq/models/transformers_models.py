"""Models of transformers: read a checkpoint, or build its architecture without weights.

The class of a model is the one that its config.json names under `architectures`. Of a model of
images and text the vision tower is taken. No code of a checkpoint is run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES as VIDEO_CLASSIFIERS,
)
from transformers.utils import logging

from marrq.errors import MarrqError
from marrq.models.checkpoint import Checkpoint, named_classes
from marrq.models.named_outputs import LOGITS, check_offered
from marrq.models.preprocessing import from_image_processor
from marrq.models.processor_check import check_same_pixels
from marrq.models.transformers_output import (
    TransformersOutput,
    default_outputs,
    offered_outputs,
)
from marrq.models.weights import Misfit, shared_prefix

NO_CODE = {"trust_remote_code": False}
"""Without this argument transformers asks on the terminal whether code of a checkpoint may run."""

ATTENTION = "eager"
"""How attention is computed: as plain matrix products, which every family can be traced with."""

Options = Mapping[str, Any]
"""Arguments of transformers' `from_pretrained`."""

POOLING = "add_pooling_layer"
"""Argument of transformers' models that leaves their pooling layer out."""


def read(location: str, outputs: tuple[str, ...] = ()) -> Checkpoint:
    """The checkpoint at a location: a folder, or `ORG/NAME` on the hub.

    outputs: names of tensors that the model returns; none for those of `default_outputs`.
    Raises MarrqError if weights are missing, if the model does not take images or does not give
    these outputs, or if the image processor has a step that Preprocessing cannot express.
    """
    with quiet():
        config = transformers.AutoConfig.from_pretrained(location, **NO_CODE)
        kind = _model_class(config)
        module, notes = with_weights(kind, location, _tower_config(config, kind))
        processor = transformers.AutoImageProcessor.from_pretrained(location, **NO_CODE)
    channels = int(getattr(module.config, "num_channels", 3))
    preprocessing = from_image_processor(processor.to_dict(), channels)
    check_same_pixels(processor, preprocessing)
    # Only a forward shows what the model returns: the config has `id2label` either way.
    returned = _trial_output(module, preprocessing.input_size)
    outputs = outputs or default_outputs(returned, kind.__name__)
    check_offered(outputs, offered_outputs(returned), kind.__name__)
    # The class is stored too: of a model of images and text the tower's class, not the whole's.
    architecture = module.config.to_dict() | {"architectures": [kind.__name__]}
    names = _class_names(architecture["id2label"]) if LOGITS in outputs else None
    # Which axis of a segmenter's or a detector's logits is that of the classes, their number tells.
    if names is None and LOGITS in outputs and returned[LOGITS].dim() != 2:
        names = [str(index) for index in range(len(architecture["id2label"] or ()))]
    return Checkpoint(
        TransformersOutput(module, outputs),
        architecture,
        preprocessing,
        names,
        outputs,
        notes,
    )


@torch.no_grad()
def _trial_output(module: Any, input_size: tuple[int, int, int]) -> Any:
    """What the model returns for an image. Raises MarrqError if an image is not enough for it."""
    try:
        return module(pixel_values=torch.zeros(1, *input_size))
    # Encoders of models of images and text want grids of patches, positions or masks besides.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MarrqError(
            f"{type(module).__name__} cannot be run on an image of {input_size} alone ({reason}): "
            "choose a model that takes pixels and nothing else, or correct the size of its image "
            "processor"
        ) from error


def build(architecture: dict[str, Any], outputs: Sequence[str]) -> nn.Module:
    """A model in evaluation mode without the checkpoint's weights. architecture, outputs: see
    Checkpoint."""
    config = transformers.AutoConfig.for_model(**architecture, attn_implementation=ATTENTION)
    # The config alone does not make transformers leave the pooling layer out.
    without_pooling = getattr(config, POOLING, True) is False
    arguments = {POOLING: False} if without_pooling else {}
    return TransformersOutput(_model_class(config)(config, **arguments), outputs).eval()


def with_weights(kind: Any, location: str, options: Options) -> tuple[Any, tuple[str, ...]]:
    """The model with its weights, in evaluation mode and float32, and sentences about how they
    were read. options: arguments of `from_pretrained`."""
    module, misfit = _loaded(kind, location, options)
    # Checkpoints such as DINO's ViT have no pooling layer. transformers would fill the layer with
    # random weights and return its output, so the model is loaded without the layer.
    if misfit.missing and all(name.startswith("pooler.") for name in misfit.missing):
        module, misfit = _loaded(kind, location, {**options, POOLING: False})
        setattr(module.config, POOLING, False)
    notes: tuple[str, ...] = ()
    # Weights under the name of a wrapper are unknown, and the same weights are missing.
    prefix = shared_prefix(misfit.unknown, misfit.missing) if misfit.missing else ""
    if prefix:
        mapping = {"key_mapping": {f"^{re.escape(prefix)}": ""}}
        module, misfit = _loaded(kind, location, {**options, **mapping})
        notes = (f"{prefix!r} before all names of weights was dropped",)
    # Unknown weights alone do no harm: those of a text tower, of a head that the class lacks.
    if misfit.missing or misfit.differing:
        raise misfit.error()
    return module.float().eval(), notes


def _tower_config(config: Any, kind: Any) -> dict[str, Any]:
    """The config of the tower of images as an argument, if `kind` is a tower of the model that the
    config describes; else nothing."""
    tower: Any = getattr(config, "vision_config", None)
    if type(tower) is not kind.config_class:
        return {}
    # Checkpoints such as laion's ViT-H have another length in the tower's config, which the model
    # of images and text does not read.
    if hasattr(config, "projection_dim") and hasattr(tower, "projection_dim"):
        tower.projection_dim = config.projection_dim
    return {"config": tower}


def _loaded(kind: Any, location: str, options: Options) -> tuple[Any, Misfit]:
    """The model, and how the weights of its checkpoint differ from its own."""
    module, loaded = kind.from_pretrained(
        location,
        attn_implementation=ATTENTION,
        output_loading_info=True,
        # Told below, with the names and both shapes.
        ignore_mismatched_sizes=True,
        **options,
    )
    # The names of a checkpoint begin with the class's own prefix or not, and both fit.
    differing = sorted(
        (name, tuple(had), tuple(want)) for name, had, want in loaded["mismatched_keys"]
    )
    return module, Misfit(
        sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"]), differing
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers prints while it loads: weights of towers that are not used,
    progress bars. What matters of it is raised."""
    # Both are global to the process, so they are restored.
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _class_names(id2label: dict[Any, str] | None) -> list[str] | None:
    """Class names in the order of the logits, or None if they are transformers' placeholders."""
    # Some configs (PVT's) keep the number of classes alone.
    if not id2label:
        return None
    # JSON makes text of numbers as keys: "10" would sort before "2".
    return named_classes([id2label[key] for key in sorted(id2label, key=int)])


def _model_class(config: Any) -> Any:
    """The class that a checkpoint was saved from, or the class of its vision tower.

    Raises MarrqError if config.json names no class of transformers, or a class that takes no image.
    """
    if config.model_type == "timm_wrapper":
        raise MarrqError("this is a checkpoint of timm: write hf-hub: before its name")
    name = config.architectures[0] if config.architectures else ""
    # config.json is a stranger's: only a model class of transformers itself is built.
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise MarrqError(
            f"config.json names {name!r} under architectures, no class of transformers "
            f"{transformers.__version__}: correct it"
        )
    # Some of these families name their input as models of images do, and want an axis of frames.
    if config.model_type in VIDEO_CLASSIFIERS:
        raise MarrqError(
            f"{name} takes videos, which marrq does not read: choose a model of images"
        )
    # A model of images and text takes text first ("input_ids"); its config holds one for images.
    # Of a model of images and prompts (SAM's points and boxes) an image alone enters the encoder.
    if kind.main_input_name == "pixel_values" and not hasattr(config, "prompt_encoder_config"):
        return kind
    if not hasattr(config, "vision_config"):
        raise MarrqError(f"{name} takes {kind.main_input_name}: choose a model of images")
    # The tower with its projection, if there is one: its output is what text is compared with.
    tower: Any = transformers.MODEL_MAPPING[type(config.vision_config)]
    return getattr(transformers, f"{tower.__name__}WithProjection", tower)
