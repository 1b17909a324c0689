"""The page of accuracy at low bits: methods, numbers of calibration images, settings.

Its reports are comparisons of `marrq compare`. `methods` has the methods side by side, each
`images N` runs of `marr` with N calibration images, and each `settings N` runs with one setting
changed. Each `refined` is of `marrq evaluate`.
"""

from collections.abc import Iterable

from layout import Json, comparison, page, table

from runtime.report.comparison import ComparisonReport, ComparisonRow, summarize

HEADINGS = ("divergence, nats", "top-1, %", "draws")


def accuracy_at_low_bits(record: Json) -> str:
    """The page that the record gives."""
    compared = {key: one for key, one in record["reports"].items() if "runs" in one}
    evaluated = [one for key, one in record["reports"].items() if key.startswith("refined")]
    reports = {label: comparison(one) for label, one in compared.items()}
    methods = reports["methods"]
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
        With {methods.samples} calibration images, the default. W3A3 and W2A4 have an activation
        range for each token, the others static ranges.""",
        _methods(summarize(methods)),
        _ahead(summarize(methods)),
        "## Number of calibration images",
        """
        Calibration needs no labels, so images are cheap. What they cost is time, and memory for
        their tokens. Seconds are those of quantizing on one core, of the fastest draw, since the
        core was shared with other work.""",
        _by_images(reports, "images"),
        "## Settings",
        """
        `marr` as it is, and with one setting changed. `token-weights=off` counts every token alike;
        `alpha=closed` finds α without a search. One draw each: the two ways to find α differ by no
        more than chance.""",
        _by_images(reports, "settings", timed=False),
        "## Refined",
        """
        `marrq quantize --refine` behind `marr`, one draw: back-propagation on images that neither
        calibrated nor judge; the codes stay. No other row of this page uses back-propagation.
        Brackets hold 95 % intervals.""",
        table(
            ["model", "divergence, nats", "top-1, %"],
            [cells for report in evaluated for cells in _refined(report)],
        ),
    )


def _refined(report: Json) -> list[list[str]]:
    """A row for each model but the float one."""
    return [
        [
            f"`{title}`",
            f"{model['divergence']:.3f}",
            f"{100 * model['top1']:.1f} "
            f"({100 * model['top1_low']:.1f} … {100 * model['top1_high']:.1f})",
        ]
        for title, model in report["models"].items()
        if title != "float"
    ]


def _methods(rows: Iterable[ComparisonRow]) -> str:
    """A row for each scheme and method."""
    cells = [[row.scheme, f"`{_short(row.method)}`", *_figures(row)] for row in rows]
    cells.sort(key=lambda line: line[0])
    return table(["scheme", "method", *HEADINGS], cells)


def _by_images(reports: dict[str, ComparisonReport], kind: str, timed: bool = True) -> str:
    """A row for each scheme, number of images and method, of the reports whose label says so.
    timed: whether rows have seconds."""
    chosen = [report for label, report in reports.items() if label.startswith(kind)]
    cells = [
        [
            row.scheme,
            f"`{_short(row.method)}`",
            f"{report.samples:,}",
            *_figures(row),
            *([_fastest(row, report)] if timed else []),
        ]
        for report in sorted(chosen, key=lambda report: report.samples)
        for row in summarize(report)
    ]
    cells.sort(key=lambda line: line[0])
    return table(["scheme", "method", "images", *HEADINGS, *(["s"] if timed else [])], cells)


def _ahead(rows: list[ComparisonRow]) -> str:
    """A sentence: by how much `marr` is ahead of `gptq` at each scheme that both have."""
    found = {(row.scheme, _short(row.method)): row for row in rows}
    gains = [
        f"{100 * (row.score - found[scheme, 'gptq'].score):+.1f} points and "
        f"{row.divergence - found[scheme, 'gptq'].divergence:+.3f} nats at {scheme}"
        for (scheme, method), row in found.items()
        if method == "marr" and (scheme, "gptq") in found
    ]
    return f"`marr` beside `gptq`: {', '.join(gains)}."


def _figures(row: ComparisonRow) -> list[str]:
    """The cells under HEADINGS."""
    return [row.divergence_nats, row.score_percent(1), str(row.seeds)]


def _fastest(row: ComparisonRow, report: ComparisonReport) -> str:
    """Seconds of the fastest run of a row."""
    key = (row.scheme, row.method)
    return f"{min(run.seconds for run in report.runs if (run.scheme, run.method) == key):.0f}"


def _short(method: str) -> str:
    """`marr`, as people write it; the full name is marr-stream."""
    return method.replace("marr-stream", "marr")
