"""The server's ModelConfig: read from the ONNX file, from the model, and from the user's choices.

The message is written from the protobuf that tritonclient ships. The onnxruntime backend passes no
session keys, so whatever matters is in the graph, as in every file that marrq writes. Graph
optimization is left at the backend's default, which is all of it.

The server runs the smallest, the preferred and the largest batch once before it serves, because
ONNX Runtime allocates memory in its first run. The images of different clients are run together: in
no scheme does an image change the numbers of another image in the batch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from exporters.choices import BASELINES
from exporters.onnx_file import Export
from exporters.triton.serving import NEEDS_TRITONCLIENT, Serving
from marrq.errors import MarrqError
from marrq.models.named_outputs import output_kind

try:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as protocol
except ImportError as error:
    raise MarrqError(NEEDS_TRITONCLIENT) from error

LABELS = "labels.txt"
MODEL = "model.onnx"
TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.UINT8: "TYPE_UINT8"}
KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}
"""What ModelInstanceGroup calls the devices."""
FREE = -1
"""How a server writes an axis of any length."""

BENCH_SCHEMA = "marrq.bench/2"
NEAR_BEST = 0.95
"""A batch size is preferred if its throughput is at least this share of the best."""


def config_of(file: Path, export: Export, serving: Serving, preferred: Sequence[int] = ()) -> Any:
    """The ModelConfig of an ONNX file with one input, whose first axis is the batch, as that of
    every output is.

    export: what the file holds, and the device that it is for.
    preferred: batch sizes that the server waits for if requests queue.
    """
    model = export.model
    config = protocol.ModelConfig(
        name=serving.name, backend=serving.backend, max_batch_size=serving.max_batch
    )
    _describe_tensors(config, onnx.load(file, load_external_data=False).graph)
    # With labels a client may ask for classes by name. Boxes and maps have none.
    for output in classes_of(config, model.labels):
        output.label_filename = LABELS
    # Copies of the model, and the device that they run on.
    group = config.instance_group.add(count=serving.instances)
    group.kind = protocol.ModelInstanceGroup.Kind.Value(KINDS[export.device])
    config.dynamic_batching.preferred_batch_size.extend(preferred)
    config.dynamic_batching.max_queue_delay_microseconds = serving.queue_delay
    # Present even if both fields have their defaults: its presence makes the server batch.
    config.dynamic_batching.SetInParent()
    # For programs: clients read the preprocessing, model.py the name of the file.
    parameters = {"preprocessing": json.dumps(asdict(model.preprocessing)), "onnx_file": MODEL}
    if serving.threads is not None:
        parameters["intra_op_thread_count"] = str(serving.threads)
    for name, text in parameters.items():
        config.parameters[name].string_value = text
    for batch in sorted({1, *preferred, serving.max_batch}):
        _warm_up(config, batch)
    return config


def classes_of(config: Any, labels: Sequence[str]) -> list[Any]:
    """The outputs of a ModelConfig that are logits of the classes `labels`."""
    # The server adds the batch axis itself.
    return [
        output
        for output in config.output
        if output_kind(output.name, 1 + len(output.dims), labels) == "classes"
    ]


def _describe_tensors(config: Any, graph: onnx.GraphProto) -> None:
    for values, described in ((graph.input, config.input), (graph.output, config.output)):
        for value in values:
            tensor = value.type.tensor_type
            # The server adds the batch axis itself.
            dims = [axis.dim_value or FREE for axis in tensor.shape.dim[1:]]
            # float32 for pixels and outputs, uint8 for images.
            data_type = protocol.DataType.Value(TYPES[tensor.elem_type])
            described.add(name=value.name, data_type=data_type, dims=dims)


def _warm_up(config: Any, batch: int) -> None:
    """Let the server run random images of a batch size before it serves."""
    warmup = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
    sample = warmup.inputs[config.input[0].name]
    # The values do not matter, only that memory is allocated.
    sample.data_type, sample.random_data = config.input[0].data_type, True
    sample.dims.extend(config.input[0].dims)


def read_config(file: Path) -> Any:
    """The ModelConfig of a file. Raises MarrqError for a file that is none."""
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), protocol.ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        raise MarrqError(
            f"{str(file)!r} is no config of Triton ({error}): mend it, or remove the model's folder"
        ) from error


def text_of(config: Any) -> str:
    """The ModelConfig as a server reads it."""
    text: str = text_format.MessageToString(config)
    return text


def read_bench(file: Path) -> dict[str, Any]:
    """The report that `marrq bench --json` wrote. Raises MarrqError for any other file."""
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = report["schema"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise MarrqError(
            f"{str(file)!r} is no bench: give what `marrq bench --json` wrote"
        ) from error
    if schema != BENCH_SCHEMA:
        raise MarrqError(
            f"{str(file)!r} has schema {schema!r}, not {BENCH_SCHEMA!r}: give what `marrq bench "
            "--json` wrote"
        )
    return report


def preferred_batches(
    report: dict[str, Any], flavor: str, scheme: str, max_batch: int
) -> tuple[int, ...]:
    """Batch sizes above 1 whose throughput is within 5 % of the best, of one model of a bench.

    report: as `read_bench` gives it. flavor, scheme: of the model. Raises MarrqError if the bench
    does not hold exactly one such model, and if no batch size is at most `max_batch`.
    """
    # A bench calls the scheme of a float model by its flavour.
    scheme = flavor if flavor in BASELINES else scheme
    models = report["models"]
    found = [model for model in models if (model["flavor"], model["scheme"]) == (flavor, scheme)]
    if len(found) != 1:
        had = ", ".join(f"{model['scheme']} {model['flavor']}" for model in models)
        raise MarrqError(
            f"the bench holds {len(found)} of {scheme} {flavor}, among {had}: give a bench of this "
            "artifact and flavour alone"
        )
    rows = [row for row in found[0]["latency"] if row["batch"] <= max_batch]
    if not rows:
        raise MarrqError(
            f"the bench has no batch size up to {max_batch}: pass a larger --max-batch"
        )
    best = max(row["images_per_s"] for row in rows)
    fast = {row["batch"] for row in rows if row["images_per_s"] >= NEAR_BEST * best}
    # A batch of 1 needs no preference: the server runs a single request anyway.
    return tuple(sorted(fast - {1}))
