"""The artifact: a quantized model as a folder. The README describes the format; a test pins it to
literal bytes.

    config.json          everything needed to rebuild and to repeat: source, preprocessing, labels, scheme, method, calibration, versions
    model.safetensors    per linear, as far as it has them, weight_packed, weight_scale, weight_zero_point, weight_shape, bias, input_scale,
                         input_zero_point, input_clip, input_smoothing, lowrank_left, lowrank_right and their scales;
                         every other tensor of the model in floating point, under its own name
    quantization.json    per linear how it was quantized: alpha, J, the search's steps, damping, clipped share, whether at an edge
    README.md            a model card

All of it is a function of model, images, settings and versions. Saving is atomic: the folder is
written beside its place, flushed and renamed, so it is complete or absent. Loading refuses what is
damaged (hash of the tensors), of another version, or what a stranger put there to do harm
(marrq/artifact/validate.py). No pickle is ever read."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marrq.artifact.validate import (
    check_architecture,
    check_fit,
    check_linear,
    check_preprocessing,
    read_json,
    real_file,
)
from marrq.errors import MarrqError
from marrq.methods.problem import SearchStep
from marrq.methods.spec import PID, AlphaSpec, LowRankSpec, MethodSpec
from marrq.models.first_last import put_patches
from marrq.models.load import ModelSource, VisionModel, build
from marrq.models.preprocessing import Preprocessing
from marrq.quantized_model import (
    CalibrationRecord,
    ModuleReport,
    QuantizationSettings,
    QuantizedModel,
)
from marrq.quantizers.activations import ActivationQuantizer
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import (
    LowRank,
    QuantizedWeight,
    QuantLinear,
    StoredFactor,
    quantized_linears,
)
from marrq.quantizers.packing import pack, unpack
from marrq.schemes import ActivationSpec, Scheme, WeightSpec

FORMAT = "marrq.artifact"
FORMAT_VERSION = 6
"""The only one that is read: another marrq may have meant other numbers by the same names."""

PACKED = ".weight_packed"

OPTIONAL = ("bias", "lowrank_left", "lowrank_right", "lowrank_left_scale", "lowrank_right_scale")
CONFIG, TENSORS, REPORTS, CARD = (
    "config.json",
    "model.safetensors",
    "quantization.json",
    "README.md",
)


def save(model: QuantizedModel, folder: Path, overwrite: bool = False) -> None:
    """Write the artifact. Raises MarrqError when the folder exists and `overwrite` is off."""
    check_output(folder, overwrite)
    stage, replaced = (
        folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "replaced")
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear(stage, replaced, folder)  # of a process that was killed
        _write(model, stage)
        if folder.exists():
            folder.rename(replaced)
        stage.rename(folder)
        flush(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MarrqError(
            f"cannot write artifact {str(folder)!r}: {reason}; make room, or choose another place"
        ) from error
    finally:
        _clear(stage, replaced, folder)


def _clear(stage: Path, replaced: Path, folder: Path) -> None:
    """Remove what was not finished, and what has been replaced; what has not, goes back to its
    place."""
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for path in (stage, replaced):
        shutil.rmtree(path, ignore_errors=True)


def _write(model: QuantizedModel, place: Path) -> None:
    """All files of the artifact, durably; config.json, by which an artifact is known, comes
    last."""
    place.mkdir()
    save_file(tensors_of(model.module), place / TENSORS)
    (place / REPORTS).write_text(
        json.dumps([asdict(report) for report in model.reports], indent=2) + "\n"
    )
    (place / CARD).write_text(_card(model))
    (place / TENSORS).chmod(
        (place / CARD).stat().st_mode
    )  # safetensors makes it private, whatever the umask
    (place / CONFIG).write_text(
        json.dumps(_config(model, _sha256(place / TENSORS)), indent=2) + "\n"
    )
    for path in (*place.iterdir(), place):
        flush(path)


def load(folder: Path) -> QuantizedModel:
    """The quantized model of an artifact, on the CPU. Raises MarrqError when it is missing,
    damaged, of another version, or has what no artifact has (marrq/artifact/validate.py)."""
    config = read_config(folder)
    try:
        reports = tuple(report_of(fields) for fields in read_json(folder, REPORTS))
        source = ModelSource(**config["model"])
        check_architecture(source.library, source.architecture)
        scheme, method = _scheme(config["scheme"]), _method(config["method"])
        edges = {report.path for report in reports if report.edge}
        tensors = load_file(real_file(folder, TENSORS))
        linears = {
            path: check_linear(parts, _spec_of(path, scheme, edges))
            for path, parts in _linears_in(tensors).items()
        }
        inside = tuple(path + "." for path in linears)
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in tensors.items()
            if not name.startswith(inside)
        }
        preprocessing = Preprocessing.from_json(config["preprocessing"])
        check_preprocessing(preprocessing)
        check_fit(lambda: build(source), shapes, linears, preprocessing.input_size)
        module = restore(build(source), tensors, scheme, edges)
        calibration, labels = (
            CalibrationRecord(**config["calibration"]),
            tuple(map(_text, config["labels"])),
        )
    except Exception as error:  # the libraries raise a dozen kinds for an architecture that is none
        reason = str(error).strip().splitlines()
        raise MarrqError(
            f"artifact {str(folder)!r} is damaged ({reason[0] if reason else error!r}): quantize "
            "the model again"
        ) from error
    return QuantizedModel(
        module, source, preprocessing, labels, scheme, method, calibration, reports
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The artifact's config.json, after checking version and tensor hash."""
    if not (folder / CONFIG).is_file():
        raise MarrqError(
            f"{str(folder)!r} is no artifact, it has no {CONFIG}: give a folder that `marrq "
            "quantize` wrote"
        )
    try:
        config: dict[str, Any] = read_json(folder, CONFIG)
        kind, number, expected = (
            config["format"],
            config["format_version"],
            config["tensors_sha256"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MarrqError(
            f"artifact {str(folder)!r} is damaged (its {CONFIG} cannot be read): quantize the "
            "model again"
        ) from error
    if kind != FORMAT or not isinstance(number, int):
        raise MarrqError(
            f"{str(folder)!r} is no marrq artifact: give a folder that `marrq quantize` wrote"
        )
    if number != FORMAT_VERSION:
        advice = "upgrade marrq" if number > FORMAT_VERSION else "quantize the model again"
        raise MarrqError(
            f"artifact {str(folder)!r} has format version {number}, this marrq reads "
            f"{FORMAT_VERSION}: {advice}"
        )
    try:
        intact = _sha256(real_file(folder, TENSORS)) == expected
    except ValueError:
        intact = False
    if not intact:
        raise MarrqError(
            f"artifact {str(folder)!r} is damaged ({TENSORS} is missing or not what was saved): "
            "quantize the model again"
        )
    return config


def is_artifact(folder: Path) -> bool:
    """Whether the folder says that it is an artifact; it may still be damaged."""
    config = folder / CONFIG
    return config.is_file() and f'"{FORMAT}"' in config.read_text(errors="replace")


def artifact_hash(folder: Path) -> str:
    """The identity of an artifact: the hash of its config.json, which holds the hash of its
    tensors."""
    return _sha256(folder / CONFIG)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise MarrqError when the output is there already and may not be replaced."""
    if path.exists() and not overwrite:
        raise MarrqError(
            f"output {str(path)!r} exists: choose another, or pass --force to replace it"
        )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a quantized model as the artifact stores them."""
    linears = quantized_linears(module)
    inside = tuple(path + "." for path in linears)
    tensors = {
        name: tensor.cpu().contiguous()
        for name, tensor in module.state_dict().items()
        if not name.startswith(inside)
    }
    for path, linear in linears.items():
        tensors |= {
            f"{path}.{name}": tensor.cpu().contiguous()
            for name, tensor in _linear_tensors(linear).items()
        }
    return tensors


def _linear_tensors(linear: QuantLinear) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": pack(linear.codes, linear.spec.num_bits),
        "weight_scale": linear.scale.to(torch.float8_e8m0fnu)
        if linear.spec.grid == "mxint"
        else linear.scale,
        "weight_shape": torch.tensor(linear.codes.shape),
    }
    if linear.spec.grid == "asymmetric":
        tensors["weight_zero_point"] = linear.zero_point
    tensors |= {name: tensor for name in OPTIONAL if (tensor := getattr(linear, name)) is not None}
    if linear.input is not None and linear.input.spec.is_static:
        tensors["input_scale"] = (
            linear.input.scale.clone()
        )  # linears that share an input share its quantizer; a file shares nothing
        tensors["input_zero_point"] = linear.input.zero_point.to(torch.uint8)
    elif linear.input is not None:
        tensors["input_clip"] = linear.input.clip.clone()
    if linear.input is not None and linear.input.smoothing is not None:
        tensors["input_smoothing"] = linear.input.smoothing.clone()
    return tensors


def _linears_in(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of each quantized linear, by its path."""
    paths = {name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)}
    found: dict[str, dict[str, Tensor]] = {path: {} for path in sorted(paths)}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if path in paths:
            found[path][part] = tensor
    return found


def _spec_of(path: str, scheme: Scheme, edges: set[str]) -> WeightSpec:
    return scheme.of_edges.weight if path in edges else scheme.weight


def restore(
    module: nn.Module, tensors: dict[str, Tensor], scheme: Scheme, edges: set[str]
) -> nn.Module:
    """Put the quantized linears into an architecture without weights, and the float tensors around
    them. edges: paths of linears there."""
    linears = _linears_in(tensors)
    for path, parts in linears.items():
        parent, _, _ = path.rpartition(".")
        if isinstance(module.get_submodule(parent), nn.Conv2d):
            put_patches(module, parent)
        module.set_submodule(
            path, _restored_linear(parts, scheme.of_edges if path in edges else scheme)
        )
    around = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(tuple(path + "." for path in linears))
    }
    missing, unexpected = module.load_state_dict(around, strict=False)
    inside = tuple(path + "." for path in quantized_linears(module))
    missing = [name for name in missing if not name.startswith(inside)]
    if missing or unexpected:
        raise ValueError(f"tensor {(missing + unexpected)[0]!r} does not fit the model")
    return module.eval()


def _restored_linear(tensors: dict[str, Tensor], scheme: Scheme) -> QuantLinear:
    rows, columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"].float()
    lowrank = None
    if "lowrank_left" in tensors:
        left, right = (
            StoredFactor(tensors[f"lowrank_{side}"], tensors.get(f"lowrank_{side}_scale"))
            for side in ("left", "right")
        )
        lowrank = LowRank(left, right)
    weight = QuantizedWeight(
        scheme.weight,
        unpack(tensors["weight_packed"], scheme.weight.num_bits, (rows, columns)),
        scale,
        tensors.get("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8)),
    )
    return QuantLinear(
        weight,
        tensors.get("bias"),
        None if scheme.activation is None else _restored_quantizer(tensors, scheme.activation),
        lowrank,
    )


def _restored_quantizer(tensors: dict[str, Tensor], spec: ActivationSpec) -> ActivationQuantizer:
    static = (
        Grid(tensors["input_scale"], tensors["input_zero_point"].float(), *spec.code_range)
        if spec.is_static
        else None
    )
    return ActivationQuantizer(
        spec, static or tensors["input_clip"], tensors.get("input_smoothing")
    )


def description(
    model: QuantizedModel | VisionModel, settings: QuantizationSettings
) -> dict[str, Any]:
    """What an artifact is a function of, as its config.json has it."""
    packages = ("marrq", "torch", "timm", "transformers")
    fields = {
        "model": asdict(model.source),
        "preprocessing": asdict(model.preprocessing),
        "labels": list(model.labels),
        "scheme": asdict(settings.scheme),
        "method": asdict(settings.method),
        "calibration": asdict(settings.calibration),
        "versions": {name: version(name) for name in packages},
    }
    return cast(dict[str, Any], json.loads(json.dumps(fields)))


def _config(model: QuantizedModel, tensors_sha256: str) -> dict[str, Any]:
    about = description(
        model, QuantizationSettings(model.scheme, model.method, model.calibration)
    )
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **about,
        "tensors_sha256": tensors_sha256,
    }


def _scheme(fields: dict[str, Any]) -> Scheme:
    activation = fields["activation"]
    spec = None if activation is None else ActivationSpec(**activation)
    return Scheme(WeightSpec(**fields["weight"]), spec, fields["edges"])


def _method(fields: dict[str, Any]) -> MethodSpec:
    alpha, lowrank = fields["alpha"], fields["lowrank"]
    settings = {**alpha, "grid": tuple(alpha["grid"]), "pid": PID(**alpha["pid"])}
    return MethodSpec(
        **{
            **fields,
            "alpha": AlphaSpec(**settings),
            "lowrank": None if lowrank is None else LowRankSpec(**lowrank),
        }
    )


def report_of(fields: dict[str, Any]) -> ModuleReport:
    """A report from what JSON has of it."""
    return ModuleReport(
        **{**fields, "trajectory": tuple(SearchStep(**step) for step in fields["trajectory"])}
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"label {value!r} is no text")
    return value


def _card(model: QuantizedModel) -> str:
    edges = sum(report.edge for report in model.reports)
    at_edges = f", {edges} at the edges 8-bit ones" if edges else ""
    return f"""# {model.source.name}, {model.scheme.description}

Quantized by marrq with the method `{model.method.name}`, on {model.calibration.samples} images of
`{model.calibration.data}` (seed {model.calibration.seed}). {len(model.reports) - edges} linear layers have
{model.scheme.weight.num_bits}-bit weights{at_edges}. Everything else is in floating point.

    marrq export DIR --format onnx -o model.onnx
    marrq bench DIR --data IMAGES
"""


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
