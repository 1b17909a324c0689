"""What an ONNX file says about itself: the entries `marrq.*` of its metadata.

A program that reads a file needs no other file: the entries say how to preprocess images, what the
outputs mean, which model and artifact the file comes from, and what a runtime has to be able to
run. runtime/metadata.py is the reading side; tests/test_contract.py holds that both sides know the
same keys.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from marrq.models.load import ModelSource
from marrq.models.preprocessing import Preprocessing
from marrq.quantized_model import RefinementRecord

PREFIX = "marrq."


@dataclass(frozen=True)
class LinearPart:
    """Where a quantized linear, or q, k or v of it, begins and ends in the graph.

    input, output: names of the values. scale: name of the model's tensor (LayerScale) that the
    output is multiplied by, or None. weight: name of the float value [in, out] that x is multiplied
    with, or None. In a graph for GPUs the product may be part of an operator that does more, and
    the output no value of the graph.
    """

    input: str
    output: str
    scale: str | None = None
    weight: str | None = None


@dataclass(frozen=True)
class FileMetadata:
    """The entries of one file. None: the file is a float model.

    flavor, device: names of exporters/choices.py. A file of an older marrq is for the CPU.
    scheme, method: as the command line writes them; of a float model its flavour and "none".
    artifact: hash of the artifact.
    refinement: how the model was refined; None if it was not.
    classes: hash of the class embeddings in the file; None if the model has classes of its own or
        none.
    bits_per_weight: all bits that the file keeps for a weight of the quantized linears.
    schemes: paths of the quantized linears by their scheme.
    container_bits: bits that one weight code takes in the file; None if linears differ.
    lowest_onnxruntime: first ONNX Runtime that was seen to run such a file.
    linears: by path, the parts of each quantized linear in the order of its rows.
    source: the float model, and how it is built again.
    preprocessing: from an image to the model's input.
    labels: class names in the order of the logits; empty for features.
    options: of the flavour, each with an entry of its own.
    """

    flavor: str
    scheme: str
    method: str
    bits_per_weight: float
    lowest_onnxruntime: str
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    device: str = "cpu"
    artifact: str | None = None
    refinement: RefinementRecord | None = None
    classes: str | None = None
    schemes: Mapping[str, list[str]] | None = None
    container_bits: int | None = None
    linears: Mapping[str, tuple[LinearPart, ...]] | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def to_metadata_props(self) -> dict[str, str]:
        """The entries as an ONNX file holds them. An entry that is None is left out."""
        texts = {
            # The order of the entries in the file.
            "linears": None if self.linears is None else _linears_text(self.linears),
            "flavor": self.flavor,
            "device": self.device,
            "scheme": self.scheme,
            "method": self.method,
            "artifact": self.artifact,
            "refinement": None if self.refinement is None else json.dumps(asdict(self.refinement)),
            "classes": self.classes,
            "bits_per_weight": f"{self.bits_per_weight:.4f}",
            "schemes": None if self.schemes is None else json.dumps(self.schemes),
            "container_bits": None if self.container_bits is None else str(self.container_bits),
            "lowest_onnxruntime": self.lowest_onnxruntime,
            **self.options,
            "source": json.dumps(asdict(self.source)),
            "preprocessing": json.dumps(asdict(self.preprocessing)),
            "labels": json.dumps(self.labels),
        }
        # A reader tells a float model by the entries that are not there.
        return {f"{PREFIX}{key}": text for key, text in texts.items() if text is not None}

    @classmethod
    def from_metadata_props(cls, props: Mapping[str, str]) -> "FileMetadata":
        """The inverse of `to_metadata_props`. Raises KeyError for an entry that is missing."""
        texts = {
            # Entries of other tools are left alone.
            key.removeprefix(PREFIX): text
            for key, text in props.items()
            if key.startswith(PREFIX)
        }
        # Entries that only quantized models have.
        bits = texts.get("container_bits")
        schemes, linears = texts.get("schemes"), texts.get("linears")
        refined = texts.get("refinement")
        return cls(
            flavor=texts["flavor"],
            device=texts.get("device", "cpu"),
            scheme=texts["scheme"],
            method=texts["method"],
            bits_per_weight=float(texts["bits_per_weight"]),
            lowest_onnxruntime=texts["lowest_onnxruntime"],
            source=ModelSource.from_json(json.loads(texts["source"])),
            # JSON has lists where the dataclasses have tuples.
            preprocessing=Preprocessing.from_json(json.loads(texts["preprocessing"])),
            labels=tuple(json.loads(texts["labels"])),
            artifact=texts.get("artifact"),
            refinement=None if refined is None else RefinementRecord(**json.loads(refined)),
            classes=texts.get("classes"),
            schemes=None if schemes is None else json.loads(schemes),
            container_bits=None if bits is None else int(bits),
            linears=None if linears is None else _linears_of(linears),
            # Whatever is left are options: each flavour has its own.
            options={key: text for key, text in texts.items() if key not in KEYS},
        )


KEYS = tuple(entry.name for entry in fields(FileMetadata) if entry.name != "options")
"""The entries that every marrq knows, without their prefix."""


def _linears_text(linears: Mapping[str, tuple[LinearPart, ...]]) -> str:
    """Compact JSON: the entry names every linear of the model."""
    # Most parts have no scale: no entry is shorter than null.
    parts = {
        path: [{key: name for key, name in asdict(part).items() if name is not None} for part in of]
        for path, of in linears.items()
    }
    return json.dumps(parts, separators=(",", ":"))


def _linears_of(text: str) -> dict[str, tuple[LinearPart, ...]]:
    return {
        path: tuple(LinearPart(**part) for part in parts)
        for path, parts in json.loads(text).items()
    }
