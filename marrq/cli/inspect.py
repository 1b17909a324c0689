"""`marrq inspect`: what really runs each linear of an ONNX file, with how many bits; or how each
linear of an artifact was quantized."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from marrq.cli.common import JsonOption, PlotOption, ProviderOption, stdout, write_report
from marrq.errors import MarrqError

SCHEMA = "marrq.inspect/1"


def inspect(
    path: Annotated[Path, typer.Argument(help="An ONNX file, of any tool; or an artifact folder.")],
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Of a file: exit with 3 when a linear runs in float against its scheme.",
        ),
    ] = False,
    json_file: JsonOption = None,
    provider: ProviderOption = "cpu",
    optimization: Annotated[
        str, typer.Option(help="Graph optimization of ONNX Runtime: none, basic, extended or all.")
    ] = "all",
    plot: PlotOption = None,
) -> None:
    """Show what really runs each linear of a file, and why; or how an artifact was quantized.

    marrq inspect model.onnx --strict
    marrq inspect artifact --plot alpha.svg
    """
    if path.is_file():
        if plot is not None:
            raise MarrqError(
                f"--plot draws the search of alpha, which {str(path)!r} does not hold: give the "
                "artifact's folder"
            )
        _inspect_file(path, strict, json_file, provider, optimization)
    elif strict or json_file is not None:
        raise MarrqError(
            f"--strict and --json are about an ONNX file: export {str(path)!r} with `marrq "
            "export`, and inspect that"
        )
    else:
        _inspect_artifact(path, plot)


def _inspect_file(
    file: Path, strict: bool, json_file: Path | None, provider: str, optimization: str
) -> None:
    from runtime.audit.audit import audit, demand_integers, examine
    from runtime.audit.precision import measure_precision
    from runtime.report.inspection import audit_table, inspection
    from runtime.session import ONNXRUNTIME_VERSION, SessionSettings

    examined = examine(file, SessionSettings(provider, optimization=optimization))
    rows = audit(examined)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "path": str(file),
        "size_bytes": examined.size_bytes,
        "onnxruntime": ONNXRUNTIME_VERSION,
        "provider": provider,
        "graph_optimization": optimization,
        "audit": [asdict(row) for row in rows],
        "precision": asdict(measure_precision(examined)),
    }
    write_report(json_file, report)
    stdout.print(audit_table(report["audit"]))
    stdout.print(inspection(report))
    if strict:
        demand_integers(rows)


def _inspect_artifact(artifact: Path, plot: Path | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from marrq.artifact.folder import REPORTS, read_config

    read_config(artifact)
    reports: list[dict[str, Any]] = json.loads((artifact / REPORTS).read_text())
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("linear", no_wrap=True)
    for heading in ("α", "steps", "relative error", "clipped %", "damping"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(
            report["path"],
            "–" if report["alpha"] is None else f"{report['alpha']:.2f}",
            str(len(report["trajectory"])),
            f"{report['relative_error']:.2e}",
            f"{100 * report['clipped']:.1f}",
            f"{report['damping']:g}",
        )
    if plot is not None:
        from runtime.report.plots import plot_alphas

        plot_alphas(reports, plot)
    stdout.print(table)
