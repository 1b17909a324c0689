"""The figures of the bench's page (runtime/report/html.py), each an <svg> element made from the
JSON of schema marrq.bench/2.

They are drawn at the width of a phone, where axis labels would leave no room: a model's name and
number stand above its dot or bar."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from runtime.report.plots import COLORS, MARKERS, PAPER, draw_by_depth, draw_searches, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_LENGTH = 38
Model = dict[str, Any]
"""An entry of `models` in the report."""


def accuracy_figure(models: Sequence[Model]) -> str:
    """Top-1 of each model: a dot with its 95 % interval."""
    labels = [(model["name"], f"{100 * model['accuracy']['top1']:.1f} %") for model in models]

    def draw(figure: "Figure") -> None:
        panel = _rows(figure, labels)
        for place, (model, style) in enumerate(_styled(models)):
            _dot(panel, place, model["accuracy"], "top1", style)
        panel.set_xlabel("top-1 accuracy (%)")

    return inline_svg("accuracy", _height(labels), f"Top-1 accuracy: {_said(labels)}", draw)


def drop_figure(models: Sequence[Model], max_drop: float | None) -> str:
    """What each candidate loses of top-1 against its baseline: a dot with its 95 % interval.
    max_drop: the gate's limit, in points."""
    candidates = [
        (model, style) for model, style in _styled(models) if model["role"] == "candidate"
    ]
    labels = [
        (model["name"], f"{100 * model['accuracy']['against']['drop']:.1f} points")
        for model, _ in candidates
    ]

    def draw(figure: "Figure") -> None:
        panel = _rows(figure, labels)
        panel.axvline(0, color=COLORS[-1], linewidth=1)
        for place, (model, style) in enumerate(candidates):
            _dot(panel, place, model["accuracy"]["against"], "drop", style)
        if max_drop is not None:
            panel.axvline(
                max_drop,
                color=COLORS[4],
                linestyle="--",
                linewidth=1.5,
                label=f"limit of the gate, {max_drop:g} points",
            )
            figure.legend(loc="outside lower left")
        panel.set_xlabel("top-1 lost (points)")

    return inline_svg(
        "drop",
        _height(labels) + (0.3 if max_drop is not None else 0),
        f"Top-1 lost: {_said(labels)}",
        draw,
    )


def size_figure(models: Sequence[Model]) -> str:
    """The size of each model's file, as a bar."""
    labels = [(model["name"], f"{model['size_bytes'] / 1e6:.2f} MB") for model in models]

    def draw(figure: "Figure") -> None:
        panel = _rows(figure, labels)
        for place, (model, style) in enumerate(_styled(models)):
            panel.barh(place, model["size_bytes"] / 1e6, height=0.22, color=style["color"])
        panel.set_xlim(left=0)
        panel.set_xlabel("size of the file (MB)")

    return inline_svg("size", _height(labels), f"Size: {_said(labels)}", draw)


def latency_figure(models: Sequence[Model]) -> str:
    """Time of a forward against the batch, both on a log scale; whiskers from the median to the
    90th percentile."""

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        for model, style in _styled(models):
            batches, p50 = _column(model, "batch"), _column(model, "p50_ms")
            tails = [high - low for low, high in zip(p50, _column(model, "p90_ms"), strict=True)]
            panel.errorbar(
                batches,
                p50,
                yerr=([0.0] * len(p50), tails),
                label=_shortened(model["name"]),
                elinewidth=1,
                capsize=2,
                markersize=5,
                **style,
            )
        _scale_by_powers(panel)
        _against_batch(figure, panel, models, "time of one forward (ms)")

    alt = "; ".join(f"{model['name']} {_listed(model, 'p50_ms', '.2f')}" for model in models)
    return inline_svg("latency", 3.4, f"Median time of a forward in ms: {alt}", draw)


def ratio_figure(models: Sequence[Model], flavor: str) -> str:
    """Time as a share of the baseline's of that flavour, against the batch."""

    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        for model, style in _styled(models):
            panel.plot(
                _column(model, "batch"),
                _column(model, f"ratio_{flavor}"),
                label=_shortened(model["name"]),
                markersize=5,
                **style,
            )
        panel.set_ylim(bottom=0)
        _against_batch(figure, panel, models, f"time of one forward (× {flavor})")

    alt = "; ".join(
        f"{model['name']} {_listed(model, f'ratio_{flavor}', '.2f')}" for model in models
    )
    return inline_svg("ratio", 3.4, f"Time of a forward as a multiple of {flavor}: {alt}", draw)


def alpha_figure(name: str, quantization: Sequence[dict[str, Any]]) -> str:
    """α of each module that has one. name: of this figure in its page, as in those below."""
    modules = _with_alpha(quantization)
    values = [(depth, module["path"], module["alpha"]) for depth, module in modules]
    alt = f"α of {len(values)} modules, from {min(value for *_, value in values):.2f} to {max(value for *_, value in values):.2f}"
    return inline_svg(name, 3.4, alt, _by_depth(values, "α"))


def search_figure(name: str, quantization: Sequence[dict[str, Any]]) -> str:
    """α and J at each step of the search, coloured by depth."""

    def draw(figure: "Figure") -> None:
        draw_searches(figure, figure.subplots(2, 1), _with_alpha(quantization), len(quantization))

    return inline_svg(name, 5.2, "α and J at each step of the search, a line for each module", draw)


def error_figure(name: str, errors: Sequence[tuple[str, float]]) -> str:
    """Relative error of each linear against its depth, on a log scale. errors: path and error; 0
    and infinity have no place on it."""

    def draw(figure: "Figure") -> None:
        _by_depth(values, "relative error")(figure)
        _scale_by_powers(figure.axes[0])

    values = [
        (depth, path, error) for depth, (path, error) in enumerate(errors) if 0 < error < math.inf
    ]
    worst = max(errors, key=lambda pair: pair[1])
    return inline_svg(
        name,
        3.4,
        f"Relative error of {len(errors)} linears; the largest, {worst[1]:.2e}, at {worst[0]}",
        draw,
    )


def _rows(figure: "Figure", labels: Sequence[tuple[str, str]]) -> "Axes":
    """A panel with a place for each label from the top down, the label's two parts at the left and
    the right end above it."""
    panel = figure.subplots()
    for place, (name, value) in enumerate(labels):
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


def _dot(
    panel: "Axes", place: int, values: dict[str, Any], key: str, style: dict[str, Any]
) -> None:
    """A share at its place in percent, with a line from the low to the high end of its interval."""
    panel.hlines(
        place,
        100 * values[f"{key}_low"],
        100 * values[f"{key}_high"],
        color=style["color"],
        linewidth=2,
    )
    panel.plot(100 * values[key], place, markersize=8, **style)


def _styled(models: Sequence[Model]) -> list[tuple[Model, dict[str, Any]]]:
    """Models with what they are drawn in: candidates in colour, baselines in grey."""
    candidates = [model["name"] for model in models if model["role"] == "candidate"]
    baselines = [model["name"] for model in models if model["role"] == "baseline"]
    styles: dict[str, dict[str, Any]] = {}
    for slot, name in enumerate(candidates):
        styles[name] = {
            "color": COLORS[slot % (len(COLORS) - 1)],
            "marker": MARKERS[slot % len(MARKERS)],
        }
    for slot, name in enumerate(baselines):
        styles[name] = {
            "color": COLORS[-1],
            "marker": MARKERS[-1 - slot],
            "linestyle": ("--", ":")[slot % 2],
        }
    return [(model, styles[model["name"]]) for model in models]


def _column(model: Model, key: str) -> list[float]:
    return [row[key] for row in model["latency"]]


def _listed(model: Model, key: str, form: str) -> str:
    return ", ".join(f"{row[key]:{form}} at batch {row['batch']}" for row in model["latency"])


def _against_batch(figure: "Figure", panel: "Axes", models: Sequence[Model], label: str) -> None:
    """The batch axis, the other axis' label, and the legend below."""
    batches = _column(models[0], "batch")
    panel.set_xscale("log", base=2)
    panel.set_xticks(batches, [f"{batch:g}" for batch in batches])
    panel.set_xticks([], minor=True)
    panel.margins(x=0.08)
    panel.set(xlabel="images in a batch", ylabel=label)
    figure.legend(
        loc="outside lower left",
        ncols=2 if all(len(model["name"]) <= NAME_LENGTH / 2 for model in models) else 1,
    )


def _with_alpha(quantization: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [
        (depth, module) for depth, module in enumerate(quantization) if module["alpha"] is not None
    ]


def _scale_by_powers(panel: "Axes") -> None:
    """A log scale whose numbers are written out: its own formatter writes formulas."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _by_depth(values: Sequence[tuple[int, str, float]], label: str) -> Callable[["Figure"], None]:
    def draw(figure: "Figure") -> None:
        panel = figure.subplots()
        draw_by_depth(panel, values)
        panel.set_ylabel(label)
        figure.legend(loc="outside lower left", ncols=4)

    return draw
