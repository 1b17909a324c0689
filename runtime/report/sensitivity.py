"""What `marrq sensitivity` says, for people: a table of the costs, a table of what sizes buy, and
both as a plot. Nothing is measured or chosen here."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from runtime.report.plots import scale_by_powers, titled, written_figure
from runtime.sensitivity import SensitivityReport, SizedPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 12
"""Sizes of the second table."""


def costs_table(report: SensitivityReport) -> Table:
    """A row for each group of linears: the divergence that each width should add."""
    caption = f"divergence ({report.unit}) that each width should add, alone"
    result = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
    result.add_column("linears of one input", overflow="fold")
    result.add_column("weights", justify="right", no_wrap=True)
    for width in report.groups[0].widths:
        result.add_column(f"{width.num_bits} bits", justify="right", no_wrap=True)
    for group in report.groups:
        costs = (f"{width.divergence:.2e}" for width in group.widths)
        result.add_row(group.name, f"{group.weights:,}", *costs)
    return result


def sizes_table(report: SensitivityReport) -> Table:
    """What sizes buy, between the smallest model and the largest, and models of one width beside
    them."""
    caption = f"divergence: expected ({report.unit}); MB: all tensors"
    result = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, caption=caption)
    result.add_column("widths", no_wrap=True)
    for heading in ("bits a weight", "MB", "divergence"):
        result.add_column(heading, justify="right", no_wrap=True)
    # Evenly spaced over the curve, both ends among them.
    last = len(report.curve) - 1
    places = sorted({last * row // (ROWS - 1) for row in range(ROWS)})
    named = [(_widths_of(report.curve[place]), report.curve[place]) for place in places]
    named += [(f"{_widths_of(plan)} everywhere", plan) for plan in report.uniform]
    for name, plan in sorted(named, key=lambda entry: entry[1].size_bytes):
        numbers = f"{plan.bits_per_weight:.2f}", f"{plan.size_bytes / 1e6:.2f}"
        result.add_row(name, *numbers, f"{plan.divergence:.3g}")
    return result


def _widths_of(plan: SizedPlan) -> str:
    """The widths that occur, as `2, 3, 4`."""
    return ", ".join(map(str, sorted(set(plan.widths.values()))))


def plot_sensitivity(report: SensitivityReport, file: Path) -> None:
    """Left the expected divergence by size, of the best widths and of one width everywhere; right
    the cost of each group at each width, from the first group to the last."""
    with written_figure(file, height=4.2) as figure:
        left, right = figure.subplots(1, 2)
        _draw_curve(left, report)
        for place, width in enumerate(report.groups[0].widths):
            costs = [group.widths[place].divergence for group in report.groups]
            right.plot(costs, label=f"{width.num_bits} bits", markersize=3, linewidth=1)
        right.set(
            title="each group of linears alone",
            xlabel="from the first group to the last",
            ylabel=f"divergence ({report.unit})",
        )
        scale_by_powers(right)
        right.legend(fontsize=8)
        figure.suptitle(f"{titled(report.model)}, {report.scheme}", fontsize=11)


def _draw_curve(panel: "Axes", report: SensitivityReport) -> None:
    curves = ((report.curve, "a budget", "-"), (report.uniform, "one width", ""))
    for plans, name, style in curves:
        panel.plot(
            [plan.bits_per_weight for plan in plans],
            [plan.divergence for plan in plans],
            linestyle=style or "none",
            marker="" if style else "o",
            label=name,
        )
    panel.set(
        title="all groups, expected",
        xlabel="bits a weight, scales included",
        ylabel=f"divergence ({report.unit})",
    )
    scale_by_powers(panel)
    panel.legend(fontsize=8)
