"""The page of accuracy at low bits: methods, calibration images, token weights, settings.

Its reports are comparisons of `marrq compare`. Each `methods_SCHEME` has methods side by side, each
`imagesN` runs of `marr` with N calibration images. `settings` has runs of `marr` with one setting
changed, `pooled` and `features` those of models that read their tokens otherwise. `shift_emoji` and
`shift_food` have the same methods, calibrated on images like those that judge and on others.
"""

from collections.abc import Iterable
from dataclasses import replace

from layout import Json, comparison, first_draws, joined, page, table

from marrq.methods.registry import METHODS
from runtime.report.comparison import MEASURES, ComparisonReport, ComparisonRow, summarize

HEADINGS = ("divergence, nats", "top-1, %", "draws")
MARR, WEIGHTS_OFF, W2A8 = "marr-stream", ",token-weights=off", "W2A8 per-tensor"
READERS = {
    "methods": "the class token, by a head",
    "pooled": "the mean of the patches, by a head",
    "features": "the class token, without a head",
}
"""The models, by what reads their tokens."""


def accuracy_at_low_bits(record: Json) -> str:
    """The page that the record gives."""
    reports = record["reports"]
    compared = {label: comparison(one) for label, one in reports.items() if "runs" in one}
    methods = joined([one for label, one in compared.items() if label.startswith("methods")])
    rows = summarize(methods)
    images = [one for label, one in compared.items() if label.startswith("images")]
    return page(
        record,
        "Accuracy at low bits: methods, images, settings",
        f"""
        A real DINOv2 ViT-S/14 (112 px, 99 classes of emoji) is quantized on images of two vendors
        and judged on {methods.float_images} images of a third, in torch. Full precision has a
        top-1 of {100 * methods.float_score:.1f} %. The divergence is that of the classes'
        probabilities from those of full precision (Kullback-Leibler). Every image counts in it, so
        it tells two models apart sooner than top-1 does. Figures are means over random draws of the
        calibration images, ± half the distance between the best and the worst draw.""",
        "## Methods",
        f"""
        With {methods.samples:,} calibration images, the default. Activations of 3 and 4 bits have a
        range for each token, others a static one. `rotate=0` rotates the residual stream.""",
        _methods(rows),
        _ahead(summarize(first_draws(methods))),
        "## Number of calibration images",
        """
        Calibration needs no labels, so images are cheap. What they cost is time, and memory for
        their tokens. Seconds are those of quantizing on one core, of the fastest draw; the other
        core was measuring too.""",
        _by_images([*images, _like(methods, images)]),
        "## Settings",
        """
        `marr` as it is, and with one setting changed, one draw of the same images.
        `token-weights=off` counts every token alike.""",
        _settings(methods, compared["settings"]),
        "## Token weights and what reads the tokens",
        """
        Tokens are weighed by what their errors cost the output. Three models of the same backbone
        differ in what reads their last tokens. One draw each; the model without a head is judged by
        k-NN in place of top-1, and by the divergence of the votes.""",
        _readers({**compared, "methods": methods}, compared["settings"]),
        "## Calibration on other pictures",
        f"""
        The same methods, calibrated on {compared["shift_emoji"].samples} emoji and on as many
        photographs of food, which look like nothing that they are judged on. One draw each. Take
        images like those to come: at few bits nothing else costs as much.""",
        _shifted(compared["shift_emoji"], compared["shift_food"]),
    )


def _methods(rows: Iterable[ComparisonRow]) -> str:
    """A row for each scheme and method, the methods in the order of the registry."""
    names = list(METHODS)
    ordered = sorted(rows, key=lambda row: (row.scheme, names.index(row.method.split(",")[0])))
    cells = [[row.scheme, _short(row.method), *_figures(row)] for row in ordered]
    return table(["scheme", "method", *HEADINGS], cells)


def _like(methods: ComparisonReport, images: list[ComparisonReport]) -> ComparisonReport:
    """The runs of the schemes and methods that other numbers of images were measured with."""
    wanted = {(run.scheme, run.method) for one in images for run in one.runs}
    runs = tuple(run for run in methods.runs if (run.scheme, run.method) in wanted)
    return replace(methods, runs=runs)


def _by_images(reports: list[ComparisonReport]) -> str:
    """A row for each scheme and number of images."""
    cells = [
        [row.scheme, f"{report.samples:,}", *_figures(row), _fastest(row, report)]
        for report in sorted(reports, key=lambda report: report.samples)
        for row in summarize(report)
    ]
    cells.sort(key=lambda line: line[0])
    return table(["scheme", "images", *HEADINGS, "s"], cells)


def _settings(methods: ComparisonReport, changed: ComparisonReport) -> str:
    """A row for each scheme and setting; of the methods the first draw, as of the others."""
    plain = [run for run in first_draws(methods).runs if run.method == MARR]
    schemes = {run.scheme for run in changed.runs}
    runs = (*(run for run in plain if run.scheme in schemes), *changed.runs)
    cells = [
        [row.scheme, _short(row.method), *_figures(row)[:2]]
        for row in summarize(replace(methods, runs=runs))
    ]
    cells.sort(key=lambda line: line[0])
    return table(["scheme", "method", *HEADINGS[:2]], cells)


def _readers(reports: dict[str, ComparisonReport], settings: ComparisonReport) -> str:
    """A row for each model: divergence and score with weights and without."""
    cells = []
    for label, words in READERS.items():
        report = reports[label]
        # The model with a head on its class token has its runs in two reports.
        both = report if label != "methods" else joined([first_draws(report), settings])
        of_scheme = [row for row in summarize(both) if row.scheme == W2A8]
        weighed, alike = (
            next(row for row in of_scheme if row.method == MARR + ending)
            for ending in ("", WEIGHTS_OFF)
        )
        score = MEASURES[report.measure].score.removesuffix(" %")
        cells.append(
            [
                words,
                f"{alike.divergence:.3f}",
                f"{weighed.divergence:.3f}",
                f"{score} {100 * alike.score:.1f}",
                f"{100 * weighed.score:.1f}",
            ]
        )
    headings = ["what is read", "divergence, all tokens alike", "weighed"]
    return table([*headings, "score, %, all tokens alike", "weighed"], cells)


def _shifted(own: ComparisonReport, other: ComparisonReport) -> str:
    """A row for each scheme and method: both calibrations and what the other one loses."""
    found = {(row.scheme, row.method): row for row in summarize(other)}
    cells = []
    for row in summarize(own):
        shifted = found[row.scheme, row.method]
        cells.append(
            [
                row.scheme,
                _short(row.method),
                f"{row.divergence:.3f}",
                f"{shifted.divergence:.3f}",
                f"{100 * row.score:.1f}",
                f"{100 * shifted.score:.1f}",
                f"{100 * (row.score - shifted.score):.1f}",
            ]
        )
    cells.sort(key=lambda line: line[0])
    headings = ["divergence, emoji", "food", "top-1, %, emoji", "food", "lost, points"]
    return table(["scheme", "method", *headings], cells)


def _ahead(rows: list[ComparisonRow]) -> str:
    """A sentence: by how much `marr` is ahead of `gptq` at each scheme that both have. rows: of
    the same draw."""
    found = {(row.scheme, row.method): row for row in rows}
    gains = [
        f"{100 * (row.score - found[scheme, 'gptq'].score):+.1f} points and "
        f"{row.divergence - found[scheme, 'gptq'].divergence:+.3f} nats at {scheme}"
        for (scheme, method), row in found.items()
        if method == MARR and (scheme, "gptq") in found
    ]
    return f"`marr` beside `gptq`, on the first draw: {', '.join(gains)}."


def _figures(row: ComparisonRow) -> list[str]:
    """The cells under HEADINGS."""
    return [row.divergence_nats, row.score_percent(1), str(row.seeds)]


def _fastest(row: ComparisonRow, report: ComparisonReport) -> str:
    """Seconds of the fastest run of a row."""
    key = (row.scheme, row.method)
    return f"{min(run.seconds for run in report.runs if (run.scheme, run.method) == key):.0f}"


def _short(method: str) -> str:
    """`marr`, as people write it; the full name is marr-stream."""
    return f"`{method.replace('marr-stream', 'marr')}`"
