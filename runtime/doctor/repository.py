"""A Triton model repository, checked without a server: what a server would refuse to load, or would
answer wrongly.

Each model's config.pbtxt is read by the protobuf that tritonclient ships, and held against the ONNX
files that it describes: names, types and shapes of input and output, the free batch in front of
them, the file of each version, and the labels. The check shares no code with the exporter
(exporters/triton/), so that it can tell if config and file differ. Of models that marrq did not
write only the config is read: a server completes what theirs leave out.
"""

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
        "install '.[serve]' in the clone"
    ) from error

CONFIG = "config.pbtxt"
# What a version has to hold for a backend that runs a script; others run the ONNX file itself.
SCRIPTS = {"python": "model.py"}

BACKENDS = ("onnxruntime", "python")
TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
}
# How the server writes an axis of any length.
FREE = -1

# A parameter of every config that marrq writes: the name of the ONNX file.
OURS = "onnx_file"


@dataclass(frozen=True)
class ServedModel:
    """A model of a repository.

    versions: numbers of its version folders, ascending.
    files: the ONNX file of each version that has a whole one, if marrq wrote the model.
    problems, warnings: sentences.
    """

    name: str
    backend: str
    versions: tuple[int, ...]
    files: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def examine_repository(folder: Path) -> list[ServedModel]:
    """Every model of a repository, by name. Raises BenchError if no folder in it has a config."""
    if (folder / "config.json").is_file():
        raise BenchError(
            f"{str(folder)!r} is an artifact or a model's checkpoint, not a model repository: give "
            "what marrq export wrote"
        )
    if not any(folder.glob(f"*/{CONFIG}")):
        raise BenchError(
            f"{str(folder)!r} is no model repository, no folder in it has a {CONFIG}: give what "
            "--format triton wrote"
        )
    return [_examine(model) for model in sorted(folder.iterdir()) if model.is_dir()]


def _examine(folder: Path) -> ServedModel:
    # A folder with a config that cannot be read is a model still, with a problem.
    versions = _versions(folder)
    try:
        config = text_format.Parse(
            (folder / CONFIG).read_text(encoding="utf-8"), protocol.ModelConfig()
        )
    except (OSError, ValueError, text_format.ParseError) as error:
        problem = f"{CONFIG} cannot be read: {error}"
        return ServedModel(folder.name, "unknown", versions, problems=(problem,))
    # A server completes what such a config leaves out, so a gap in it proves nothing.
    if OURS not in config.parameters:
        backend = config.backend or config.platform
        warning = "marrq did not write it: its config can be read, and nothing else was examined"
        return ServedModel(folder.name, backend, versions, warnings=(warning,))
    problems, files = _own_problems(folder, config, versions), []
    for version in versions:
        file = folder / str(version) / config.parameters[OURS].string_value
        found, is_whole = _version_problems(file, config)
        problems += [f"version {version}{problem}" for problem in found]
        if is_whole:
            files.append(file)
    return ServedModel(folder.name, config.backend, versions, tuple(files), tuple(problems))


def _versions(folder: Path) -> tuple[int, ...]:
    """Numbers of the version folders. A server passes over folders with other names."""
    places = (place for place in folder.iterdir() if place.is_dir() and place.name.isdecimal())
    return tuple(sorted(int(place.name) for place in places))


def _version_problems(file: Path, config: Any) -> tuple[list[str], bool]:
    """What is wrong with the ONNX file of a version, and whether it is a whole ONNX file."""
    problems = []
    script = SCRIPTS.get(config.backend)
    # The Python backend runs the file through a script beside it.
    if script is not None and not file.with_name(script).is_file():
        problems.append(f" has no {script}, which the backend {config.backend} runs")
    if not file.is_file():
        return [*problems, f" has no {file.name}"], False
    try:
        graph = Graph.load(file)
    except BenchError as error:
        return [*problems, f": {error}"], False
    differences = _differences(config, graph.model.graph)
    return [*problems, *(f": {difference}" for difference in differences)], True


def _own_problems(folder: Path, config: Any, versions: tuple[int, ...]) -> list[str]:
    """What is wrong with the config, whatever the files are."""
    problems = []
    # A server takes the folder's name, and refuses a config with another.
    if config.name and config.name != folder.name:
        problems.append(
            f"the config names the model {config.name!r}, its folder is {folder.name!r}: a server "
            "refuses that"
        )
    if config.backend not in BACKENDS:
        problems.append(f"the backend is {config.backend!r}: known are {' and '.join(BACKENDS)}")
    # Preferred sizes are those that a server waits for before it runs a batch.
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
    # A line of the file is the label of one class.
    labels, classes = len(file.read_text(encoding="utf-8").splitlines()), output.dims[-1]
    return (
        []
        if labels == classes
        else [f"{file.name} has {labels} labels, {output.name} has {classes} classes"]
    )


def _differences(config: Any, graph: onnx.GraphProto) -> list[str]:
    """Differences between a config and a file in what goes in and what comes out."""
    # Old files list their weights among the inputs too.
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    pairs = (("input", config.input, inputs), ("output", config.output, graph.output))
    return [
        problem
        for kind, said, had in pairs
        for problem in _tensor_differences(kind, said, had, config.max_batch_size > 0)
    ]


def _tensor_differences(kind: str, said: Any, had: Any, batched: bool) -> list[str]:
    """Differences of the inputs, or of the outputs.

    said: of the config. had: of the file. batched: whether the server adds a batch axis in front.
    """
    problems = []
    of_file = {value.name: value.type.tensor_type for value in had}
    # Names that only one of the two has; the others are compared below.
    for name in sorted({tensor.name for tensor in said} ^ set(of_file)):
        problems.append(
            f"the {kind} {name!r} is only in {'the file' if name in of_file else 'the config'}"
        )
    for tensor in said:
        if tensor.name not in of_file:
            continue
        there = of_file[tensor.name]
        # A free axis has a name and no length in the file.
        dims = [axis.dim_value or FREE for axis in there.shape.dim]
        # If the server makes batches, the config leaves out the first axis, which must be free.
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
