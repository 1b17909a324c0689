"""The bench's JSON (schema marrq.bench/2, made by runtime/measure/bench.py) as one page for people:
what it costs, what it gains, and all that this rests on, in the order in which a reader decides.

The page is a single file that fetches nothing and runs no script. Its own security policy forbids
both, so that a name out of a file could do no harm even if it were not escaped. The layout is
runtime/report/report.html.jinja; what the report lacks has no section there. Nothing is measured
here, and the JSON stands whole at the end of the page."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.errors import BenchError
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

SUFFIX = ".html"
TEMPLATE = "report.html.jinja"

Model = dict[str, Any]
"""An entry of `models` in the report."""


def check_page(file: Path) -> None:
    """Raise BenchError when a page could not be written to the file: its suffix, or a package that
    is missing."""
    if file.suffix != SUFFIX:
        raise BenchError(
            f"a page is written as {SUFFIX}: got the suffix '{file.suffix}' in '{file}'"
        )
    if missing := [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]:
        raise BenchError(f"pages need {' and '.join(missing)}: pip install 'marrq[plots]'")


def page(report: dict[str, Any]) -> str:
    """The report as an HTML document. Needs jinja2 and matplotlib: see check_page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "interval": interval,
        "scientific": scientific,
    }
    models, reference = report["models"], reference_of(report["models"])
    gate = report.get("gate") or {"max_drop": None, "models": []}
    paired = [model for model in models if model["accuracy"].get("against")]
    return environment.get_template(TEMPLATE).render(
        report=report,
        described=described,
        reference=reference,
        title=models[0]["path"] if reference is None else reference["path"],
        headlines=[
            (model, sentence(model, reference), key_numbers(model, reference))
            for model in models
            if model["role"] == "candidate"
        ],
        gates={verdict["name"]: verdict for verdict in gate["models"]},
        paired=paired,
        figures={
            "accuracy": accuracy_figure(models),
            "drop": drop_figure(paired, gate["max_drop"]) if paired else None,
            "latency": latency_figure(models),
            "ratio": ratio_figure(models, reference["flavor"]) if reference else None,
            "size": size_figure(models),
        },
        images=f"{report['data']['images']:,} images of {report['data']['path']}",
        batch_headings=[
            f"batch {row['batch']} ms (×\N{NO-BREAK SPACE}fp32)" for row in models[0]["latency"]
        ],
        parities=[
            (model, _parity_figure(slot, model))
            for slot, model in enumerate(models)
            if model.get("parity")
        ],
        audits=grouped(models),
        quantizations=_quantizations(models),
        document=json.dumps(report, indent=2, ensure_ascii=False),
    )


def number(value: float | None, digits: int = 2) -> str:
    """With so many digits after the point, a true minus sign and no negative zero; – for none."""
    return "–" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def scientific(value: float | None) -> str:
    """Three digits and a power of ten; – for none."""
    return "–" if value is None else f"{value:.2e}"


def percent(share: float | None) -> str:
    """A share 0 … 1, or a difference of two, in percent."""
    return number(None if share is None else 100 * share, 1)


def interval(values: dict[str, Any], key: str) -> str:
    """A share in percent with its 95 % interval, where it has one."""
    if f"{key}_low" not in values:
        return percent(values[key])
    return (
        f"{percent(values[key])} ({percent(values[f'{key}_low'])}–{percent(values[f'{key}_high'])})"
    )


def described(value: Any) -> str:
    """A value of the environment in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)


def reference_of(models: Sequence[Model]) -> Model | None:
    """The baseline that candidates are set beside: fp32 if it was measured."""
    baselines = {model["flavor"]: model for model in models if model["role"] == "baseline"}
    return baselines.get("fp32") or baselines.get("fp16")


def sentence(model: Model, reference: Model | None) -> str:
    """What a candidate gains and what it costs."""
    first, accuracy, against = (
        model["latency"][0],
        model["accuracy"],
        model["accuracy"].get("against"),
    )
    gain = f"takes {number(model['size_bytes'] / 1e6)} MB, and {number(first['p50_ms'])} ms"
    if reference is not None:
        smaller, faster = _gains(model, reference)
        gain = f"is {smaller} smaller than {reference['name']}, and {faster} as fast"
    start = f"{model['name']} {gain} at batch {first['batch']}."
    if against is None:
        return f"{start} Its top-1 accuracy is {interval(accuracy, 'top1')} %."
    if against["drop_low"] <= 0 <= against["drop_high"]:
        images = f"{accuracy['images']:,} images"
        return f"{start} Its top-1 accuracy is {percent(accuracy['top1'])} %, which {images} cannot tell from that of {against['baseline']}."
    change = "loses" if against["drop"] > 0 else "gains"
    return f"{start} It {change} {percent(abs(against['drop']))} points of top-1 accuracy against {against['baseline']}."


def key_numbers(model: Model, reference: Model | None) -> list[tuple[str, str, str]]:
    """The numbers that decide, each with what it counts and what it rests on."""
    first, accuracy, against = (
        model["latency"][0],
        model["accuracy"],
        model["accuracy"].get("against"),
    )
    size, time, batch = (
        f"{number(model['size_bytes'] / 1e6)} MB",
        f"{number(first['p50_ms'])} ms",
        f"at batch {first['batch']}",
    )
    gains = [(size, "file", model["flavor"]), (time, f"one forward {batch}", "median")]
    if reference is not None:
        smaller, faster = _gains(model, reference)
        other_size, other_time = reference["size_bytes"] / 1e6, reference["latency"][0]["p50_ms"]
        gains = [
            (smaller, "smaller", f"{size}, {reference['name']} {number(other_size)} MB"),
            (faster, f"as fast {batch}", f"{time}, {reference['name']} {number(other_time)} ms"),
        ]
    top1, values, key = (f"{percent(accuracy['top1'])} %", "top-1 accuracy"), accuracy, "top1"
    if against is not None:
        top1, values, key = (percent(against["drop"]), "points of top-1 lost"), against, "drop"
    bounds = f"95 % interval {percent(values[f'{key}_low'])} to {percent(values[f'{key}_high'])}"
    return [
        *gains,
        (*top1, bounds),
        (number(model["bits_per_weight"]), "bits a weight", "with scales and zero points"),
    ]


def grouped(models: Sequence[Model]) -> list[tuple[Model, dict[str, Any]]]:
    """Rows of a model's audit that differ in nothing but the linear, as one with their `linears`;
    exceptions (with a reason) first."""
    groups: dict[tuple[Any, ...], tuple[Model, dict[str, Any]]] = {}
    for model in models:
        for row in model.get("audit") or ():
            same = {
                key: row[key] for key in ("operator", "weight", "activation", "integer", "reason")
            }
            group = groups.setdefault(
                (model["name"], *same.values()), (model, {**same, "linears": []})
            )
            group[1]["linears"].append(row["linear"])
    return sorted(groups.values(), key=lambda pair: pair[1]["reason"] is None)


def _gains(model: Model, reference: Model) -> tuple[str, str]:
    """How many times smaller than the reference, and as fast at the first batch size."""
    ratios = (
        reference["size_bytes"] / model["size_bytes"],
        1 / model["latency"][0][f"ratio_{reference['flavor']}"],
    )
    smaller, faster = (f"{number(ratio, 1 if ratio >= 1 else 2)} ×" for ratio in ratios)
    return smaller, faster


def _parity_figure(slot: int, model: Model) -> str | None:
    linears = model["parity"]["linears"]
    return (
        error_figure(f"parity-{slot}", [(row["linear"], row["relative_error"]) for row in linears])
        if linears
        else None
    )


def _quantizations(models: Sequence[Model]) -> list[dict[str, Any]]:
    """How each artifact was quantized, with the names of all its files that were measured, and
    figures."""
    found: list[dict[str, Any]] = []
    for model in models:
        modules = model.get("quantization")
        same = next((one for one in found if one["modules"] == modules), None)
        if same is not None:
            same["names"].append(model["name"])
        elif modules:
            found.append(
                {
                    "names": [model["name"]],
                    "modules": modules,
                    **_quantization_figures(str(len(found)), modules),
                }
            )
    return found


def _quantization_figures(suffix: str, modules: list[dict[str, Any]]) -> dict[str, str | None]:
    searched = any(module["trajectory"] for module in modules)
    return {
        "errors": error_figure(
            f"errors-{suffix}", [(module["path"], module["relative_error"]) for module in modules]
        ),
        "alphas": alpha_figure(f"alphas-{suffix}", modules) if searched else None,
        "searches": search_figure(f"searches-{suffix}", modules) if searched else None,
    }
