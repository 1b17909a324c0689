"""One artifact, several ONNX files: choose a flavour, write the graph, stamp it, check it.

Every file carries what is needed to serve and to judge it, as metadata: `marrq.flavor`,
`marrq.scheme`, `marrq.method`, `marrq.artifact` (hash), `marrq.source` (the float model),
`marrq.preprocessing`, `marrq.labels`, `marrq.bits_per_weight` (in this file),
`marrq.container_bits` (of one weight code in this file), `marrq.schemes` (paths of the quantized
linears, by their scheme), the options of the flavour, and `marrq.lowest_onnxruntime`. The opset and
IR version are the lowest that the graph needs: servers refuse versions newer than they know.
`marrq.linears` says where each linear begins and ends in the graph (exporters/flavors/lowering.py).

A protobuf ends at 2 GiB. The tensors of a larger model are kept beside it, in one file named like
it with `.data` behind, which has to go where the model goes."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.flavors.floating import export_float16, export_float32
from exporters.flavors.integer import Integer
from exporters.flavors.lowering import weight_bits
from exporters.flavors.matmulnbits import MatMulNBits
from exporters.flavors.qdq import Qdq
from exporters.pixels import take_images
from exporters.trace import TracedModel, trace_quantized
from marrq import __version__
from marrq.errors import MarrqError
from marrq.models.load import VisionModel, load_source
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import Scheme

IR_VERSIONS = {20: 9, 21: 10, 23: 11, 25: 13}
"""IR version that came with each opset."""


INLINE_BYTES = 2_000_000_000
"""Largest size of a model's tensors that stay in the ONNX file itself; what the graph takes besides
has the rest of the 2 GiB."""


class Flavor(Protocol):
    """A way to lower the placeholders of a traced graph, with its options as fields."""

    def objection(self, scheme: Scheme) -> str | None:
        """Why the flavour cannot express a scheme, or None."""

    def container_bits(self, scheme: Scheme) -> int:
        """Bits that a weight code takes in the file."""

    def lowest_onnxruntime(self, scheme: Scheme) -> str:
        """First ONNX Runtime that was seen to run such a file, of 1.17.0, 1.18.0 and so on to
        1.23.0, and 1.24.1."""

    def lower(self, traced: TracedModel) -> ir.Model:
        """The graph with the placeholders replaced, unstamped."""


FLAVORS: dict[str, Callable[..., Flavor]] = {
    "integer": Integer,
    "matmulnbits": MatMulNBits,
    "qdq": Qdq,
}
"""Flavours of a quantized model; the first that can express its scheme suits it best under ONNX
Runtime."""

BASELINES: dict[str, tuple[Callable[[VisionModel], ir.Model], int]] = {
    "fp32": (export_float32, 32),
    "fp16": (export_float16, 16),
}
"""Float flavours: exporter and bits of a weight."""

BASELINE_ONNXRUNTIME = "1.17.0"
"""First ONNX Runtime that was seen to load the float flavours and to give the same logits."""


Options = Mapping[str, bool | int]
"""Options of a flavour, by the names of its fields, that are not to have their defaults."""

NO_OPTIONS: Options = MappingProxyType({})
OPTIONS = {
    "symmetric": ("qdq",),
    "accuracy_level": ("matmulnbits",),
    "fuse": ("integer", "matmulnbits"),
}
"""The flavours that take each option."""

VARIANTS: dict[str, tuple[str, Options]] = {
    "integer": ("integer", NO_OPTIONS),
    "matmulnbits": ("matmulnbits", NO_OPTIONS),
    "matmulnbits level 4": ("matmulnbits", {"accuracy_level": 4}),
    "qdq": ("qdq", NO_OPTIONS),
    "qdq symmetric": ("qdq", {"symmetric": True}),
}
"""Flavours with the options that are worth measuring beside each other."""


def variants(scheme: Scheme) -> list[str]:
    """Those of VARIANTS that can express a scheme."""
    return [
        name
        for name, (flavor, options) in VARIANTS.items()
        if FLAVORS[flavor](**options).objection(scheme) is None
    ]


def suitable_flavor(model: QuantizedModel) -> str:
    """The first flavour that can express the artifact's scheme; `qdq` can express them all."""
    return _able(model.scheme)[0]


def check_flavor(model: QuantizedModel, flavor: str, options: Options = NO_OPTIONS) -> None:
    """Raise MarrqError when there is no such flavour, it has no such option, or it cannot express
    the artifact's scheme."""
    for option in options:
        if flavor not in OPTIONS[option]:
            flag = "--no-fuse" if option == "fuse" else f"--{option.replace('_', '-')}"
            raise MarrqError(
                f"{flag} is no option of {flavor!r}: use it with --flavor "
                f"{' or '.join(OPTIONS[option])}"
            )
    if flavor in BASELINES:
        return
    if flavor not in FLAVORS:
        raise MarrqError(
            f"unknown flavor {flavor!r}: choose one of {', '.join((*FLAVORS, *BASELINES))}"
        )
    objection = FLAVORS[flavor](**options).objection(model.scheme)
    if objection is not None:
        able = " or ".join(_able(model.scheme))
        raise MarrqError(
            f"the flavor {flavor} {objection}: the artifact has {model.scheme.description}; use "
            f"--flavor {able}"
        )


def write(
    traced: TracedModel,
    flavor: str,
    path: Path,
    options: Options = NO_OPTIONS,
    takes_images: bool = False,
) -> None:
    """Write a quantized model's graph in one flavour; a file that exists is replaced.

    flavor: a key of FLAVORS. takes_images: the graph takes uint8 images and normalizes them itself.
    Raises MarrqError as `check_flavor`."""
    model = traced.model
    check_flavor(model, flavor, options)
    if flavor in BASELINES:
        raise MarrqError(f"{flavor!r} is no lowering of a quantized model: use write_baseline")
    chosen = FLAVORS[flavor](**options)
    graph = chosen.lower(traced)
    described = {
        "flavor": flavor,
        "scheme": str(model.scheme),
        "method": model.method.name,
        "artifact": traced.artifact_hash,
        "bits_per_weight": f"{weight_bits(graph.graph, model):.4f}",
        "schemes": json.dumps(_paths_by_scheme(model)),
        "container_bits": str(chosen.container_bits(model.scheme)),
        "lowest_onnxruntime": chosen.lowest_onnxruntime(model.scheme),
    }
    _write(
        graph,
        model,
        described | {name: str(value) for name, value in vars(chosen).items()},
        path,
        takes_images,
    )


@dataclass(frozen=True)
class Export:
    """A quantized model in the flavour that it is exported in.

    artifact_hash: of the artifact that the model was read from; flavor: a key of FLAVORS or of
    BASELINES. Raises MarrqError as `check_flavor`.
    """

    model: QuantizedModel
    artifact_hash: str
    flavor: str
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_flavor(self.model, self.flavor, self.options)

    def write(self, path: Path, takes_images: bool = False) -> None:
        """Write the ONNX file; a file that exists is replaced. takes_images: as in `write`.

        A float flavour is the model that the artifact was made from: it is loaded again, and its
        weights are checked to be the same."""
        if self.flavor in BASELINES:
            write_baseline(load_source(self.model.source), self.flavor, path, takes_images)
        else:
            traced = trace_quantized(self.model, self.artifact_hash)
            write(traced, self.flavor, path, self.options, takes_images)


def _paths_by_scheme(model: QuantizedModel) -> dict[str, list[str]]:
    """The quantized linears by what each of them has got, so that what runs can be held against
    it."""
    paths: dict[str, list[str]] = {}
    for path, linear in quantized_linears(model.module).items():
        scheme = Scheme(linear.spec, linear.input.spec if linear.input is not None else None)
        paths.setdefault(str(scheme), []).append(path)
    return paths


def _able(scheme: Scheme) -> list[str]:
    """Flavours that can express a scheme."""
    return [name for name, make in FLAVORS.items() if make().objection(scheme) is None]


def write_baseline(
    model: VisionModel, flavor: str, path: Path, takes_images: bool = False
) -> float:
    """Write a float flavour, and return the bits of its weights; takes_images: as in `write`.
    Raises MarrqError for a flavour that is none."""
    if flavor not in BASELINES:
        raise MarrqError(f"unknown baseline {flavor!r}: choose one of {', '.join(BASELINES)}")
    exporter, bits = BASELINES[flavor]
    described = {
        "flavor": flavor,
        "scheme": flavor,
        "method": "none",
        "bits_per_weight": f"{bits:.4f}",
        "lowest_onnxruntime": BASELINE_ONNXRUNTIME,
    }
    _write(exporter(model), model, described, path, takes_images)
    return float(bits)


def _write(
    graph: ir.Model,
    model: QuantizedModel | VisionModel,
    described: dict[str, str],
    path: Path,
    takes_images: bool,
) -> None:
    """Stamp the graph, check it, and put the file in its place in one step."""
    if takes_images:
        take_images(graph.graph, model.preprocessing)
    RemoveUnusedNodesPass()(graph)  # constants that a rewrite left behind
    opset = graph.opset_imports[""]
    graph.ir_version = IR_VERSIONS[opset]
    graph.producer_name, graph.producer_version = "marrq", __version__
    described = described | {
        "source": json.dumps(asdict(model.source)),
        "preprocessing": json.dumps(asdict(model.preprocessing)),
        "labels": json.dumps(model.labels),
    }
    graph.metadata_props.update({f"marrq.{key}": value for key, value in described.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    ]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        file = Path(temporary) / path.name
        ir.save(
            graph,
            file,
            external_data=external_data(path).name if sum(tensors) > INLINE_BYTES else None,
        )
        onnx.checker.check_model(str(file), full_check=True)
        _put(file, path)


def external_data(path: Path) -> Path:
    """Where the tensors of a model are that its file is too small for."""
    return path.with_name(f"{path.name}.data")


def _put(file: Path, path: Path) -> None:
    """Move a file, and its data where it has some, to a place where others may be: at every moment
    what is there is whole, or absent."""
    if external_data(file).exists():
        path.unlink(missing_ok=True)
        external_data(file).replace(external_data(path))
        file.rename(path)
    else:
        file.replace(path)
        external_data(path).unlink(missing_ok=True)
