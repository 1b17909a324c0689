"""Plots for people: a comparison of methods (marrq.compare/2) and the search of α that an artifact
records in quantization.json.

Drawn with matplotlib, an optional extra, as .png or .svg by the file's suffix: readable at a width
of 800 px, in colours that the colour-blind can tell apart, and byte for byte the same from the same
input and version of matplotlib. The plots of the bench's page (runtime/report/figures.py) have the
same style, and are elements of that page: `inline_svg`."""

import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from runtime.errors import BenchError
from runtime.report.comparison import by_scheme, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

FORMATS = (".png", ".svg")
WIDTH = 8.0  # inches; at 100 px each the text is readable
NAME_WIDTH = 40  # letters of a method's name on a line
COLORS = [
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#666666",
]  # Okabe and Ito's, for the colour-blind
MARKERS = "osD^vPX"
DEPTHS = [
    "#2a7fbf",
    "#b5729f",
    "#d9682a",
]  # from the first module to the last; of one lightness, so that white and black paper do
INK, GRID, PAPER = "#111111", "#e5e5e5", "#fefefe"
STYLE: dict[Any, Any] = {
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
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "marrq",  # the ids in the file are random without it
    "text.parse_math": False,  # a name with dollars in it is a name
}
PAGE_WIDTH = (
    5.0  # inches; 360 points, a phone's width, so that text is there as large as it is drawn
)
PAGE_STYLE: dict[Any, Any] = {
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": GRID,
    **dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 0),
    **dict.fromkeys(("figure.constrained_layout.h_pad", "figure.constrained_layout.w_pad"), 0.03),
}
PAGE_COLORS = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--paper)"} | {
    color: f"var(--plot-{slot})" for slot, color in enumerate(COLORS)
}
"""What the page's style sheet calls our colours: it has other ones for dark screens."""


def check_installed(*packages: str) -> None:
    """Raise BenchError where a package that draws is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise BenchError(f"plots and pages need {package}: pip install 'marrq[plots]'")


def check_plot(file: Path) -> None:
    """Raise BenchError when a plot could not be written to the file: its suffix, or no
    matplotlib."""
    if file.suffix not in FORMATS:
        raise BenchError(
            f"a plot is written as {' or '.join(FORMATS)}: got the suffix '{file.suffix}' in "
            f"'{file}'"
        )
    check_installed("matplotlib")


@contextmanager
def _figure(file: Path, height: float) -> Iterator["Figure"]:
    """An empty figure in our style; it is written to the file when the block ends. height: in
    inches."""
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})


def inline_svg(name: str, height: float, alt: str, draw: Callable[["Figure"], None]) -> str:
    """What `draw` draws, as an <svg> element for a page. name: of one figure in its page, which
    keeps their ids apart; height: in inches; alt: what it shows, in words. Colours are the page's
    (PAGE_COLORS), so that it is legible on light and on dark paper."""
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
    _, _, element = file.getvalue().partition("<svg ")
    element = re.sub(
        r'<g id="[^"]*"', "<g", element
    )  # matplotlib counts its groups anew in each figure; nothing refers to them
    element = re.sub(
        f"(?<=: )({'|'.join(PAGE_COLORS)})", lambda color: PAGE_COLORS[color[0]], element
    )
    return f'<svg role="img" aria-label="{html.escape(alt)}" {element}'


def plot_comparison(report: dict[str, Any], file: Path) -> None:
    """Top-1 and divergence of each method, a pair of panels a scheme: dots at the means over the
    seeds, bars from worst to best seed."""
    schemes = by_scheme(summarize(report))
    methods = list(dict.fromkeys(run["method"] for run in report["runs"]))
    labels = [
        "\n".join(wrap(method.replace(",", ", "), NAME_WIDTH)).replace(", ", ",")
        for method in methods
    ]
    lines = max(label.count("\n") + 1 for label in labels)
    reference = 100 * report["float"]["top1"]
    with _figure(
        file, height=0.9 + len(schemes) * (0.8 + len(labels) * (0.12 + 0.16 * lines))
    ) as figure:
        panels = figure.subplots(len(schemes), 2, sharey=True, squeeze=False)
        for (left, right), (scheme, rows) in zip(panels, schemes.items(), strict=True):
            _draw_methods(
                left,
                methods,
                {
                    row.method: (100 * row.top1_worst, 100 * row.top1, 100 * row.top1_best)
                    for row in rows
                },
            )
            _draw_methods(
                right,
                methods,
                {
                    row.method: (row.divergence_worst, row.divergence, row.divergence_best)
                    for row in rows
                },
            )
            left.axvline(
                reference,
                color="black",
                linestyle="--",
                linewidth=1,
                label=f"full precision, {reference:.1f} %",
            )
            left.set(title=scheme, xlabel="top-1 accuracy (%)")
            left.set_yticks(range(len(labels)), labels)
            right.set(title=scheme, xlabel="divergence (nats)")
        figure.suptitle(report["model"], fontsize=11)
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3
        )


def _draw_methods(
    panel: "Axes", methods: list[str], values: dict[str, tuple[float, float, float]]
) -> None:
    """A panel of plot_comparison, the first method on top. values: by method, worst seed, mean,
    best seed."""
    places = [methods.index(method) for method in values]
    worst, means, best = zip(*values.values(), strict=True)
    panel.hlines(places, worst, best, color=COLORS[5], linewidth=7, label="worst to best seed")
    panel.plot(means, places, "o", color=COLORS[0], markersize=4, label="mean over the seeds")
    panel.set_ylim(len(methods) - 0.5, -0.5)
    panel.locator_params(axis="x", nbins=5)


def plot_alphas(quantization: Sequence[dict[str, Any]], file: Path) -> None:
    """α of each module against its depth, and the search that led there: α and J at each step.
    quantization: of quantization.json."""
    modules = [
        (depth, module) for depth, module in enumerate(quantization) if module["alpha"] is not None
    ]
    if not any(module["trajectory"] for _, module in modules):
        raise BenchError(
            "there is no search of α to plot: the method has none; quantize with one that has, "
            "such as --method marr"
        )
    with _figure(file, height=6.4) as figure:
        upper, lower = figure.subfigures(2, 1, squeeze=False).flat
        panel = upper.subplots()
        draw_by_depth(
            panel, [(depth, module["path"], module["alpha"]) for depth, module in modules]
        )
        panel.set(title="α of each module", ylabel="α")
        upper.legend(loc="outside right center")
        draw_searches(lower, lower.subplots(1, 2), modules, len(quantization))


def draw_by_depth(panel: "Axes", values: Sequence[tuple[int, str, float]]) -> None:
    """A value of each module against its depth, a colour for each kind of linear. values: depth,
    path and value."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for depth, path, value in values:
        kinds.setdefault(path.rpartition(".")[2], []).append((depth, value))
    for kind, points in kinds.items():
        panel.plot(*zip(*points, strict=True), label=kind, linewidth=0.8, markersize=4)
    panel.set_xlabel("module, in the order of the model")
    panel.locator_params(axis="x", integer=True)


def draw_searches(
    figure: "FigureBase",
    panels: Iterable["Axes"],
    modules: Sequence[tuple[int, dict[str, Any]]],
    depths: int,
) -> None:
    """α in the first and J in the second panel at each step, a line for each search, coloured by
    depth. modules: depth and its record."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    steps, errors = panels
    # matplotlib draws a bar of more than 50 colours as a picture, fewer as shapes
    colors = ScalarMappable(
        Normalize(0, depths - 1), LinearSegmentedColormap.from_list("depth", DEPTHS, N=48)
    )
    for depth, module in modules:
        for search in _searches(module["trajectory"]):
            style: dict[str, Any] = {
                "color": colors.cmap(depth / max(depths - 1, 1)),
                "linewidth": 0.7,
                "marker": ".",
                "markersize": 3,
            }
            steps.plot([step["alpha"] for step in search], **style)
            if search[0]["error"] > 0:
                errors.plot([step["error"] / search[0]["error"] for step in search], **style)
    for panel, name, label in ((steps, "α", "α"), (errors, "J", "J / J of the first step")):
        panel.set(title=f"{name} during the search", xlabel="step", ylabel=label)
        panel.locator_params(axis="x", integer=True)
    ticks = MaxNLocator(integer=True)
    bar = figure.colorbar(
        colors, ax=[steps, errors], label="module, in the order of the model", ticks=ticks
    )
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # the paper shines through between two colours without it


def _searches(trajectory: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The steps of each half; a module that was judged on its own calibration data has one search,
    of half None."""
    halves: dict[int | None, list[dict[str, Any]]] = {}
    for step in trajectory:
        halves.setdefault(step["half"], []).append(step)
    return list(halves.values())
