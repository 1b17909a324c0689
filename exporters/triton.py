"""A model repository for Triton Inference Server: an artifact's ONNX file, and what the server has to be told about it.

    REPOSITORY/NAME/config.pbtxt            the server's ModelConfig, written from the protobuf that tritonclient ships
    REPOSITORY/NAME/labels.txt              a class a line, for answers by name; not for feature extractors
    REPOSITORY/NAME/README.md               what a client has to send, and what it gets
    REPOSITORY/NAME/VERSION/model.onnx      model.onnx.data beside it above 2 GB, model.py for the python backend

Input and output are read from the file itself. The onnxruntime backend passes no session keys, so whatever matters is in the graph, as in
every file that marrq writes; graph optimization is left at the backend's default, which is all of it. The server runs each batch size once
before it serves: ONNX Runtime allocates in its first run.

A version is put in its place in one step, beside those that are served, so that a server which watches the repository finds it whole. All
versions of a model share its config: one that would change what clients have to send is refused.

The images of different clients are run together. Schemes in which an image changes the numbers of those beside it (`per-tensor-dynamic`)
are therefore served without dynamic batching.
"""

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from exporters.onnx_file import BASELINES, NO_OPTIONS, Options, write
from marrq import __version__
from marrq.errors import MarrqError
from marrq.pipeline import QuantizedModel

try:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as protocol
except ImportError as error:
    raise MarrqError(
        "a Triton repository is written by tritonclient's protobuf, which is not installed: pip install 'marrq[serve]'"
    ) from error

CONFIG, LABELS, CARD, MODEL = "config.pbtxt", "labels.txt", "README.md", "model.onnx"
BACKEND_FILES = {"onnxruntime": None, "python": Path(__file__).with_name("triton_model.py")}
"""Backends, and the model.py that one needs beside the ONNX file."""

DEVICES = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}
CPU_FLAVORS = ("integer",)
"""Flavours whose kernels only ONNX Runtime's CPU provider has."""

TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.UINT8: "TYPE_UINT8"}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
NEAR_BEST = 0.95
"""Share of the best throughput from which on a batch size is preferred."""


@dataclass(frozen=True)
class Serving:
    """What the user chooses about the server.

    name: of the model; model_version: a server takes the highest; backend: a key of BACKEND_FILES; device: a key of DEVICES;
    instances: copies of the model that run at once; threads: of one operator, None for one a core; max_batch: images in a run;
    preferred: batch sizes that the server waits for where requests queue; queue_delay: microseconds that a request may wait for others;
    preprocess: take uint8 images in place of normalized pixels.
    """

    name: str
    model_version: int = 1
    backend: str = "onnxruntime"
    device: str = "cpu"
    instances: int = 1
    threads: int | None = None
    max_batch: int = 8
    preferred: tuple[int, ...] = ()
    queue_delay: int = 0
    preprocess: bool = False

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise MarrqError(f"a model's name is part of its address and takes letters, digits, '_', '.' and '-': got {self.name!r}")
        if self.backend not in BACKEND_FILES:
            raise MarrqError(f"unknown backend {self.backend!r}: choose one of {', '.join(BACKEND_FILES)}")
        if self.device not in DEVICES:
            raise MarrqError(f"unknown device {self.device!r}: choose one of {', '.join(DEVICES)}")


def write_repository(
    model: QuantizedModel,
    artifact: str,
    flavor: str,
    repository: Path,
    serving: Serving,
    options: Options = NO_OPTIONS,
    force: bool = False,
) -> Path:
    """Add a version of a model to a repository, which is made where there is none, and return the model's folder. artifact: its hash;
    force: replace a version and a config that are there. Raises MarrqError as `check_flavor`, for a flavour that the device has no
    kernels for, and for what is there already."""
    if serving.device == "gpu" and flavor in CPU_FLAVORS:
        raise MarrqError(f"the kernels of {flavor} are of ONNX Runtime's CPU provider: use --device cpu, or another flavor")
    folder = repository / serving.name
    version = folder / str(serving.model_version)
    if version.exists() and not force:
        raise MarrqError(f"{str(version)!r} exists: pass another --model-version, or --force to replace it")
    repository.mkdir(parents=True, exist_ok=True)
    # A server takes each folder of the repository for a model, and each folder of a model whose name is a number for a version.
    with tempfile.TemporaryDirectory(dir=folder if folder.exists() else repository.parent, prefix=".marrq.") as temporary:
        made = Path(temporary) / serving.name
        config = _write_folder(made, model, artifact, flavor, serving, options)
        if not folder.exists():
            made.rename(folder)
            return folder
        _check_clients(folder, config, force)
        if version.exists():
            version.rename(Path(temporary) / "replaced")
        (made / version.name).rename(version)
        for file in made.iterdir():
            file.replace(folder / file.name)
    return folder


def _write_folder(made: Path, model: QuantizedModel, artifact: str, flavor: str, serving: Serving, options: Options) -> Any:
    """A model's folder with one version, and its config."""
    place = made / str(serving.model_version)
    write(model, artifact, flavor, place / MODEL, options, serving.preprocess)
    script = BACKEND_FILES[serving.backend]
    if script is not None:
        shutil.copyfile(script, place / "model.py")
    config = config_of(place / MODEL, model, serving)
    (made / CONFIG).write_text(text_format.MessageToString(config), encoding="utf-8")
    (made / CARD).write_text(_card(model, flavor, config, serving), encoding="utf-8")
    if model.labels:
        (made / LABELS).write_text("".join(f"{label}\n" for label in model.labels), encoding="utf-8")
    return config


def config_of(file: Path, model: QuantizedModel, serving: Serving) -> Any:
    """The ModelConfig of an ONNX file with one input and one output, both with a free batch in front."""
    graph = onnx.load(file, load_external_data=False).graph
    config = protocol.ModelConfig(name=serving.name, backend=serving.backend, max_batch_size=serving.max_batch)
    for values, described in ((graph.input, config.input), (graph.output, config.output)):
        for value in values:
            tensor = value.type.tensor_type
            dims = [axis.dim_value for axis in tensor.shape.dim[1:]]
            described.add(name=value.name, data_type=protocol.DataType.Value(TYPES[tensor.elem_type]), dims=dims)
    if model.labels:
        config.output[0].label_filename = LABELS
    group = config.instance_group.add(count=serving.instances)
    group.kind = protocol.ModelInstanceGroup.Kind.Value(DEVICES[serving.device])
    _put_batching(config, model, serving)
    parameters = {"preprocessing": json.dumps(asdict(model.preprocessing)), "onnx_file": MODEL}
    if serving.threads is not None:
        parameters["intra_op_thread_count"] = str(serving.threads)
    for name, text in parameters.items():
        config.parameters[name].string_value = text
    for batch in sorted({1, *serving.preferred, serving.max_batch}):
        warmup = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch)
        sample = warmup.inputs[config.input[0].name]
        sample.data_type, sample.random_data = config.input[0].data_type, True
        sample.dims.extend(config.input[0].dims)
    return config


def _put_batching(config: Any, model: QuantizedModel, serving: Serving) -> None:
    """Have the server run requests together, where that leaves their answers as they are."""
    activation = model.scheme.activation
    if activation is not None and activation.strategy == "per-tensor-dynamic":
        return
    config.dynamic_batching.SetInParent()
    config.dynamic_batching.preferred_batch_size.extend(serving.preferred)
    config.dynamic_batching.max_queue_delay_microseconds = serving.queue_delay


def preferred_batches(report: dict[str, Any], flavor: str, scheme: str, max_batch: int) -> tuple[int, ...]:
    """Batch sizes above 1 whose throughput is within 5 % of the best one's, of a bench (schema marrq.bench/2) of that flavour and scheme.
    Raises MarrqError where the bench holds no such model."""
    rows = [model["latency"] for model in report["models"] if (model["flavor"], model["scheme"]) in ((flavor, scheme), (flavor, flavor))]
    if not rows:
        had = ", ".join(f"{model['scheme']} {model['flavor']}" for model in report["models"])
        raise MarrqError(f"the bench holds no {scheme} as {flavor}, but {had}: give the bench of this artifact and flavor")
    speeds = {row["batch"]: row["images_per_s"] for row in rows[0] if row["batch"] <= max_batch}
    return tuple(batch for batch, speed in sorted(speeds.items()) if batch > 1 and speed >= NEAR_BEST * max(speeds.values()))


def _check_clients(folder: Path, config: Any, force: bool) -> None:
    """Raise MarrqError when other versions are there under a config that is not this one."""
    if force or not (folder / CONFIG).is_file():
        return
    there = protocol.ModelConfig()
    try:
        text_format.Parse((folder / CONFIG).read_text(encoding="utf-8"), there)
    except text_format.ParseError as error:
        raise MarrqError(f"{str(folder / CONFIG)!r} is no config of Triton ({error}): mend it, or pass --force to replace it") from error
    if there != config:
        different = [field.name for field in config.DESCRIPTOR.fields if getattr(there, field.name) != getattr(config, field.name)]
        raise MarrqError(
            f"{str(folder)!r} serves other versions under a config with another {', '.join(different)}: choose another --name, or pass "
            "--force to replace the config for all of them"
        )


def _card(model: QuantizedModel, flavor: str, config: Any, serving: Serving) -> str:
    """What a client has to do, as a page."""
    terms = model.preprocessing
    channels, height, width = terms.input_size
    resized = f"{int(height / terms.crop_pct)} × {int(width / terms.crop_pct)}"
    ways = {
        "center": f"resize the shorter side to that of {resized}, and cut {height} × {width} out of the middle",
        "squash": f"resize to {resized}, and cut {height} × {width} out of the middle",
        "border": f"resize the longer side to that of {resized}, and fill up to {height} × {width} with the mean",
    }
    normalize = f"(x / 255 - mean) / std with mean {list(terms.mean)} and std {list(terms.std)} per channel, channels first"
    sends = "send its pixels as they are, rows first: the model normalizes them" if serving.preprocess else f"send {normalize}"
    rows = [
        (
            direction,
            f"`{tensor.name}`, {protocol.DataType.Name(tensor.data_type)[5:]} {list(tensor.dims)}, up to {serving.max_batch} at once",
        )
        for direction, tensor in (("input", config.input[0]), ("output", config.output[0]))
    ]
    table = "\n".join(f"| {heading} | {text} |" for heading, text in rows)
    quantized = f"quantized to {model.scheme.description} by {model.method.name}, as `{flavor}`"
    what = f"not quantized, as `{flavor}`" if flavor in BASELINES else quantized
    classes = f"\nClass i is line i + 1 of `{LABELS}`; ask for `class_count` to get classes by name.\n" if model.labels else ""
    return f"""# {serving.name}

{model.source.name}, {what}. Made by marrq {__version__}.

| | |
|---|---|
{table}
{classes}
Of an image in {"grey" if channels == 1 else "RGB"}: {ways[terms.crop_mode]} (Pillow, {terms.interpolation}), then {sends}.
The same, for programs, is in the config's parameter `preprocessing`. Serve with

    tritonserver --model-repository FOLDER_ABOVE_THIS_ONE
"""
