"""The bench's report as one page for people: what a model costs, what it gains, and all that this
rests on, in the order in which a reader decides.

The page is a single file that fetches nothing and runs no script. Its own security policy forbids
both, so that a name out of a file could do no harm even if it were not escaped. The layout is
runtime/report/report.html.jinja; a part that the report lacks has no section there. Nothing is
measured here, and the JSON (schema marrq.bench/2) stands whole at the end of the page.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from runtime.audit.rows import AuditRow
from runtime.errors import BenchError
from runtime.measure.bench import BenchReport
from runtime.measure.measured import MeasuredModel, reference_of
from runtime.quantization import QuantizedModule
from runtime.report.answers import lost
from runtime.report.figures import (
    accuracy_figure,
    alpha_figure,
    drop_figure,
    error_figure,
    latency_figure,
    ratio_figure,
    search_figure,
    size_figure,
)
from runtime.report.headline import (
    key_numbers,
    meaning_of,
    measure_of,
    number,
    percent,
    scored,
    sentence,
    top1,
    top5,
)

SUFFIX = ".html"
TEMPLATE = "report.html.jinja"

Models = Sequence[MeasuredModel]


@dataclass(frozen=True)
class AuditGroup:
    """Linears of a model whose rows differ in nothing but the linear. row: of the first of them."""

    model: MeasuredModel
    row: AuditRow
    linears: tuple[str, ...]


@dataclass(frozen=True)
class QuantizationSection:
    """How an artifact was quantized.

    names: of all its files that were measured.
    errors, alphas, searches: figures; None if the method has no search.
    """

    names: tuple[str, ...]
    modules: tuple[QuantizedModule, ...]
    errors: str
    alphas: str | None
    searches: str | None


def check_page(file: Path) -> None:
    """Raise BenchError if a page could not be written to the file: for its suffix, or if a package
    is missing."""
    if file.suffix != SUFFIX:
        raise BenchError(
            f"a page is written as {SUFFIX}: got the suffix '{file.suffix}' in '{file}'"
        )
    if missing := [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]:
        raise BenchError(f"pages need {' and '.join(missing)}: pip install '.[plots]' in the clone")


def page(report: BenchReport) -> str:
    """The report as an HTML document. Needs jinja2 and matplotlib: see check_page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names come from files
        undefined=StrictUndefined,  # a misspelled field is an error, not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "lost": lost,
        "percent": percent,
        "scientific": scientific,
        "scored": scored,
        "top1": top1,
        "top5": top5,
    }
    models, reference = report.models, reference_of(report.models)
    images = f"{report.data.images:,} images of {report.data.path}"
    # Models with a baseline: the others cannot lose anything.
    paired = [model for model in models if model.against is not None]
    # Times are told as multiples of the baseline that was measured, if one was.
    ratio = "" if reference is None else f" (×\N{NO-BREAK SPACE}{reference.flavor})"
    # Without a gate no candidate has a verdict.
    verdicts = report.gate.models if report.gate is not None else ()
    document = report.to_json()
    return environment.get_template(TEMPLATE).render(
        report=report,
        described=described,
        environment=document["environment"],
        data=document["data"],
        schema=document["schema"],
        reference=reference,
        title=models[0].path if reference is None else reference.path,
        headlines=[
            (model, sentence(model, reference), key_numbers(model, reference))
            for model in models
            if model.is_candidate
        ],
        gates={
            model.name: [verdict for verdict in verdicts if verdict.name == model.name]
            for model in models
        },
        measure=measure_of(models),
        meaning=meaning_of(models, images),
        paired=paired,
        figures=_figures(report, paired, reference),
        images=images,
        batch_headings=[f"batch {row.batch} ms{ratio}" for row in models[0].latency],
        parities=[
            (model, _parity_figure(slot, model))
            for slot, model in enumerate(models)
            if model.parity is not None
        ],
        audits=grouped(models),
        quantizations=_quantizations(models),
        document=json.dumps(document, indent=2, ensure_ascii=False),
    )


def scientific(value: float) -> str:
    """Three digits and a power of ten."""
    return f"{value:.2e}"


def described(value: object) -> str:
    """A value of the environment in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)


def grouped(models: Models) -> list[AuditGroup]:
    """Linears that run alike in one model, as one group; groups with a reason first."""
    groups: dict[tuple[str, AuditRow], list[AuditRow]] = {}
    models_by_name = {model.name: model for model in models}
    for model in models:
        for row in model.audit:
            # What the table shows: not the linear, the scheme, or how often the operator runs.
            way = replace(row, linear="", nominal="", operators=0)
            groups.setdefault((model.name, way), []).append(row)
    found = [
        AuditGroup(models_by_name[name], rows[0], tuple(row.linear for row in rows))
        for (name, _), rows in groups.items()
    ]
    # A sort keeps the order of groups that are alike: exceptions come first, then models.
    return sorted(found, key=lambda group: group.row.reason is None)


def _figures(
    report: BenchReport, paired: list[MeasuredModel], reference: MeasuredModel | None
) -> dict[str, str | None]:
    """The figures of the page, by name. paired: models with a baseline to be compared with."""
    # The limit is drawn into the figure of the drops.
    max_drop = None if report.gate is None else report.gate.max_drop
    any_score = any(model.score is not None for model in report.models)
    return {
        "accuracy": accuracy_figure(report.models) if any_score else None,
        "drop": drop_figure(paired, max_drop) if paired else None,
        "latency": latency_figure(report.models),
        "ratio": ratio_figure(report.models, reference.flavor) if reference else None,
        "size": size_figure(report.models),
    }


def _parity_figure(slot: int, model: MeasuredModel) -> str | None:
    if model.parity is None or not model.parity.linears:
        return None
    errors = [(row.linear, row.relative_error) for row in model.parity.linears]
    return error_figure(f"parity-{slot}", errors)


def _quantizations(models: Models) -> list[QuantizationSection]:
    """How each artifact was quantized. Several files may come from one artifact."""
    found: list[QuantizationSection] = []
    for model in models:
        # Files without an artifact do not tell how they were quantized.
        modules = model.quantization
        if not modules:
            continue
        same = next((slot for slot, one in enumerate(found) if one.modules == modules), None)
        if same is None:
            found.append(_quantization_section(str(len(found)), model.name, modules))
        else:
            found[same] = replace(found[same], names=(*found[same].names, model.name))
    return found


def _quantization_section(
    suffix: str, name: str, modules: tuple[QuantizedModule, ...]
) -> QuantizationSection:
    """suffix: of the names of its figures, which keeps ids of two sections apart."""
    searched = any(module.trajectory for module in modules)
    errors = [(module.path, module.relative_error) for module in modules]
    return QuantizationSection(
        names=(name,),
        modules=modules,
        errors=error_figure(f"errors-{suffix}", errors),
        alphas=alpha_figure(f"alphas-{suffix}", modules) if searched else None,
        searches=search_figure(f"searches-{suffix}", modules) if searched else None,
    )
