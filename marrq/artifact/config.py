"""The records of an artifact as JSON, and back.

config.json has the source of the model, preprocessing, labels, scheme, method, calibration and
package versions; quantization.json has one report for each quantized linear. A dataclass becomes an
object with the names of its fields as keys. Two keys differ from the fields: the format calls first
and last layers edges.
"""

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, cast

from marrq.artifact.scheme import SCHEME_KEYS, scheme_from_json
from marrq.methods.alpha_spec import PID, AlphaSpec
from marrq.methods.lowrank_spec import LowRankSpec
from marrq.methods.problem import SearchStep
from marrq.methods.refinement_spec import RefinementSpec
from marrq.methods.setting import COUNT, NUMBER
from marrq.methods.spec import MethodSpec
from marrq.models.load import VisionModel
from marrq.quantized_model import (
    CalibrationRecord,
    ModuleReport,
    QuantizationSettings,
    QuantizedModel,
    RefinementRecord,
)

PACKAGES = ("marrq", "torch", "timm", "transformers")
"""Packages whose version the codes may depend on."""
REPORT_KEYS = {"is_outer": "edge"}
"""Keys of a report that differ from the name of the field."""


def description(
    model: QuantizedModel | VisionModel, settings: QuantizationSettings
) -> dict[str, Any]:
    """Everything that an artifact is a function of, as config.json has it."""
    fields = {
        "model": asdict(model.source),
        "preprocessing": asdict(model.preprocessing),
        "labels": list(model.labels),
        "scheme": _renamed(asdict(settings.scheme), SCHEME_KEYS),
        "method": asdict(settings.method),
        "calibration": asdict(settings.calibration),
        "widths": dict(settings.widths),
        # Another version may build another architecture or compute other codes.
        "versions": {name: version(name) for name in PACKAGES},
    }
    # Through JSON and back, so that it can be compared with a description that was read: JSON has
    # lists in place of tuples.
    return cast(dict[str, Any], json.loads(json.dumps(fields)))


def settings_from_json(config: dict[str, Any]) -> QuantizationSettings:
    """The settings that a config.json has. Raises KeyError, TypeError or MarrqError for a config
    that is damaged."""
    return QuantizationSettings(
        scheme_from_json(config["scheme"]),
        _method(config["method"]),
        CalibrationRecord(**config["calibration"]),
        _widths(config["widths"]),
    )


def _widths(fields: Any) -> dict[str, int]:
    """The bits of each linear of a mixed scheme; the settings check the numbers."""
    if not isinstance(fields, dict):
        raise TypeError(f"widths are no table of bits by path: {fields!r}")
    return dict(fields)


def _method(fields: dict[str, Any]) -> MethodSpec:
    alpha, lowrank = fields["alpha"], fields["lowrank"]
    refinement = RefinementSpec(**fields["refinement"])
    search = {**alpha, "grid": tuple(alpha["grid"]), "pid": PID(**alpha["pid"])}
    # JSON has lists in place of tuples and tables in place of dataclasses. The dataclasses check
    # their fields, so that a hostile value ends here.
    branch = None if lowrank is None else LowRankSpec(**lowrank)
    read = {"alpha": AlphaSpec(**search), "lowrank": branch, "refinement": refinement}
    return MethodSpec(**{**fields, **read})


def refinement_to_json(record: RefinementRecord | None) -> dict[str, Any] | None:
    """The record of a refinement as config.json has it."""
    return None if record is None else asdict(record)


def refinement_from_json(fields: Any, method: MethodSpec) -> RefinementRecord | None:
    """The inverse of `refinement_to_json`. Raises ValueError or TypeError for a damaged record, and
    for one that does not agree with the method."""
    if (fields is not None) != method.refinement.on:
        raise ValueError("its method and its refinement do not agree")
    if fields is None:
        return None
    record = RefinementRecord(**fields)
    counts = (record.images, record.held_out, record.steps)
    losses = (record.loss_before, record.loss_after)
    moved = record.moved_codes
    if not (
        all(map(COUNT.allows, counts))
        and (moved == 0 or COUNT.allows(moved))
        and all(map(NUMBER.allows, losses))
        and isinstance(record.files_sha256, str)
    ):
        raise ValueError("its refinement has other values than counts, losses and a hash")
    return record


def labels_from_json(labels: Any) -> tuple[str, ...]:
    """The names of the classes. Raises ValueError for a label that is no text."""
    for label in labels:
        if not isinstance(label, str):
            raise ValueError(f"label {label!r} is no text")
    return tuple(labels)


def report_to_json(report: ModuleReport) -> dict[str, Any]:
    """A report as quantization.json has it."""
    return _renamed(asdict(report), REPORT_KEYS)


def _renamed(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The fields in the same order, some under other names."""
    return {names.get(name, name): value for name, value in fields.items()}


def report_from_json(fields: dict[str, Any]) -> ModuleReport:
    """The inverse of `report_to_json`. Raises KeyError or TypeError for a damaged report."""
    # A key that is no field raises TypeError in the constructor: nothing is skipped silently.
    renamed = _renamed(fields, {key: name for name, key in REPORT_KEYS.items()})
    steps = tuple(SearchStep(**step) for step in fields["trajectory"])
    return ModuleReport(**{**renamed, "trajectory": steps})
