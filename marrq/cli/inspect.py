"""`marrq inspect`: what really runs each linear of an ONNX file, with how many bits; or how each
linear of an artifact was quantized."""

from pathlib import Path
from typing import Annotated

import typer

from marrq.cli import common
from marrq.errors import MarrqError
from marrq.files import check_artifact


def inspect(
    path: Annotated[Path, typer.Argument(help="An ONNX file, of any tool; or an artifact folder.")],
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 3 if a linear runs in float against its scheme."),
    ] = False,
    json_file: common.JsonOption = None,
    provider: common.ProviderOption = "cpu",
    optimization: Annotated[
        str, common.run_option(metavar="LEVEL", help="Of the graph: none, basic, extended or all.")
    ] = "all",
    plot: common.PlotOption = None,
) -> None:
    """Show what really runs each linear of an ONNX file, and why; or how an artifact was quantized.

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
    from runtime.audit.inspect import inspect_file
    from runtime.audit.rows import demand_integers
    from runtime.report.inspection import audit_table, inspection_table
    from runtime.session import SessionSettings

    report = inspect_file(file, SessionSettings(provider, optimization=optimization))
    common.write_report(json_file, report.to_json())
    common.stdout.print(audit_table(report.audit))
    common.stdout.print(inspection_table(report))
    if strict:
        demand_integers(report.audit)


def _inspect_artifact(artifact: Path, plot: Path | None) -> None:
    check_artifact(artifact)
    from marrq.artifact.folder import REPORTS, read_config
    from runtime.quantization import read_quantization
    from runtime.report.inspection import quantization_table
    from runtime.report.plots import plot_alphas

    read_config(artifact)
    modules = read_quantization(artifact / REPORTS)
    if plot is not None:
        plot_alphas(modules, plot)
    common.stdout.print(quantization_table(modules))
