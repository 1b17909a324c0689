"""`marrq inspect`: how each linear of an artifact was quantized."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from marrq.cli.common import PlotOption, stdout


def inspect(artifact: Annotated[Path, typer.Argument(help="An artifact folder.")], plot: PlotOption = None) -> None:
    """Show how each linear was quantized, and draw the search of alpha: marrq inspect artifact --plot alpha.svg"""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from marrq.artifact import REPORTS, read_config

    read_config(artifact)
    reports: list[dict[str, Any]] = json.loads((artifact / REPORTS).read_text())
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("linear", no_wrap=True)
    for heading in ("α", "steps", "relative error", "clipped %", "damping", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(
            report["path"],
            "–" if report["alpha"] is None else f"{report['alpha']:.2f}",
            str(len(report["trajectory"])),
            f"{report['relative_error']:.2e}",
            f"{100 * report['clipped']:.1f}",
            f"{report['damping']:g}",
            f"{report['seconds']:.2f}",
        )
    if plot is not None:
        from runtime.plots import plot_alphas

        plot_alphas(reports, plot)
    stdout.print(table)
