"""A model repository for Triton Inference Server: an artifact's ONNX file, and what the server has
to be told about it.

    REPOSITORY/NAME/config.pbtxt            the server's ModelConfig, written from the protobuf that tritonclient ships
    REPOSITORY/NAME/labels.txt              a class a line, for answers by name; not for feature extractors
    REPOSITORY/NAME/VERSION/model.onnx      model.onnx.data beside it above 2 GB, model.py for the python backend
    REPOSITORY/NAME/VERSION/README.md       what a client has to send, and what it gets

Input and output are read from the file itself. The onnxruntime backend passes no session keys, so
whatever matters is in the graph, as in every file that marrq writes; graph optimization is left at
the backend's default, which is all of it. The server runs the smallest, the preferred and the
largest batch once before it serves: ONNX Runtime allocates in its first run.

A new version is put in its place in one step, beside those that are served, so that a server which
watches the repository finds it whole, and nothing else is touched, for which it would load the
others again. It is made outside the repository, whose folders a server takes for models. All
versions of a model share its config and labels: a version that needs others is refused.

The images of different clients are run together: in no scheme does an image change the numbers of
those beside it."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from exporters.onnx_file import BASELINES, Export
from marrq import __version__
from marrq.errors import MarrqError
from marrq.quantized_model import QuantizedModel

try:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as protocol
except ImportError as error:
    raise MarrqError(
        "a Triton repository is written by tritonclient's protobuf, which is not installed: pip "
        "install 'marrq[serve]'"
    ) from error

CONFIG, LABELS, CARD, MODEL = "config.pbtxt", "labels.txt", "README.md", "model.onnx"
BACKEND_FILES = {"onnxruntime": None, "python": Path(__file__).with_name("python_backend.py")}
"""Backends, and the model.py that one needs beside the ONNX file."""

DEVICES = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}
CPU_FLAVORS = ("integer",)
"""Flavours whose kernels only ONNX Runtime's CPU provider has."""

TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.UINT8: "TYPE_UINT8"}
NAME = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")
FREE = -1
"""How a server writes an axis of any length."""

NEAR_BEST = 0.95
"""Share of the best throughput from which on a batch size is preferred."""


@dataclass(frozen=True)
class Serving:
    """What the user chooses about the server.

    name: of the model; model_version: a server takes the highest; backend: a key of BACKEND_FILES;
    device: a key of DEVICES; instances: copies of the model that run at once, on each GPU; threads:
    of one operator, None for one a core; max_batch: images in a run; preferred: batch sizes that
    the server waits for where requests queue; queue_delay: microseconds that a request may wait for
    others; preprocess: take uint8 images in place of normalized pixels."""

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
            raise MarrqError(
                "a model's name is part of its address: letters, digits and '_', single '.' and "
                f"'-' between: got {self.name!r}"
            )
        if self.backend not in BACKEND_FILES:
            raise MarrqError(
                f"unknown backend {self.backend!r}: choose one of {', '.join(BACKEND_FILES)}"
            )
        if self.device not in DEVICES:
            raise MarrqError(f"unknown device {self.device!r}: choose one of {', '.join(DEVICES)}")


def write_repository(
    export: Export,
    repository: Path,
    serving: Serving,
    force: bool = False,
) -> Path:
    """Add a version of a model to a repository, which is made where there is none, and return the
    model's folder. force: replace the version, and settings of the config that
    clients do not see. Raises MarrqError for what the device, the scheme or the
    file system do not allow, and for what is there already."""
    folder = repository / serving.name
    version = folder / str(serving.model_version)
    _check_serving(export.flavor, serving)
    if version.exists() and not force:
        raise MarrqError(
            f"{str(version)!r} exists: pass another --model-version, or --force to replace it"
        )
    with tempfile.TemporaryDirectory(dir=_beside(repository), prefix=".marrq.") as temporary:
        made = Path(temporary) / serving.name
        _write_folder(made, export, serving)
        repository.mkdir(exist_ok=True)
        if folder.exists():
            _put_version(made, folder, version.name, force)
        else:
            made.rename(folder)
    return folder


def _check_serving(flavor: str, serving: Serving) -> None:
    """Raise MarrqError for a device without kernels for the flavour."""
    if serving.device == "gpu" and flavor in CPU_FLAVORS:
        raise MarrqError(
            f"the kernels of {flavor} are of ONNX Runtime's CPU provider: use --device cpu, or "
            "another flavor"
        )


def _beside(repository: Path) -> Path:
    """A folder that no server looks at, from which a model can be moved into the repository in one
    step."""
    parent = repository.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK) or (
        repository.exists() and repository.stat().st_dev != parent.stat().st_dev
    ):
        raise MarrqError(
            f"a model is made in {str(parent)!r} and moved to {str(repository)!r} in one step, but "
            "the first is not writable or on another "
            "file system: export to another repository, and copy the model's folder"
        )
    return parent


def _put_version(made: Path, folder: Path, version: str, force: bool) -> None:
    """Move a version to where others are, or in the place of one; it is there again when something
    fails."""
    others = sorted(
        place.name for place in folder.iterdir() if place.name.isdecimal() and place.name != version
    )
    if others:
        _check_clients(made, folder, others, force)
    there, replaced = folder / version, made.with_name("replaced")
    if there.exists():
        there.rename(replaced)
    try:
        (made / version).rename(there)
    except BaseException:
        if replaced.exists():
            replaced.rename(there)
        raise
    for name in (LABELS, CONFIG):
        if (made / name).exists() and _content(made / name) != _content(folder / name):
            (made / name).replace(folder / name)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _write_folder(
    made: Path,
    export: Export,
    serving: Serving,
) -> None:
    """A model's folder with one version."""
    model = export.model
    place = made / str(serving.model_version)
    export.write(place / MODEL, serving.preprocess)
    script = BACKEND_FILES[serving.backend]
    if script is not None:
        shutil.copyfile(script, place / "model.py")
    config = config_of(place / MODEL, model, serving)
    (made / CONFIG).write_text(text_format.MessageToString(config), encoding="utf-8")
    (place / CARD).write_text(_card(model, export.flavor, config, serving), encoding="utf-8")
    if model.labels:
        (made / LABELS).write_text(
            "".join(f"{label}\n" for label in model.labels), encoding="utf-8"
        )


def config_of(file: Path, model: QuantizedModel, serving: Serving) -> Any:
    """The ModelConfig of an ONNX file with one input and one output, both with a free batch in
    front."""
    graph = onnx.load(file, load_external_data=False).graph
    config = protocol.ModelConfig(
        name=serving.name, backend=serving.backend, max_batch_size=serving.max_batch
    )
    for values, described in ((graph.input, config.input), (graph.output, config.output)):
        for value in values:
            tensor = value.type.tensor_type
            dims = [axis.dim_value or FREE for axis in tensor.shape.dim[1:]]
            described.add(
                name=value.name,
                data_type=protocol.DataType.Value(TYPES[tensor.elem_type]),
                dims=dims,
            )
    if model.labels:
        config.output[0].label_filename = LABELS
    group = config.instance_group.add(count=serving.instances)
    group.kind = protocol.ModelInstanceGroup.Kind.Value(DEVICES[serving.device])
    config.dynamic_batching.preferred_batch_size.extend(serving.preferred)
    config.dynamic_batching.max_queue_delay_microseconds = serving.queue_delay
    config.dynamic_batching.SetInParent()  # requests are run together, with both left at 0 too
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


def preferred_batches(
    report: dict[str, Any], flavor: str, scheme: str, max_batch: int
) -> tuple[int, ...]:
    """Batch sizes above 1 whose throughput is within 5 % of the best one's, of a bench (schema
    marrq.bench/2) of that flavour and scheme. Raises MarrqError where the bench does not hold
    exactly one such model, or no batch size that fits."""
    scheme = flavor if flavor in BASELINES else scheme
    found = [
        model["latency"]
        for model in report["models"]
        if (model["flavor"], model["scheme"]) == (flavor, scheme)
    ]
    if len(found) != 1:
        had = ", ".join(f"{model['scheme']} {model['flavor']}" for model in report["models"])
        raise MarrqError(
            f"the bench holds {len(found)} of {scheme} {flavor}, among {had}: give a bench of this "
            "artifact and flavor alone"
        )
    speeds = {row["batch"]: row["images_per_s"] for row in found[0] if row["batch"] <= max_batch}
    if not speeds:
        raise MarrqError(
            f"the bench has no batch size up to {max_batch}: pass a larger --max-batch"
        )
    return tuple(
        batch
        for batch, speed in sorted(speeds.items())
        if batch > 1 and speed >= NEAR_BEST * max(speeds.values())
    )


def _check_clients(made: Path, folder: Path, others: list[str], force: bool) -> None:
    """Raise MarrqError when other versions are there whose config or labels are not those made:
    always where clients would see it."""
    new, old = _read_config(made / CONFIG), _read_config(folder / CONFIG)
    different = [
        field.name
        for field in new.DESCRIPTOR.fields
        if getattr(new, field.name) != getattr(old, field.name)
    ]
    different += ["labels"] if _content(made / LABELS) != _content(folder / LABELS) else []
    seen = not {"input", "output", "labels"}.isdisjoint(different)
    if different and (seen or not force):
        way = "" if seen else ", or pass --force to replace it for all of them"
        raise MarrqError(
            f"{str(folder)!r} has {'versions' if len(others) > 1 else 'version'} "
            f"{', '.join(others)} under a config with another "
            f"{', '.join(different)}: choose another --name{way}"
        )


def _read_config(file: Path) -> Any:
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), protocol.ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        raise MarrqError(
            f"{str(file)!r} is no config of Triton ({error}): mend it, or remove the model's folder"
        ) from error


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
    sends = (
        "send its pixels as they are, rows first: the model normalizes them"
        if serving.preprocess
        else f"send {normalize}"
    )
    rows = [
        (
            direction,
            f"`{tensor.name}`, {protocol.DataType.Name(tensor.data_type)[5:]} {list(tensor.dims)}, "
            f"up to {serving.max_batch} at once",
        )
        for direction, tensor in (("input", config.input[0]), ("output", config.output[0]))
    ]
    table = "\n".join(f"| {heading} | {text} |" for heading, text in rows)
    quantized = f"quantized to {model.scheme.description} by {model.method.name}, as `{flavor}`"
    what = f"not quantized, as `{flavor}`" if flavor in BASELINES else quantized
    classes = (
        f"\nClass i is line i + 1 of `../{LABELS}`; ask for `class_count` to get classes by name.\n"
        if model.labels
        else ""
    )
    return f"""# {serving.name}

{model.source.name}, {what}. Made by marrq {__version__}.

| | |
|---|---|
{table}
{classes}
Of an image in {"grey" if channels == 1 else "RGB"}: {ways[terms.crop_mode]} (Pillow, {terms.interpolation}), then {sends}.
The same, for programs, is in the config's parameter `preprocessing`. Serve the repository that holds the folder `{serving.name}` with

    tritonserver --model-repository REPOSITORY
"""
