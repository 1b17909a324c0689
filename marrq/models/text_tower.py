"""Embeddings of class names by the text tower of a model of images and text, in float32.

    t_kc = f(template k with the name of class c)
    e_c  = m_c / ‖m_c‖,  m_c = Σ_k t_kc / ‖t_kc‖

f is the tower with its projection, as transformers' `get_text_features`. Several templates are
averaged as embeddings and not as probabilities, so that they cost nothing when images are
classified (CLIP, Radford et al. 2021, section 3.1.4).

Each family tokenizes as its training did. CLIP pads to the longest text of a batch and masks the
padding. SigLIP pads every text to the model's length and attends to the padding; its texts are
lower-case, which SigLIP's own tokenizer does and the Gemma tokenizer of SigLIP 2 leaves to the
caller (Tschannen et al. 2025, section 2). The tokenizer does the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from marrq.errors import MarrqError
from marrq.models.class_embeddings import PLACE, ClassEmbeddings, check_names, check_templates
from marrq.models.load import ModelSource, library_of, load_model
from marrq.models.transformers_models import NO_CODE, quiet, with_weights
from marrq.outputs import no_artifact

BATCH_SIZE = 64


@dataclass(frozen=True)
class TextInput:
    """How a family's texts become the input of its tower.

    padding: to the longest text of a batch, or to the tower's length. is_lower: whether texts are
    lower-case. masks: whether the tower is told which tokens are padding.
    """

    padding: Literal["longest", "max_length"]
    is_lower: bool
    masks: bool


FAMILIES = {
    "clip": TextInput("longest", is_lower=False, masks=True),
    "siglip": TextInput("max_length", is_lower=True, masks=False),
}
"""By the model type that config.json names. SigLIP 2 of a fixed image size is of type siglip."""


def embed_classes(
    name: str,
    names: Sequence[str],
    templates: Sequence[str],
    texts_done: Callable[[int], None] = lambda count: None,
) -> ClassEmbeddings:
    """The classes of these names, for the model of that name.

    name: a CLIP or SigLIP checkpoint as `load_model` takes it.
    templates: texts with {} in the place of a class's name.
    texts_done: called with the number of texts of each batch.

    Raises MarrqError if names or templates are wrong, if the model has no text tower of a family
    that is known, if a text is longer than the tower takes, and as `load_model`.
    """
    # Texts first: a wrong one is told before a model is loaded.
    check_names(names)
    check_templates(templates)
    _check_tower(name)
    # The vision tower says which weights the classes are for.
    source = load_model(name).source
    tower = TextTower.load(source)
    # [templates, classes, dim], each row of norm 1
    found = [
        tower.embed([template.replace(PLACE, one) for one in names], texts_done)
        for template in templates
    ]
    total = np.sum(found, axis=0)
    scale, bias = tower.scale_and_bias()
    return ClassEmbeddings(
        names=tuple(names),
        embeddings=total / np.linalg.norm(total, axis=1, keepdims=True),
        logit_scale=scale,
        logit_bias=bias,
        model=source.name,
        weights_sha256=source.weights_sha256,
        templates=tuple(templates),
    )


def _check_tower(name: str) -> None:
    """Raise MarrqError for a name that cannot be that of a model with a text tower. Nothing is
    loaded, which may take minutes."""
    if Path(name).is_dir() and no_artifact(Path(name)) is None:
        raise MarrqError(
            f"{name!r} is an artifact, which has no text tower: give the model that it was made "
            "from"
        )
    if library_of(name) == "timm":
        raise MarrqError(
            f"{name!r} is a model of timm, which has no text tower: give the checkpoint of "
            "transformers, such as openai/clip-vit-base-patch32, or make the file with the library "
            "of the text tower (marrq/models/README.md)"
        )


@dataclass(frozen=True)
class TextTower:
    """The text tower of a checkpoint.

    model: of images and text, in evaluation mode and float32.
    """

    model: Any
    tokenizer: Any
    family: TextInput

    @classmethod
    def load(cls, source: ModelSource) -> "TextTower":
        """The text tower beside a vision tower. Raises MarrqError if there is none."""
        location = source.name
        with quiet():
            config = transformers.AutoConfig.from_pretrained(location, **NO_CODE)
            family = FAMILIES.get(config.model_type)
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            # A tower alone, or a classifier, may be saved under the same type.
            if family is None or not hasattr(kind, "get_text_features"):
                raise MarrqError(
                    f"{location!r} has no text tower that marrq knows: give a whole model of "
                    f"images and text, {' or '.join(FAMILIES)}"
                )
            model, _ = with_weights(kind, location, {})
            return cls(model, _tokenizer(location), family)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], texts_done: Callable[[int], None]) -> NDArray[np.float32]:
        """Embeddings of norm 1, [texts, dim]. texts_done: called with the texts of each batch."""
        found = []
        for start in range(0, len(texts), BATCH_SIZE):
            inputs = self._tokens(texts[start : start + BATCH_SIZE])
            # With the projection: [batch, dim]
            features = self.model.get_text_features(**inputs).pooler_output
            found.append(normalize(features, dim=-1).numpy())
            texts_done(len(features))
        return np.concatenate(found)

    @torch.no_grad()
    def scale_and_bias(self) -> tuple[float, float]:
        """The factor s and the bias b of the logits."""
        # The checkpoint has log s. CLIP has no b.
        bias = getattr(self.model, "logit_bias", None)
        return float(self.model.logit_scale.exp()), 0.0 if bias is None else float(bias)

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the tower takes. Raises MarrqError for a text that is too long."""
        family, length = self.family, int(self.model.config.text_config.max_position_embeddings)
        given = [text.lower() if family.is_lower else text for text in texts]
        # The length only if texts are padded to it: transformers warns of one without a use.
        target = {"max_length": length} if family.padding == "max_length" else {}
        found = self.tokenizer(given, padding=family.padding, return_attention_mask=True, **target)
        counts = [sum(mask) for mask in found["attention_mask"]]
        longest = int(np.argmax(counts))
        # Nothing is cut off: that may be what tells a name from another one.
        if counts[longest] > length:
            raise MarrqError(
                f"{texts[longest]!r} has {counts[longest]} tokens, and the text tower takes "
                f"{length}: shorten the name or the template"
            )
        keys = ("input_ids", "attention_mask") if family.masks else ("input_ids",)
        return {key: torch.tensor(found[key]) for key in keys}


def _tokenizer(location: str) -> Any:
    """The checkpoint's tokenizer. Raises MarrqError if a package for it is missing."""
    try:
        return transformers.AutoTokenizer.from_pretrained(location, **NO_CODE)
    except ImportError as error:
        # SigLIP's tokenizer is one of sentencepiece, which transformers does not bring.
        raise MarrqError(
            f"the tokenizer of {location!r} needs a package that is not installed: pip install "
            "sentencepiece"
        ) from error
