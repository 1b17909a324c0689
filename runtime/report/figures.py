"""The figures of the bench's page (runtime/report/html.py): each is an <svg> element that is made
from a bench report.

They are drawn at the width of a phone, where labels of an axis would leave no room: a model's name
and number stand above its dot or bar.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from runtime.measure.measured import KNN_TOP1, TOP1, ComparedLatency, MeasuredModel
from runtime.quantization import QuantizedModule
from runtime.report.plots import (
    COLORS,
    MARKERS,
    PAPER,
    Style,
    alphas,
    draw_by_depth,
    draw_searches,
    inline_svg,
    scale_by_powers,
    with_alpha,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_LENGTH = 38  # letters

Models = Sequence[MeasuredModel]
# Low end, value and high end, as shares of images.
Interval = tuple[float, float, float]


def accuracy_figure(models: Models) -> str:
    """The score of each model that has one: a dot with its 95 % interval."""
    shown = [(model, model.score, style) for model, style in _styled(models) if model.score]
    # All models of a report have scores of one kind.
    are_shares, measure = shown[0][1].right is not None, shown[0][1].measure
    unit, digits = (" %", 1) if are_shares else ("", 4)
    factor = 100 if are_shares else 1
    labels = [(model.name, f"{factor * score.value:.{digits}f}{unit}") for model, score, _ in shown]

    def draw(figure: "Figure") -> None:
        panel = _rows(figure, labels)
        for place, (_, score, style) in enumerate(shown):
            ends = (score.low, score.value, score.high)
            _dot(panel, place, ends, style, factor)
        panel.set_xlabel(f"{measure} accuracy (%)" if measure == TOP1 else f"{measure}{unit}")

    title = _titled(measure) + (" accuracy" if measure == TOP1 else "")
    return inline_svg("accuracy", _height(labels), f"{title}: {_said(labels)}", draw)


def drop_figure(models: Models, max_drop: float | None) -> str:
    """What each candidate loses of top-1, of k-NN for embeddings, against its baseline: a dot with
    its 95 % interval. max_drop: the gate's limit, in points; None without a gate."""
    # The baseline loses nothing against itself, and has no dot.
    losses = [
        (model.name, model.against, style)
        for model, style in _styled(models)
        if model.is_candidate and model.against is not None
    ]
    embedded = any(model.embedding is not None for model in models)
    measure = KNN_TOP1 if embedded else TOP1
    labels = [(name, f"{100 * against.drop:.1f} points") for name, against, _ in losses]

    def draw(figure: "Figure") -> None:
        panel = _rows(figure, labels)
        # Left of it the candidate is the better model.
        panel.axvline(0, color=COLORS[-1], linewidth=1)
        for place, (_, against, style) in enumerate(losses):
            _dot(panel, place, (against.drop_low, against.drop, against.drop_high), style)
        if max_drop is not None:
            limit: Style = {"color": COLORS[4], "linestyle": "--", "linewidth": 1.5}
            panel.axvline(max_drop, label=f"limit of the gate, {max_drop:g} points", **limit)
            figure.legend(loc="outside lower left")
        panel.set_xlabel(f"{measure} lost (points)")

    # A legend takes a line below the panel.
    height = _height(labels) + (0.3 if max_drop is not None else 0)
    return inline_svg("drop", height, f"{_titled(measure)} lost: {_said(labels)}", draw)


def size_figure(models: Models) -> str:
    """The size of each model's file, as a bar."""
    labels = [(model.name, f"{model.size_bytes / 1e6:.2f} MB") for model in models]

    def draw(figure: "Figure") -> None:
        panel = _rows(figure, labels)
        for place, (model, style) in enumerate(_styled(models)):
            panel.barh(place, model.size_bytes / 1e6, height=0.22, color=style["color"])
        # The length of a bar says something only if it begins at 0.
        panel.set_xlim(left=0)
        panel.set_xlabel("size of the file (MB)")

    return inline_svg("size", _height(labels), f"Size: {_said(labels)}", draw)


def latency_figure(models: Models) -> str:
    """Time of a forward against the batch, both on a log scale; whiskers from the median to the
    90th percentile."""

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        for model, style in _styled(models):
            p50 = [row.p50_ms for row in model.latency]
            # Whiskers are given to matplotlib as lengths from the dot.
            tails = [row.p90_ms - row.p50_ms for row in model.latency]
            panel.errorbar(
                [row.batch for row in model.latency],
                p50,
                yerr=([0.0] * len(p50), tails),
                label=_shortened(model.name),
                elinewidth=1,
                capsize=2,
                markersize=5,
                **style,
            )
        scale_by_powers(panel)
        _against_batch(figure, panel, models, "time of one forward (ms)")

    alt = "; ".join(_listed(model, lambda row: row.p50_ms) for model in models)
    return inline_svg("latency", 3.4, f"Median time of a forward in ms: {alt}", draw)


def ratio_figure(models: Models, flavor: str) -> str:
    """Time as a share of the baseline's of that flavour, against the batch. The baseline must have
    been measured."""

    def ratio(row: ComparedLatency) -> float:
        found = row.ratio(flavor)
        assert found is not None
        return found

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        for model, style in _styled(models):
            panel.plot(
                [row.batch for row in model.latency],
                [ratio(row) for row in model.latency],
                label=_shortened(model.name),
                markersize=5,
                **style,
            )
        panel.set_ylim(bottom=0)
        _against_batch(figure, panel, models, f"time of one forward (× {flavor})")

    alt = "; ".join(_listed(model, ratio) for model in models)
    return inline_svg("ratio", 3.4, f"Time of a forward as a multiple of {flavor}: {alt}", draw)


def alpha_figure(name: str, quantization: Sequence[QuantizedModule]) -> str:
    """α of each linear that has an α. name: of the figure in its page, as in those below."""
    values = alphas(quantization)
    numbers = [alpha for *_, alpha in values]
    alt = f"α of {len(values)} linears, from {min(numbers):.2f} to {max(numbers):.2f}"
    return inline_svg(name, 3.4, alt, _by_depth(values, "α"))


def search_figure(name: str, quantization: Sequence[QuantizedModule]) -> str:
    """α and J at each step of the search, coloured by depth."""

    def draw(figure: "Figure") -> None:
        draw_searches(figure, figure.subplots(2, 1), with_alpha(quantization), len(quantization))

    return inline_svg(name, 5.2, "α and J at each step of the search, a line for each linear", draw)


def error_figure(name: str, errors: Sequence[tuple[str, float]]) -> str:
    """Relative error of each linear against its depth, on a log scale. errors: path and error."""
    # 0, infinity and NaN have no place on a log scale.
    drawn = [(depth, *one) for depth, one in enumerate(errors) if 0 < one[1] < math.inf]

    def draw(figure: "Figure") -> None:
        _by_depth(drawn, "relative error")(figure)
        scale_by_powers(figure.axes[0])

    path, worst = max(errors, key=lambda pair: pair[1])
    alt = f"Relative error of {len(errors)} linears; the largest, {worst:.2e}, at {path}"
    return inline_svg(name, 3.4, alt, draw)


def _rows(figure: "Figure", labels: Sequence[tuple[str, str]]) -> "Axes":
    """A panel with a place for each label from the top down, the label's two parts at the left and
    the right end above it."""
    panel = figure.subplots()
    for place, (name, value) in enumerate(labels):
        # At the left and right end of the panel, whatever the axis shows there.
        for end, text, side in ((0, _shortened(name), "left"), (1, value, "right")):
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
            panel.text(
                end,
                place - 0.22,
                text,
                transform=panel.get_yaxis_transform(),
                ha=side,
                va="bottom",
                bbox=box,
            )
    # From the top down, with room for the text above the first dot.
    panel.set(ylim=(len(labels) - 0.6, -0.8), yticks=[])
    panel.spines["left"].set_visible(False)
    return panel


def _shortened(name: str) -> str:
    """As much of a name as a phone is wide; the tables have all of it."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"


def _height(labels: Sequence[tuple[str, str]]) -> float:
    return 0.6 + 0.52 * len(labels)


def _said(labels: Sequence[tuple[str, str]]) -> str:
    return ", ".join(map(" ".join, labels))


def _titled(measure: str) -> str:
    """With a capital, as a title begins."""
    return f"{measure[0].upper()}{measure[1:]}"


def _dot(panel: "Axes", place: int, found: Interval, style: Style, factor: float = 100) -> None:
    """A number at its place, with a line from the low to the high end of its interval. factor:
    what it is drawn in; 100 for a share in percent."""
    low, value, high = (factor * share for share in found)
    panel.hlines(place, low, high, color=style["color"], linewidth=2)
    panel.plot(value, place, markersize=8, **style)


def _styled(models: Models) -> list[tuple[MeasuredModel, Style]]:
    """Models with what they are drawn in: candidates in colour, baselines in grey."""
    candidates = [model.name for model in models if model.is_candidate]
    baselines = [model.name for model in models if not model.is_candidate]
    styles: dict[str, Style] = {}
    for slot, name in enumerate(candidates):
        # The last colour is the baselines' grey.
        color = COLORS[slot % (len(COLORS) - 1)]
        styles[name] = {"color": color, "marker": MARKERS[slot % len(MARKERS)]}
    for slot, name in enumerate(baselines):
        line = ("--", ":")[slot % 2]
        styles[name] = {"color": COLORS[-1], "marker": MARKERS[-1 - slot], "linestyle": line}
    return [(model, styles[model.name]) for model in models]


def _listed(model: MeasuredModel, value: Callable[[ComparedLatency], float]) -> str:
    """A value of a model at each batch size, in words."""
    values = [f"{value(row):.2f} at batch {row.batch}" for row in model.latency]
    return f"{model.name} {', '.join(values)}"


def _against_batch(figure: "Figure", panel: "Axes", models: Models, label: str) -> None:
    """The batch axis, the other axis' label, and the legend below."""
    batches = [row.batch for row in models[0].latency]
    # Batch sizes are powers of two, most of the time.
    panel.set_xscale("log", base=2)
    panel.set_xticks(batches, [f"{batch:g}" for batch in batches])
    panel.set_xticks([], minor=True)
    panel.margins(x=0.08)
    panel.set(xlabel="images in a batch", ylabel=label)
    # Two columns of long names would be wider than a phone.
    are_short = all(len(model.name) <= NAME_LENGTH / 2 for model in models)
    figure.legend(loc="outside lower left", ncols=2 if are_short else 1)


def _by_depth(values: Sequence[tuple[int, str, float]], label: str) -> Callable[["Figure"], None]:
    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        draw_by_depth(panel, values)
        panel.set_ylabel(label)
        # Nothing is left to draw if all errors are 0.
        if values:
            figure.legend(loc="outside lower left", ncols=4)

    return draw
