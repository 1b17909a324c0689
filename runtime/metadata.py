"""The metadata `marrq.*` of an ONNX file: what marrq's exporters wrote into it.

This is the reading side; exporters/metadata.py is the writing side. All values are text, and some
are JSON. A file of another tool has none of these keys, so every property that the audit or the
doctor asks for has a value that says so.

| key | value |
|---|---|
| flavor | lowering: integer, matmulnbits, qdq, folded, fp32, fp16 |
| device | what the graph was made for: `cpu` or `gpu`; no such key in files of older exports |
| scheme | as `W4A8-g64`; the flavour's name for a float model |
| method | as `marr-stream` or `marr-stream refined`; `none` for a float model |
| artifact | SHA-256 of the artifact; no such key in a float model |
| refinement | JSON: images, steps and losses of the refinement; no such key without one |
| source | JSON: where the float model comes from, with its `name` |
| preprocessing | JSON: terms of the images' transform (runtime/preprocessing.py) |
| labels | JSON: list of class names |
| classes | SHA-256 of class embeddings that make logits of features; no such key without them |
| bits_per_weight | all that the file keeps for quantized weights, over their number |
| container_bits | bits of one weight code in the file; no such key if linears differ |
| schemes | JSON: module paths of the quantized linears, by scheme |
| linears | JSON: by module path, where each part of a linear begins and ends in the graph |
| lowest_onnxruntime | first release that was seen to run such a file |
| fuse, accuracy_level, symmetric, float32, weights_only | options of the flavour, if it has them |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from runtime.errors import BenchError
from runtime.quantization import Refinement

PREFIX = "marrq."

OutputKind = Literal["classes", "features", "dense"]

LOGITS = "logits"
"""The output that class names belong to."""


def output_kind(name: str, rank: int, labels: Sequence[str]) -> OutputKind:
    """What an output is: logits of classes, one vector an image, or numbers for each token, box or
    pixel. rank: number of its axes, the batch among them. labels: of the file."""
    if rank != 2:
        return "dense"
    return "classes" if name == LOGITS and labels else "features"


@dataclass(frozen=True)
class Output:
    """What a file gives for a batch of images.

    dims: length of each axis behind the batch; None for a free one.
    kind: `classes`, `features` or `dense`, by the file's own labels.
    """

    name: str
    dims: tuple[int | None, ...]
    kind: OutputKind


@dataclass(frozen=True)
class LinearPart:
    """A part of a quantized linear in the graph: all of it, or its q, k or v.

    input, output: names of the values at its ends.
    scale: name of the model's tensor [out] (LayerScale) that the file has multiplied into it.
    weight: name of the float value [in, out] that the input is multiplied with. The product may be
        part of an operator that does more; then the output is no value of the graph.
    """

    input: str
    output: str
    scale: str | None = None
    weight: str | None = None


@dataclass(frozen=True)
class Metadata:
    """properties: all metadata of a file, by key, of whatever tool."""

    properties: Mapping[str, str]

    @property
    def is_marrqs(self) -> bool:
        """Whether `marrq export` wrote the file."""
        return self._text("source") is not None

    @property
    def flavor(self) -> str:
        """How the graph was lowered."""
        return self._required("flavor")

    @property
    def device(self) -> str:
        """What the graph was made for: `cpu` or `gpu`."""
        # Before files said so, all were made for the CPU.
        return self._text("device") or "cpu"

    @property
    def weights_only(self) -> bool:
        """Whether the file leaves out the activations' quantization that its artifact has."""
        return self._text("weights_only") == "True"

    @property
    def scheme(self) -> str | None:
        """The scheme of most linears."""
        return self._text("scheme")

    @property
    def method(self) -> str:
        """How the codes were found."""
        return self._required("method")

    @property
    def artifact(self) -> str | None:
        """The hash of the artifact; None for a float model."""
        return self._text("artifact")

    @property
    def refinement(self) -> Refinement | None:
        """How the model was refined; None if it was not."""
        found = self._text("refinement")
        return None if found is None else Refinement(**json.loads(found))

    @property
    def source(self) -> str:
        """The float model, as JSON."""
        return self._required("source")

    @property
    def source_name(self) -> str:
        """The name by which a user loads the float model."""
        name: str = json.loads(self.source)["name"]
        return name

    @property
    def source_weights(self) -> str:
        """A hash over the weights of the float model."""
        digest: str = json.loads(self.source)["weights_sha256"]
        return digest

    @property
    def source_outputs(self) -> tuple[str, ...]:
        """Names of the float model's outputs; none in files of older exports."""
        return tuple(json.loads(self.source).get("outputs", ()))

    @property
    def preprocessing(self) -> str:
        """The terms of the images' transform, as JSON."""
        return self._required("preprocessing")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; none for a model without logits."""
        return tuple(json.loads(self._required("labels")))

    @property
    def classes(self) -> str | None:
        """A hash of the class embeddings that the file was exported with; None without them."""
        return self._text("classes")

    @property
    def bits_per_weight(self) -> float:
        """Scales, zero points and branches counted too."""
        return float(self._required("bits_per_weight"))

    @property
    def lowest_onnxruntime(self) -> str | None:
        """First release that was seen to run such a file."""
        return self._text("lowest_onnxruntime")

    @property
    def tells_schemes(self) -> bool:
        """Whether the file names its quantized linears."""
        return self._text("schemes") is not None

    @cached_property
    def scheme_by_linear(self) -> dict[str, str]:
        """The scheme of each quantized linear, by module path; empty for another tool's file."""
        # {"W4A8": [path, …]} becomes {path: "W4A8", …}.
        linears: dict[str, list[str]] = json.loads(self._text("schemes") or "{}")
        return {path: scheme for scheme, paths in linears.items() for path in paths}

    @cached_property
    def linears(self) -> dict[str, tuple[LinearPart, ...]] | None:
        """Where each quantized linear is in the graph, by module path; None if the file does not
        tell."""
        # Files of older exports have no such key.
        described = self._text("linears")
        if described is None:
            return None
        linears: dict[str, list[dict[str, str]]] = json.loads(described)
        return {
            path: tuple(LinearPart(**part) for part in parts) for path, parts in linears.items()
        }

    def _text(self, key: str) -> str | None:
        return self.properties.get(PREFIX + key)

    def _required(self, key: str) -> str:
        # No default: a guess about a file would be measured as if it were a fact.
        found = self._text(key)
        if found is None:
            raise BenchError(f"the file's metadata lack {PREFIX}{key}: export it again with marrq")
        return found
