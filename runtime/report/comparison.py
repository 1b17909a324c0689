"""The comparison of methods and schemes: from the JSON of `marrq compare` (schema marrq.compare/2)
to rows, a table and Markdown.

A run is one scheme, method and calibration seed; a row is all runs of one scheme and method. Only
`summarize` aggregates: the table, the Markdown and the plot show its rows. The spread of a top-1 is
half the distance between the best and the worst seed. It says how much the draw of the calibration
images matters; the interval of each run says how much the draw of the validation images does."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

SCHEMA = "marrq.compare/2"
MEANS = ("agreement", "divergence", "error", "relative_error", "bits_per_weight", "seconds")


@dataclass(frozen=True)
class Row:
    """A method at a scheme: means over its seeds, but for the extremes. top1 … agreement: shares of
    images, 0 … 1.

    …_worst, …_best: of the seeds; divergence: from the float model's answers, in nats
    (runtime/measure/accuracy.py); error: J summed over the modules; relative_error: J over the
    power of the float outputs, mean over the modules; peak_memory_mb: the largest of the seeds,
    None where it could not be had; seeds: how many there are."""

    scheme: str
    method: str
    top1: float
    top1_worst: float
    top1_best: float
    agreement: float
    divergence: float
    divergence_worst: float
    divergence_best: float
    error: float
    relative_error: float
    bits_per_weight: float
    seconds: float
    peak_memory_mb: float | None
    seeds: int

    @property
    def top1_percent(self) -> str:
        """Mean ± spread; a single seed has no spread."""
        spread = f" ± {50 * (self.top1_best - self.top1_worst):.1f}" if self.seeds > 1 else ""
        return f"{100 * self.top1:.1f}{spread}"

    @property
    def divergence_nats(self) -> str:
        """Mean ± spread, likewise, in nats."""
        spread = (
            f" ± {(self.divergence_worst - self.divergence_best) / 2:.3f}" if self.seeds > 1 else ""
        )
        return f"{self.divergence:.3f}{spread}"


def summarize(report: dict[str, Any]) -> list[Row]:
    """A row for each scheme and method, in the order in which they first appear."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        groups.setdefault((run["scheme"], run["method"]), []).append(run)
    return [_row(scheme, method, runs) for (scheme, method), runs in groups.items()]


def _row(scheme: str, method: str, runs: list[dict[str, Any]]) -> Row:
    means = {key: fmean(run[key] for run in runs) for key in MEANS}
    top1, apart = ([run[key] for run in runs] for key in ("top1", "divergence"))
    memory = max(
        (run["peak_memory_mb"] for run in runs if run["peak_memory_mb"] is not None), default=None
    )
    ends = {
        "top1_worst": min(top1),
        "top1_best": max(top1),
        "divergence_worst": max(apart),
        "divergence_best": min(apart),
    }
    return Row(scheme, method, fmean(top1), **means, **ends, peak_memory_mb=memory, seeds=len(runs))


def by_scheme(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each scheme; schemes and rows keep their order."""
    schemes: dict[str, list[Row]] = {}
    for row in rows:
        schemes.setdefault(row.scheme, []).append(row)
    return schemes


def table(report: dict[str, Any]) -> Table:
    """The report for people: a section for each scheme, its best top-1 in bold; fits 100
    columns."""
    legend = "±: half the spread over the seeds; KL: divergence from full precision, nats; ΣJ: summed over the modules; memory: the peak"
    caption = f"{_conditions(report)}\n{legend}"
    result = Table(
        title=escape(report["model"]),
        caption=escape(caption),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("scheme\n  method", overflow="fold")
    for heading in (
        "\ntop-1 %",
        "agree\n%",
        "\nKL",
        "\nΣJ",
        "relative\nerror",
        "bits/\nweight",
        "time\ns",
        "memory\nMB",
        "\nseeds",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for scheme, rows in by_scheme(summarize(report)).items():
        result.add_section()
        result.add_row(scheme)
        best = max(row.top1 for row in rows)
        for row in rows:
            result.add_row(*_cells(row, bold=row.top1 == best))
    return result


def _cells(row: Row, bold: bool) -> list[str | Text]:
    """The row in words, below its scheme."""
    return [
        f"  {row.method}",
        Text(row.top1_percent, style="bold" if bold else ""),
        f"{100 * row.agreement:.1f}",
        f"{row.divergence:.3f}",
        f"{row.error:.3g}",
        f"{row.relative_error:.3g}",
        f"{row.bits_per_weight:.2f}",
        f"{row.seconds:.1f}",
        "–" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
        str(row.seeds),
    ]


def markdown(report: dict[str, Any]) -> str:
    """A table of top-1 and one of the divergence: a row a method, a column a scheme, mean ± spread,
    – where there is no run."""
    rows = summarize(report)
    top1 = {(row.scheme, row.method): row.top1_percent for row in rows}
    apart = {(row.scheme, row.method): row.divergence_nats for row in rows}
    return f"{_crossed('top-1 %', top1)}\n\n{_crossed('KL, nats', apart)}\n\n{_conditions(report)}"


def _crossed(corner: str, cells: dict[tuple[str, str], str]) -> str:
    """A Markdown table of cells by scheme and method."""
    schemes = list(dict.fromkeys(scheme for scheme, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))
    lines = [[corner, *schemes], ["---", *("---:" for _ in schemes)]]
    lines += [
        [method, *(cells.get((scheme, method), "–") for scheme in schemes)] for method in methods
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _conditions(report: dict[str, Any]) -> str:
    """What the numbers are to be read against."""
    reference = report["float"]
    images = f"{reference['images']} images of {report['data']['path']}"
    return f"full precision {100 * reference['top1']:.1f} % on {images}, {report['samples']} calibration images"
