"""Plots for people: a comparison of methods (marrq.compare/2), and the search of α that an artifact
records in quantization.json.

They are drawn with matplotlib, an optional extra, as .png or .svg by the file's suffix: readable at
a width of 800 px, in colours that the colour-blind can tell apart, and byte for byte the same from
the same input and version of matplotlib. The figures of the bench's page
(runtime/report/figures.py) have the same style, and are elements of that page: `inline_svg`.
"""

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import StringIO
from pathlib import Path, PurePath
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from runtime.errors import BenchError
from runtime.quantization import QuantizedModule, SearchStep
from runtime.report.comparison import (
    MEASURES,
    ComparisonReport,
    ComparisonRow,
    by_scheme,
    summarize,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

FORMATS = (".png", ".svg")
WIDTH = 8.0  # inches; at 100 px each the text is readable
NAME_WIDTH = 40  # letters of a method's name on a line

# Okabe and Ito's colours, for the colour-blind; the last one is for baselines.
COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#666666"]
MARKERS = "osD^vPX"

# From the first linear to the last; of one lightness, so that they show on white and black paper.
DEPTHS = ["#2a7fbf", "#b5729f", "#d9682a"]
INK, GRID, PAPER = "#111111", "#e5e5e5", "#fefefe"

# Keyword arguments of matplotlib's drawing functions.
Style = dict[str, Any]

# Settings of matplotlib (rcParams), whose names it types as literals.
Settings = dict[Any, Any]

STYLE: Settings = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler(color={COLORS}, marker={list(MARKERS)})",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "grid.color": GRID,
    "legend.frameon": False,
    "savefig.dpi": 200,
    # Text stays text: small, and found by a search.
    "svg.fonttype": "none",
    # The ids in the file are random without it.
    "svg.hashsalt": "marrq",
    # A name with dollars in it is a name, and no formula.
    "text.parse_math": False,
}
# Inches; 360 points, a phone's width, so that text on a phone is as large as it is drawn.
PAGE_WIDTH = 5.0
PAGE_STYLE: Settings = {
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": GRID,
    **dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 0),
    **dict.fromkeys(("figure.constrained_layout.h_pad", "figure.constrained_layout.w_pad"), 0.03),
}
# What the page's style sheet calls our colours: it has other values for dark screens.
PAGE_COLORS = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--paper)"} | {
    color: f"var(--plot-{slot})" for slot, color in enumerate(COLORS)
}


def check_installed(*packages: str) -> None:
    """Raise BenchError if a package that draws is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise BenchError(f"plots and pages need {package}: pip install '.[plots]' in the clone")


def check_plot(file: Path) -> None:
    """Raise BenchError if a plot could not be written to the file: for its suffix, or without
    matplotlib."""
    if file.suffix not in FORMATS:
        raise BenchError(
            f"a plot is written as {' or '.join(FORMATS)}: got the suffix '{file.suffix}' in "
            f"'{file}'"
        )
    check_installed("matplotlib")


@contextmanager
def written_figure(file: Path, height: float) -> Iterator["Figure"]:
    """An empty figure in our style; it is written to the file when the block ends. height: in
    inches."""
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        # Both formats name their maker, by which a later run knows that the file may be replaced. A
        # date would make every file another.
        maker = (
            {"Creator": "marrq", "Date": None} if file.suffix == ".svg" else {"Software": "marrq"}
        )
        figure.savefig(file, metadata=maker)


def inline_svg(name: str, height: float, alt: str, draw: Callable[["Figure"], None]) -> str:
    """What `draw` draws, as an <svg> element for a page.

    name: of the figure; no two figures of a page have the same, which keeps their ids apart.
    height: in inches.
    alt: what the figure shows, in words.

    Its colours are the page's (PAGE_COLORS), so that it is legible on light and on dark paper.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, **PAGE_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
        draw(figure)
        file = StringIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    # Without the XML declaration and the document type, which a page cannot hold.
    _, _, element = file.getvalue().partition("<svg ")
    # matplotlib counts its groups anew in each figure, so ids of two figures would be the same.
    # Nothing refers to these ids.
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    element = re.sub(
        f"(?<=: )({'|'.join(PAGE_COLORS)})", lambda color: PAGE_COLORS[color[0]], element
    )
    return f'<svg role="img" aria-label="{html.escape(alt)}" {element}'


def plot_comparison(report: ComparisonReport, file: Path) -> None:
    """Score and divergence of each method, a pair of panels a scheme: dots at the means over the
    seeds, bars from the worst to the best seed."""
    schemes = by_scheme(summarize(report))
    methods = list(dict.fromkeys(run.method for run in report.runs))
    # Long names of methods are broken, so that the panels keep their width.
    labels = [_broken(method) for method in methods]
    lines = max(label.count("\n") + 1 for label in labels)
    # Inches: as much as the longest name needs, for each method.
    height = 0.9 + len(schemes) * (0.8 + len(labels) * (0.12 + 0.16 * lines))
    with written_figure(file, height) as figure:
        panels = figure.subplots(len(schemes), 2, sharey=True, squeeze=False)
        for (left, right), (scheme, rows) in zip(panels, schemes.items(), strict=True):
            _draw_scores(left, methods, rows, report)
            _draw_methods(
                right,
                methods,
                {r.method: (r.divergence_worst, r.divergence, r.divergence_best) for r in rows},
            )
            left.set(title=scheme, xlabel=MEASURES[report.measure].score)
            # The panels share this axis, so that the methods are named at the left only.
            left.set_yticks(range(len(labels)), labels)
            right.set(title=scheme, xlabel="divergence (nats)")
        figure.suptitle(titled(report.model), fontsize=11)
        # All panels have the same legend.
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3
        )


def _broken(method: str) -> str:
    """A method's name, broken into lines at its settings."""
    return "\n".join(wrap(method.replace(",", ", "), NAME_WIDTH)).replace(", ", ",")


def _draw_scores(
    panel: "Axes", methods: list[str], rows: Sequence[ComparisonRow], report: ComparisonReport
) -> None:
    """A left panel, with the score of the float model."""
    shares = {row.method: (row.score_worst, row.score, row.score_best) for row in rows}
    percents = {method: tuple(100 * share for share in found) for method, found in shares.items()}
    _draw_methods(panel, methods, percents)
    reference, digits = 100 * report.float_score, MEASURES[report.measure].digits
    panel.axvline(
        reference,
        color="black",
        linestyle="--",
        linewidth=1,
        label=f"full precision, {reference:.{digits}f} %",
    )


def _draw_methods(
    panel: "Axes", methods: list[str], values: Mapping[str, tuple[float, ...]]
) -> None:
    """A panel of plot_comparison, the first method on top. values: worst seed, mean and best seed,
    by method."""
    places = [methods.index(method) for method in values]
    # Drawn by matplotlib in one call for all methods.
    worst, means, best = zip(*values.values(), strict=True)
    panel.hlines(places, worst, best, color=COLORS[5], linewidth=7, label="worst to best seed")
    panel.plot(means, places, "o", color=COLORS[0], markersize=4, label="mean over the seeds")
    panel.set_ylim(len(methods) - 0.5, -0.5)
    panel.locator_params(axis="x", nbins=5)


def plot_alphas(quantization: Sequence[QuantizedModule], file: Path) -> None:
    """α of each linear against its depth, and the search that led there: α and J at each step.
    Raises BenchError if no linear has a search."""
    modules = with_alpha(quantization)
    if not any(module.trajectory for _, module in modules):
        raise BenchError(
            "there is no search of α to plot: the method has none; quantize with one that has, "
            "such as --method marr"
        )
    with written_figure(file, height=6.4) as figure:
        upper, lower = figure.subfigures(2, 1, squeeze=False).flat
        panel = upper.subplots()
        draw_by_depth(panel, alphas(quantization))
        panel.set(title="α of each linear", ylabel="α")
        upper.legend(loc="outside right center")
        draw_searches(lower, lower.subplots(1, 2), modules, len(quantization))


def with_alpha(quantization: Sequence[QuantizedModule]) -> list[tuple[int, QuantizedModule]]:
    """The linears that have an α, each with its depth."""
    return [(depth, one) for depth, one in enumerate(quantization) if one.alpha is not None]


def alphas(quantization: Sequence[QuantizedModule]) -> list[tuple[int, str, float]]:
    """Depth, path and α of the linears that have an α."""
    modules = enumerate(quantization)
    return [(depth, one.path, one.alpha) for depth, one in modules if one.alpha is not None]


def draw_by_depth(panel: "Axes", values: Sequence[tuple[int, str, float]]) -> None:
    """A value of each linear against its depth, a colour for each kind of linear. values: depth,
    path and value."""
    # The kind is the last part of the path: qkv, proj, fc1, fc2.
    kinds: dict[str, list[tuple[int, float]]] = {}
    for depth, path, value in values:
        kinds.setdefault(path.rpartition(".")[2], []).append((depth, value))
    for kind, points in kinds.items():
        panel.plot(*zip(*points, strict=True), label=kind, linewidth=0.8, markersize=4)
    panel.set_xlabel("linear, in the order of the model")
    panel.locator_params(axis="x", integer=True)


def draw_searches(
    figure: "FigureBase",
    panels: Iterable["Axes"],
    modules: Sequence[tuple[int, QuantizedModule]],
    depths: int,
) -> None:
    """α in the first and J in the second panel at each step, a line for each search, coloured by
    depth. modules: each with its depth. depths: number of all linears."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    steps, errors = panels
    # matplotlib draws a bar of more than 50 colours as a picture, fewer as shapes.
    colors = ScalarMappable(
        Normalize(0, depths - 1), LinearSegmentedColormap.from_list("depth", DEPTHS, N=48)
    )
    for depth, module in modules:
        color = colors.cmap(depth / max(depths - 1, 1))
        style: Style = {"color": color, "linewidth": 0.7, "marker": ".", "markersize": 3}
        for search in _searches(module.trajectory):
            steps.plot([step.alpha for step in search], **style)
            # J of linears differs by powers of ten, so that each is shown against its first.
            if search[0].error > 0:
                errors.plot([step.error / search[0].error for step in search], **style)
    for panel, name, label in ((steps, "α", "α"), (errors, "J", "J / J of the first step")):
        panel.set(title=f"{name} during the search", xlabel="step", ylabel=label)
        panel.locator_params(axis="x", integer=True)
    ticks = MaxNLocator(integer=True)
    bar = figure.colorbar(
        colors, ax=[steps, errors], label="linear, in the order of the model", ticks=ticks
    )
    assert bar.solids is not None
    # The paper would shine through between two colours.
    bar.solids.set_edgecolor("face")


def _searches(trajectory: Sequence[SearchStep]) -> list[list[SearchStep]]:
    """The steps of each half of the calibration images; a search on all images has the half
    None."""
    halves: dict[int | None, list[SearchStep]] = {}
    for step in trajectory:
        halves.setdefault(step.half, []).append(step)
    return list(halves.values())


def scale_by_powers(panel: "Axes") -> None:
    """A log scale whose numbers are written out: matplotlib's own formatter writes formulas."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    # Ticks at 1, 2 and 5, so that a range below one decade has ticks too.
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def titled(model: str) -> str:
    """A model's name for a title: of a folder the last part."""
    folder = model.removeprefix("local-dir:")
    return model if folder == model else PurePath(folder).name
