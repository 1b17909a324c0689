"""One artifact, several ONNX files: choose a flavour, write the graph, stamp it, check it.

Every file carries what is needed to serve and to judge it, as metadata: `marrq.flavor`, `marrq.scheme`, `marrq.method`,
`marrq.artifact` (hash), `marrq.source` (the float model), `marrq.preprocessing`, `marrq.labels`, `marrq.bits_per_weight`,
`marrq.lowest_onnxruntime`. The opset and IR version are the lowest that the graph needs: servers refuse versions newer than they know.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.floating import export_float16, export_float32
from exporters.integer import check_scheme, export_integer
from marrq import __version__
from marrq.errors import MarrqError
from marrq.models import VisionModel, load_source
from marrq.modules import bits_per_weight
from marrq.pipeline import QuantizedModel

IR_VERSIONS = {20: 9, 21: 10, 25: 13}
"""IR version that came with each opset."""

LOWEST_ONNXRUNTIME = {2: "1.24.1", 3: "1.21.0", 4: "1.23.0", 8: "1.17.0", 16: "1.17.0", 32: "1.17.0"}
"""First ONNX Runtime that was seen to load a file of that weight width, run its linears on integer kernels, and give the same logits."""

BASELINES: dict[str, tuple[Callable[[VisionModel], ir.Model], int]] = {"fp32": (export_float32, 32), "fp16": (export_float16, 16)}
"""Float flavours: exporter and bits of a weight."""

FLAVORS = ("integer", *BASELINES)


def write(model: QuantizedModel, artifact: str, flavor: str, path: Path) -> None:
    """Write an artifact's graph in one flavour; a file that exists is replaced. artifact: its hash.

    The float flavours are the model that the artifact was made from, loaded again and checked to have the same weights.
    """
    if flavor == "integer":
        write_integer(model, artifact, path)
    else:
        write_baseline(load_source(model.source), flavor, path)


def write_integer(model: QuantizedModel, artifact: str, path: Path) -> None:
    """Write the integer flavour."""
    described = {
        "flavor": "integer",
        "scheme": str(model.scheme),
        "method": model.method.name,
        "artifact": artifact,
        "bits_per_weight": f"{bits_per_weight(model.module):.4f}",
        "lowest_onnxruntime": LOWEST_ONNXRUNTIME[model.scheme.weight.num_bits],
    }
    _write(export_integer(model), model, described, path)


def write_baseline(model: VisionModel, flavor: str, path: Path) -> float:
    """Write a float flavour, and return the bits of its weights. Raises MarrqError for a flavour that is none."""
    if flavor not in BASELINES:
        raise MarrqError(f"unknown baseline {flavor!r}: choose one of {', '.join(BASELINES)}")
    exporter, bits = BASELINES[flavor]
    described = {
        "flavor": flavor,
        "scheme": flavor,
        "method": "none",
        "bits_per_weight": f"{bits:.4f}",
        "lowest_onnxruntime": LOWEST_ONNXRUNTIME[bits],
    }
    _write(exporter(model), model, described, path)
    return float(bits)


def check_flavor(model: QuantizedModel, flavor: str) -> None:
    """Raise MarrqError when there is no such flavour or it cannot express the artifact's scheme."""
    if flavor not in FLAVORS:
        raise MarrqError(f"unknown flavor {flavor!r}: choose one of {', '.join(FLAVORS)}")
    if flavor == "integer":
        check_scheme(model)


def _write(graph: ir.Model, model: QuantizedModel | VisionModel, described: dict[str, str], path: Path) -> None:
    """Stamp the graph, check it, and put the file in its place in one step."""
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
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        file = Path(temporary) / path.name
        ir.save(graph, file)
        onnx.checker.check_model(str(file), full_check=True)
        file.rename(path)
