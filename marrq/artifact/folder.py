"""The artifact: a quantized model as a folder.

    config.json          everything that is needed to rebuild the model and to repeat the run
    model.safetensors    the packed codes and all other tensors
    quantization.json    for each quantized linear how it was quantized
    README.md            a model card

README.md beside this file describes the format; tests/marrq/test_artifact.py pins it to literal
bytes. An artifact is a function of the model, the images, the settings and the package versions.

Saving is atomic: a reader sees the whole folder or none. Loading refuses a folder that is damaged
(by the hash of the tensors), of another format version, or made to do harm
(marrq/artifact/validate.py). No pickle is ever read.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from marrq.artifact.config import (
    description,
    labels_from_json,
    refinement_from_json,
    refinement_to_json,
    report_from_json,
    report_to_json,
    settings_from_json,
)
from marrq.artifact.tensors import (
    errors_of_writing,
    linears_in,
    outside,
    restore,
    save_tensors,
    tensors_of,
)
from marrq.artifact.validate import (
    check_architecture,
    check_fit,
    check_linear,
    check_preprocessing,
    check_widths,
    read_json,
    real_file,
)
from marrq.artifact.validate_ranges import check_ranges
from marrq.errors import MarrqError
from marrq.files import check_artifact, sha256, write_folder, write_json, write_text
from marrq.models.load import ModelSource, build
from marrq.models.named_outputs import check_names
from marrq.models.preprocessing import Preprocessing
from marrq.outputs import ARTIFACT_FILES, ARTIFACT_FORMAT, check_output, no_artifact
from marrq.outputs import is_artifact as is_artifact
from marrq.quantized_model import QuantizedModel

FORMAT = ARTIFACT_FORMAT
FORMAT_VERSION = 8
"""The only version that is read: in another version a name may mean other numbers."""

TENSORS, REPORTS, CARD, CONFIG = ARTIFACT_FILES


def save(model: QuantizedModel, folder: Path | str, overwrite: bool = False) -> None:
    """Write the artifact. Raises MarrqError if the folder exists and `overwrite` is off, if the
    folder is no artifact, and if it cannot be written; then what was there before is still there.
    """
    folder = Path(folder)
    if model.classes is not None:
        raise MarrqError(
            "classes are no part of an artifact: save the model that they were given to, and give "
            "the classes when it is exported or measured"
        )
    # Before anything is written, so that a mistake of the user costs no time.
    check_output(folder, overwrite, no_artifact)
    with errors_of_writing(f"artifact {str(folder)!r}", "make room, or choose another place"):
        write_folder(folder, lambda place: _write(model, place), ARTIFACT_FILES)


def _write(model: QuantizedModel, place: Path) -> None:
    """All files of the artifact."""
    # Codes and all other tensors in one file, so that one hash covers them.
    save_tensors(tensors_of(model.module), place / TENSORS)
    write_json(place / REPORTS, [report_to_json(report) for report in model.reports])
    write_text(place / CARD, _card(model))
    # An artifact is known by its config.json, which has the hash of the tensors: it comes last.
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **description(model, model.settings),
        "refinement": refinement_to_json(model.refinement),
        "tensors_sha256": sha256(place / TENSORS),
    }
    write_json(place / CONFIG, config)


def load(folder: Path | str) -> QuantizedModel:
    """The quantized model of an artifact, on the CPU. Raises MarrqError if the artifact is missing,
    damaged, of another version, or holds what no artifact holds (marrq/artifact/validate.py)."""
    folder = Path(folder)
    config = read_config(folder)
    try:
        return _checked_model(folder, config)
    # Every kind of error: timm and transformers raise a dozen kinds for an architecture that does
    # not exist.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise MarrqError(
            f"artifact {str(folder)!r} is damaged ({reason[0] if reason else error!r}): quantize "
            "the model again"
        ) from error


def _checked_model(folder: Path, config: dict[str, Any]) -> QuantizedModel:
    """The model of an artifact. Every part is checked before memory is taken for it."""
    # Small files first: a damaged report is found before any tensor is read.
    reports = tuple(report_from_json(fields) for fields in read_json(folder, REPORTS))
    source = ModelSource.from_json(config["model"])
    check_architecture(source.library, source.architecture)
    # A file of an older export need not name its outputs, an artifact must.
    check_names(source.outputs)
    settings = settings_from_json(config)
    scheme = settings.scheme
    # Which linears are outer ones is told by the reports; a wrong one leads to codes of another
    # width, which do not fit their bytes.
    outer = {report.path for report in reports if report.is_outer}
    tensors = load_file(real_file(folder, TENSORS))
    linears = linears_in(tensors)
    # Parts of a linear against each other, then all shapes against the architecture on the meta
    # device; only after both is the architecture built for good.
    linear_shapes = {}
    check_widths(settings.widths, linears.keys() - outer)
    schemes = {
        path: scheme.of_outer_layers if path in outer else settings.scheme_of(path)
        for path in linears
    }
    for path, parts in linears.items():
        linear_shapes[path] = check_linear(parts, schemes[path].weight)
        check_ranges(parts, schemes[path])
    shapes = {name: tuple(tensor.shape) for name, tensor in outside(tensors, linears).items()}
    preprocessing = Preprocessing.from_json(config["preprocessing"])
    check_preprocessing(preprocessing)
    check_fit(lambda: build(source), shapes, linear_shapes, preprocessing.input_size)
    return QuantizedModel(
        module=restore(build(source), tensors, schemes),
        source=source,
        preprocessing=preprocessing,
        labels=labels_from_json(config["labels"]),
        outputs=source.outputs,
        scheme=scheme,
        method=settings.method,
        calibration=settings.calibration,
        reports=reports,
        widths=settings.widths,
        refinement=refinement_from_json(config["refinement"], settings.method),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The artifact's config.json. Raises MarrqError if the folder is no artifact, of another format
    version, or if its tensors are not those that were saved."""
    check_artifact(folder)
    try:
        config: dict[str, Any] = read_json(folder, CONFIG)
        # Not only KeyError: a list in place of the table raises TypeError.
        kind, number = config["format"], config["format_version"]
        expected_sha256 = config["tensors_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise MarrqError(
            f"artifact {str(folder)!r} is damaged (its {CONFIG} cannot be read): quantize the "
            "model again"
        ) from error
    # Format before version: another program's config.json may have a version too.
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
    # The hash is taken last, since it reads the whole file.
    if not _has_tensors(folder, expected_sha256):
        raise MarrqError(
            f"artifact {str(folder)!r} is damaged ({TENSORS} is missing or not what was saved): "
            "quantize the model again"
        )
    return config


def _has_tensors(folder: Path, expected_sha256: object) -> bool:
    """Whether the folder has the tensors with this hash."""
    try:
        return sha256(real_file(folder, TENSORS)) == expected_sha256
    except ValueError:
        return False


def artifact_hash(folder: Path) -> str:
    """The identity of an artifact: the SHA-256 of its config.json, which has the hash of its
    tensors."""
    return sha256(folder / CONFIG)


def _card(model: QuantizedModel) -> str:
    """The README.md of the artifact."""
    outer = sum(report.is_outer for report in model.reports)
    outer_bits = f", the {outer} first and last layers 8-bit weights" if outer else ""
    calibration, widths = model.calibration, sorted(set(model.widths.values()))
    bits = " and ".join(map(str, widths)) if widths else str(model.scheme.weight.num_bits)
    return f"""# {model.source.name}, {model.scheme.description}

Quantized by marrq with the method `{model.method_name}`, on {calibration.samples} images of
`{calibration.data}` (seed {calibration.seed}). {len(model.reports) - outer} linear layers have
{bits}-bit weights{outer_bits}. Everything else is in floating point.

    marrq export DIR --format onnx -o model.onnx
    marrq bench DIR --data IMAGES
"""
