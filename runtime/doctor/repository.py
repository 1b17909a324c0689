"""A Triton model repository, checked without a server: what would be refused at load, or answered
wrongly.

Each model's config.pbtxt is read by the protobuf that tritonclient ships, and held against the ONNX
files that it is about: names, types and shapes of input and output, the free batch in front of
them, the file of each version, and the labels. It is written anew, and not taken from the exporter,
so that it can tell when the two differ. Of models that marrq did not write only the config is read:
a server completes what theirs leave out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from runtime.audit.graph import Graph
from runtime.errors import BenchError

try:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as protocol
except ImportError as error:
    raise BenchError(
        "a Triton repository is read by tritonclient's protobuf, which is not installed: pip "
        "install 'marrq[serve]'"
    ) from error

CONFIG = "config.pbtxt"
SCRIPTS = {"python": "model.py"}
"""What a version has to hold for a backend that runs a script; others run the ONNX file itself."""

BACKENDS = ("onnxruntime", "python")
TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}
FREE = -1
"""How the server writes an axis of any length."""

OURS = "onnx_file"
"""A parameter of every config that marrq writes: the name of the ONNX file."""


@dataclass(frozen=True)
class ServedModel:
    """A model of a repository. versions: numbers of its version folders, ascending; files: the ONNX
    file of each that has a whole one, of models that marrq wrote; problems, warnings: sentences."""

    name: str
    backend: str
    versions: tuple[int, ...]
    files: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def examine_repository(folder: Path) -> list[ServedModel]:
    """Every model of a repository, by name. Raises BenchError for a folder in which no folder has a
    config."""
    if not any(folder.glob(f"*/{CONFIG}")):
        raise BenchError(
            f"{str(folder)!r} is no model repository, no folder in it has a {CONFIG}: give what "
            "--format triton wrote"
        )
    return [_examine(model) for model in sorted(folder.iterdir()) if model.is_dir()]


def _examine(folder: Path) -> ServedModel:
    versions = tuple(
        sorted(
            int(place.name)
            for place in folder.iterdir()
            if place.is_dir() and place.name.isdecimal()
        )
    )
    try:
        config = text_format.Parse(
            (folder / CONFIG).read_text(encoding="utf-8"), protocol.ModelConfig()
        )
    except (OSError, ValueError, text_format.ParseError) as error:
        return ServedModel(
            folder.name, "unknown", versions, problems=(f"{CONFIG} cannot be read: {error}",)
        )
    if OURS not in config.parameters:
        warning = "marrq did not write it: its config can be read, and nothing else was examined"
        return ServedModel(
            folder.name, config.backend or config.platform, versions, warnings=(warning,)
        )
    problems = _own_problems(folder, config, versions)
    files = []
    for version in versions:
        file = folder / str(version) / config.parameters[OURS].string_value
        script = SCRIPTS.get(config.backend)
        if script is not None and not file.with_name(script).is_file():
            problems.append(
                f"version {version} has no {script}, which the backend {config.backend} runs"
            )
        if not file.is_file():
            problems.append(f"version {version} has no {file.name}")
            continue
        try:
            graph = Graph.load(file)
        except BenchError as error:
            problems.append(f"version {version}: {error}")
            continue
        files.append(file)
        problems += [
            f"version {version}: {problem}" for problem in _differences(config, graph.model.graph)
        ]
    return ServedModel(folder.name, config.backend, versions, tuple(files), tuple(problems))


def _own_problems(folder: Path, config: Any, versions: tuple[int, ...]) -> list[str]:
    """What is wrong whatever the files are."""
    problems = []
    if config.name and config.name != folder.name:
        problems.append(
            f"the config names the model {config.name!r}, its folder is {folder.name!r}: a server "
            "refuses that"
        )
    if config.backend not in BACKENDS:
        problems.append(f"the backend is {config.backend!r}: known are {' and '.join(BACKENDS)}")
    largest = max(config.dynamic_batching.preferred_batch_size, default=0)
    if largest > config.max_batch_size:
        problems.append(
            f"batches of {largest} images are preferred, of which at most {config.max_batch_size} "
            "are allowed"
        )
    if not versions:
        problems.append("there is no version: a folder whose name is a number")
    for output in config.output:
        if output.label_filename:
            problems += _label_problems(folder / output.label_filename, output)
    return problems


def _label_problems(file: Path, output: Any) -> list[str]:
    if not file.is_file():
        return [f"the labels of {output.name} should be in {file.name}, which is not there"]
    labels, classes = len(file.read_text(encoding="utf-8").splitlines()), output.dims[-1]
    return (
        []
        if labels == classes
        else [f"{file.name} has {labels} labels, {output.name} has {classes} classes"]
    )


def _differences(config: Any, graph: onnx.GraphProto) -> list[str]:
    """Where a config and a file disagree about what goes in and what comes out."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    pairs = (("input", config.input, inputs), ("output", config.output, graph.output))
    return [
        problem
        for kind, said, had in pairs
        for problem in _tensor_differences(kind, said, had, config.max_batch_size > 0)
    ]


def _tensor_differences(kind: str, said: Any, had: Any, batched: bool) -> list[str]:
    problems = []
    of_file = {value.name: value.type.tensor_type for value in had}
    for name in sorted({tensor.name for tensor in said} ^ set(of_file)):
        problems.append(
            f"the {kind} {name!r} is only in {'the file' if name in of_file else 'the config'}"
        )
    for tensor in said:
        if tensor.name not in of_file:
            continue
        there = of_file[tensor.name]
        dims = [axis.dim_value or FREE for axis in there.shape.dim]
        if batched and dims[:1] != [FREE]:
            problems.append(
                f"the {kind} {tensor.name!r} has {dims} in the file, whose batch is not free: "
                "max_batch_size has to be 0"
            )
        elif dims[batched:] != list(tensor.dims):
            problems.append(
                f"the {kind} {tensor.name!r} is {list(tensor.dims)} in the config, "
                f"{dims[batched:]} in the file"
            )
        if TYPES.get(there.elem_type) != protocol.DataType.Name(tensor.data_type):
            of_element = onnx.TensorProto.DataType.Name(there.elem_type)
            problems.append(
                f"the {kind} {tensor.name!r} is {protocol.DataType.Name(tensor.data_type)} in the "
                f"config, {of_element} in the file"
            )
    return problems
