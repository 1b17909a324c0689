"""ONNX files of one quantized model: lower the trace, describe the graph, check it, save it.

    traced = trace_quantized(model, artifact_hash)      once
    write(traced, "integer", path)                      for each flavour

What a file says about itself is in exporters/metadata.py, the opset and the IR version that it
states in exporters/opsets.py.
"""

import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.choices import (
    NO_OPTIONS,
    Options,
    check_baseline,
    check_choice,
    check_device,
    written_scheme,
)
from exporters.external_data import external_data, put
from exporters.flavors import FLAVORS, check_flavor
from exporters.flavors.floating import FLOAT_FLAVORS
from exporters.metadata import FileMetadata
from exporters.opsets import IR_VERSIONS, lowest_onnxruntime
from exporters.pixels import take_images
from exporters.trace import TracedModel, trace_quantized
from marrq.errors import MarrqError
from marrq.models.load import VisionModel, load_source
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.activations import ActivationQuantizer
from marrq.quantizers.linear import QuantLinear, quantized_linears
from marrq.quantizers.weights_only import weights_only
from marrq.schemes import Scheme
from marrq.zero_shot import with_classes

INLINE_BYTES = 2_000_000_000
"""Largest size of the tensors that stay in the ONNX file itself. The graph takes the rest of the
2 GiB at which a protobuf ends."""


@dataclass(frozen=True)
class Export:
    """A quantized model in the flavour that it is exported in.

    artifact_hash: of the artifact that holds the model. flavor, device: names of
    exporters/choices.py. Raises MarrqError as `check_flavor`.
    """

    model: QuantizedModel
    artifact_hash: str
    flavor: str
    options: Options = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_flavor(self.model.scheme, self.flavor, self.options, self.device)

    @property
    def scheme(self) -> Scheme:
        """What the file holds of the artifact's scheme."""
        return written_scheme(self.model.scheme, self.options)

    def write(self, path: Path, takes_images: bool = False) -> None:
        """Trace the model and write one ONNX file. path, takes_images: as in `write`.

        A float flavour is the model that the artifact was made from: the model is loaded again, and
        its weights are checked to be the same.
        """
        # A float flavour needs no trace of the quantized model.
        if self.flavor in FLOAT_FLAVORS:
            source = load_source(self.model.source)
            # The float model behind the same classes.
            if self.model.classes is not None:
                source = with_classes(source, self.model.classes)
            write_baseline(source, self.flavor, path, self.options, takes_images, self.device)
        else:
            traced = trace_quantized(self.model, self.artifact_hash)
            write(traced, self.flavor, path, self.options, takes_images, self.device)


def write(
    traced: TracedModel,
    flavor: str,
    path: Path,
    options: Options = NO_OPTIONS,
    takes_images: bool = False,
    device: str = "cpu",
) -> None:
    """Write a traced model in one flavour. A file that exists is replaced.

    flavor: a key of FLAVORS. takes_images: the graph takes uint8 images and normalizes them itself
    (exporters/pixels.py). device: what the file is made for. Raises MarrqError as `check_flavor`.
    """
    check_flavor(traced.model.scheme, flavor, options, device)
    # The float model is not in the trace.
    if flavor not in FLAVORS:
        raise MarrqError(f"{flavor!r} does not lower a quantized model: use write_baseline")
    if options.get("weights_only"):
        traced = replace(traced, model=weights_only(traced.model))
    model = traced.model
    # A flavour is made with the options of the user; the others have their defaults.
    chosen = FLAVORS[flavor](**options)
    # What float16 cannot hold becomes infinity, which marrq/workflows/overflow.py looks for.
    with np.errstate(over="ignore"):
        lowered = chosen.lower(traced, device)
    schemes, lowrank = model.block_schemes, model.method.lowrank
    # Patch embedding and head may be wider than the blocks.
    own = [_scheme_of(linear) for linear in quantized_linears(model.module).values()]
    containers = {chosen.container_bits(scheme, device) for scheme in own}
    has_salient = lowrank is not None and not lowrank.is_branch
    metadata = FileMetadata(
        flavor=flavor,
        device=device,
        scheme=str(model.scheme),
        method=model.method_name,
        bits_per_weight=lowered.bits_per_weight,
        # What asks for the newest release decides.
        lowest_onnxruntime=max(
            lowest_onnxruntime(lowered.graph, device),
            *(chosen.lowest_onnxruntime(scheme, has_salient) for scheme in schemes),
        ),
        source=model.source,
        preprocessing=model.preprocessing,
        labels=model.labels,
        classes=None if model.classes is None else model.classes.sha256,
        artifact=traced.artifact_hash,
        refinement=model.refinement,
        schemes=_paths_by_scheme(model),
        container_bits=containers.pop() if len(containers) == 1 else None,
        linears=lowered.linears,
        # All options, those with their defaults too; of fuse, what was done.
        options={
            name: str(lowered.fuse if name == "fuse" else value)
            for name, value in vars(chosen).items()
        },
    )
    _save(lowered.graph, metadata, path, takes_images)


def write_baseline(
    model: VisionModel,
    flavor: str,
    path: Path,
    options: Options = NO_OPTIONS,
    takes_images: bool = False,
    device: str = "cpu",
) -> float:
    """Write a float model, and return the bits of its weights. path, options, takes_images, device:
    as in `write`.

    Raises MarrqError for an unknown device, an option that the flavour does not have, and a flavour
    that is not a key of FLOAT_FLAVORS.
    """
    check_baseline(flavor)
    check_choice(flavor, options)
    check_device(device)
    chosen = FLOAT_FLAVORS[flavor](**options)
    with np.errstate(over="ignore"):
        graph = chosen.lower(model, device)
    metadata = FileMetadata(
        flavor=flavor,
        device=device,
        scheme=flavor,
        method="none",
        bits_per_weight=chosen.bits,
        lowest_onnxruntime=lowest_onnxruntime(graph, device),
        source=model.source,
        preprocessing=model.preprocessing,
        labels=model.labels,
        classes=None if model.classes is None else model.classes.sha256,
        options={"fuse": str(chosen.fuse)},
    )
    _save(graph, metadata, path, takes_images)
    return float(chosen.bits)


def _paths_by_scheme(model: QuantizedModel) -> dict[str, list[str]]:
    """The paths of the quantized linears by the scheme that each of them really has.

    An audit compares what runs with these schemes. Patch embedding and head differ from the blocks.
    """
    paths: dict[str, list[str]] = {}
    for path, linear in quantized_linears(model.module).items():
        paths.setdefault(str(_scheme_of(linear)), []).append(path)
    return paths


def _scheme_of(linear: QuantLinear) -> Scheme:
    quantizer = linear.input if isinstance(linear.input, ActivationQuantizer) else None
    return Scheme(linear.spec, None if quantizer is None else quantizer.spec)


def _save(graph: ir.Model, metadata: FileMetadata, path: Path, takes_images: bool) -> None:
    """Complete the graph, check it, and put the file in its place."""
    if takes_images:
        take_images(graph.graph, metadata.preprocessing)
    # Rewrites leave constants behind that nothing reads.
    RemoveUnusedNodesPass()(graph)
    # The version that was released with the opset: servers refuse newer ones.
    graph.ir_version = IR_VERSIONS[graph.opset_imports[""]]
    graph.producer_name, graph.producer_version = "marrq", version("marrq")
    graph.metadata_props.update(metadata.to_metadata_props())
    beside = external_data(path).name if _tensor_bytes(graph) > INLINE_BYTES else None
    # The folder is made late, so that a refusal leaves nothing behind.
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, because the model names its data file: both need their final names.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        file = Path(temporary) / path.name
        # None keeps all tensors in the file.
        ir.save(graph, file, external_data=beside)
        # Check the file, not the model in memory: the checker needs a path above 2 GiB.
        onnx.checker.check_model(str(file), full_check=True)
        put(file, path)


def _tensor_bytes(graph: ir.Model) -> int:
    tensors = [value.const_value for value in graph.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
