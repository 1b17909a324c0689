"""Plots for people: a comparison of methods (marrq.compare/1) and the search of α that an artifact records in quantization.json.

Drawn with matplotlib, an optional extra, as .png or .svg by the file's suffix: readable at a width of 800 px, in colours that the
colour-blind can tell apart, and byte for byte the same from the same input and version of matplotlib.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.comparison import Row, by_scheme, summarize
from runtime.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FORMATS = (".png", ".svg")
WIDTH = 8.0  # inches; at 100 px each the text is readable
COLUMNS = 3  # most panels of a comparison side by side
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#666666"]  # Okabe and Ito's, for the colour-blind
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler(color={COLORS}, marker={list('osD^vPX')})",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "marrq",  # the ids in the file are random without it
}


def check_plot(file: Path) -> None:
    """Raise BenchError when a plot could not be written to the file: its suffix, or no matplotlib."""
    if file.suffix not in FORMATS:
        raise BenchError(f"a plot is written as {' or '.join(FORMATS)}: got the suffix '{file.suffix}' in '{file}'")
    if find_spec("matplotlib") is None:
        raise BenchError("plots need matplotlib: pip install 'marrq[plots]'")


@contextmanager
def _figure(file: Path, height: float) -> Iterator["Figure"]:
    """An empty figure in our style; it is written to the file when the block ends. height: in inches."""
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})


def plot_comparison(report: dict[str, Any], file: Path) -> None:
    """Top-1 of each method, a panel a scheme: a dot at the mean over the seeds, a bar from the worst to the best seed."""
    schemes = by_scheme(summarize(report))
    methods = list(dict.fromkeys(run["method"] for run in report["runs"]))
    columns = min(len(schemes), COLUMNS)
    lines = -(-len(schemes) // columns)
    with _figure(file, height=0.9 + lines * (0.8 + 0.28 * len(methods))) as figure:
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
        for panel, (scheme, rows) in zip(panels, schemes.items(), strict=False):
            _draw_methods(panel, rows, methods, report["float"]["top1"])
            panel.set_title(scheme)
        for panel in panels[len(schemes) :]:
            panel.remove()
        figure.suptitle(report["model"], fontsize=11)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _draw_methods(panel: "Axes", rows: Sequence[Row], methods: list[str], reference: float) -> None:
    """A panel of plot_comparison, the first method on top."""
    places = [methods.index(row.method) for row in rows]
    ends = [100 * row.top1_worst for row in rows], [100 * row.top1_best for row in rows]
    panel.hlines(places, *ends, color=COLORS[5], linewidth=7, label="worst to best seed")
    panel.plot([100 * row.top1 for row in rows], places, "o", color=COLORS[0], markersize=4, label="mean over the seeds")
    panel.axvline(100 * reference, color="black", linestyle="--", linewidth=1, label=f"full precision, {100 * reference:.1f} %")
    panel.set_yticks(range(len(methods)), methods)
    panel.set_ylim(len(methods) - 0.5, -0.5)
    panel.locator_params(axis="x", nbins=5)
    panel.set_xlabel("top-1 accuracy (%)")


def plot_alphas(quantization: Sequence[dict[str, Any]], file: Path) -> None:
    """α of each module against its depth, and the search that led there: α and J at each step. quantization: of quantization.json."""
    modules = [(depth, module) for depth, module in enumerate(quantization) if module["alpha"] is not None]
    if not any(module["trajectory"] for _, module in modules):
        raise BenchError("there is no search of α to plot: the method has none; quantize with one that has, such as --method marr")
    with _figure(file, height=6.4) as figure:
        upper, lower = figure.subfigures(2, 1, squeeze=False).flat
        _draw_kinds(upper, modules)
        _draw_searches(lower, modules, len(quantization))


def _draw_kinds(figure: "SubFigure", modules: list[tuple[int, dict[str, Any]]]) -> None:
    """α against depth, a colour for each kind of linear."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for depth, module in modules:
        kinds.setdefault(module["path"].rpartition(".")[2], []).append((depth, module["alpha"]))
    panel = figure.subplots()
    for kind, points in kinds.items():
        panel.plot(*zip(*points, strict=True), label=kind, linewidth=0.8, markersize=4)
    panel.set(title="α of each module", xlabel="module, in the order of the model", ylabel="α")
    panel.locator_params(axis="x", integer=True)
    figure.legend(loc="outside right center")


def _draw_searches(figure: "SubFigure", modules: list[tuple[int, dict[str, Any]]], depths: int) -> None:
    """α and J at each step, a line for each search, coloured by depth."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    steps, errors = figure.subplots(1, 2)
    colors = ScalarMappable(Normalize(0, depths - 1), "viridis")
    for depth, module in modules:
        for search in _searches(module["trajectory"]):
            style: dict[str, Any] = {"color": colors.cmap(depth / max(depths - 1, 1)), "linewidth": 0.7, "marker": ".", "markersize": 3}
            steps.plot([step["alpha"] for step in search], **style)
            if search[0]["error"] > 0:
                errors.plot([step["error"] / search[0]["error"] for step in search], **style)
    for panel, name, label in ((steps, "α", "α"), (errors, "J", "J / J of the first step")):
        panel.set(title=f"{name} during the search", xlabel="step", ylabel=label)
        panel.locator_params(axis="x", integer=True)
    ticks = MaxNLocator(integer=True)
    figure.colorbar(colors, ax=[steps, errors], label="module, in the order of the model", ticks=ticks)


def _searches(trajectory: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The steps of each half; a module that was judged on its own calibration data has one search, of half None."""
    halves: dict[int | None, list[dict[str, Any]]] = {}
    for step in trajectory:
        halves.setdefault(step["half"], []).append(step)
    return list(halves.values())
