"""The comparison of methods and schemes: from the JSON of `marrq compare` (schema marrq.compare/2)
to rows, a table and Markdown.

A run is one scheme, method and calibration seed; a row is all runs of one scheme and method. Only
`summarize` aggregates: table, Markdown and plot show its rows. The spread of a number is half the
distance between the best and the worst seed. It says how much the draw of the calibration images
matters; the interval of each run says how much the draw of the validation images does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from runtime.records import Json

SCHEMA = "marrq.compare/2"

HEADINGS = (
    "\ntop-1 %",
    "agree\n%",
    "\nKL",
    "\nΣJ",
    "relative\nerror",
    "bits/\nweight",
    "time\ns",
    "memory\nMB",
    "\nseeds",
)
LEGEND = (
    "±: half the spread over the seeds; KL: divergence from full precision, nats; ΣJ: summed over "
    "the linears; memory: the peak"
)


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison, as far as people are shown of it."""

    scheme: str
    method: str
    # Shares of images.
    top1: float
    agreement: float
    # From the float model, in nats.
    divergence: float
    # J summed over the linears.
    error: float
    # J over the power of the wanted outputs, mean over the linears.
    relative_error: float
    bits_per_weight: float
    # Of quantizing.
    seconds: float
    # None if the system does not tell.
    peak_memory_mb: float | None


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison, as far as people are shown of it.

    data: where the images are. samples: calibration images of a run.
    float_top1, float_images: accuracy of the float model, and the number of images.
    """

    model: str
    data: str
    samples: int
    float_top1: float
    float_images: int
    runs: tuple[ComparedRun, ...]

    @classmethod
    def read(cls, report: Json) -> "ComparisonReport":
        """From the JSON of schema marrq.compare/2."""
        # A run has more keys than people are shown.
        keys = tuple(ComparedRun.__dataclass_fields__)
        return cls(
            model=report["model"],
            data=report["data"]["path"],
            samples=report["samples"],
            float_top1=report["float"]["top1"],
            float_images=report["float"]["images"],
            runs=tuple(ComparedRun(**{key: run[key] for key in keys}) for run in report["runs"]),
        )

    @property
    def conditions(self) -> str:
        """What the numbers are to be read against."""
        images = f"{self.float_images} images of {self.data}"
        full = f"full precision {100 * self.float_top1:.1f} % on {images}"
        return f"{full}, {self.samples} calibration images"


@dataclass(frozen=True)
class ComparisonRow:
    """A method at a scheme: means over its seeds.

    Fields of the same name mean what they mean in ComparedRun. …_worst, …_best: of the seeds.
    peak_memory_mb: the largest of the seeds. seeds: how many there are.
    """

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
        """Mean ± spread in nats; a single seed has no spread."""
        half = (self.divergence_worst - self.divergence_best) / 2
        return f"{self.divergence:.3f}{f' ± {half:.3f}' if self.seeds > 1 else ''}"


def summarize(report: ComparisonReport) -> list[ComparisonRow]:
    """A row for each scheme and method, in the order in which they first appear."""
    # A dict keeps the order in which schemes and methods first appear.
    groups: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in report.runs:
        groups.setdefault((run.scheme, run.method), []).append(run)
    return [_row(runs) for runs in groups.values()]


def _row(runs: list[ComparedRun]) -> ComparisonRow:
    """The runs of one scheme and method as a row."""
    top1 = [run.top1 for run in runs]
    divergences = [run.divergence for run in runs]
    # A run on a system that does not tell its memory has none.
    memories = [run.peak_memory_mb for run in runs if run.peak_memory_mb is not None]
    return ComparisonRow(
        scheme=runs[0].scheme,
        method=runs[0].method,
        top1=fmean(top1),
        top1_worst=min(top1),
        top1_best=max(top1),
        agreement=fmean(run.agreement for run in runs),
        divergence=fmean(divergences),
        # Of a divergence the largest is the worst.
        divergence_worst=max(divergences),
        divergence_best=min(divergences),
        error=fmean(run.error for run in runs),
        relative_error=fmean(run.relative_error for run in runs),
        bits_per_weight=fmean(run.bits_per_weight for run in runs),
        seconds=fmean(run.seconds for run in runs),
        peak_memory_mb=max(memories, default=None),
        seeds=len(runs),
    )


def by_scheme(rows: Iterable[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    """The rows of each scheme; schemes and rows keep their order."""
    schemes: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        schemes.setdefault(row.scheme, []).append(row)
    return schemes


def table(report: ComparisonReport) -> Table:
    """The report for people: a section for each scheme, its best top-1 in bold. Fits 100
    columns."""
    result = Table(
        title=escape(report.model),
        caption=escape(f"{report.conditions}\n{LEGEND}"),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("scheme\n  method", overflow="fold")
    for heading in HEADINGS:
        result.add_column(heading, justify="right", no_wrap=True)
    for scheme, rows in by_scheme(summarize(report)).items():
        result.add_section()
        result.add_row(scheme)
        # Of its scheme: methods are compared at the same bits.
        best = max(row.top1 for row in rows)
        for row in rows:
            result.add_row(*_cells(row, bold=row.top1 == best))
    return result


def _cells(row: ComparisonRow, bold: bool) -> list[str | Text]:
    """The row in words, under its scheme."""
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


def markdown(report: ComparisonReport) -> str:
    """A table of top-1 and a table of the divergence: a row a method, a column a scheme, mean ±
    spread; – if there is no run."""
    rows = summarize(report)
    top1 = {(row.scheme, row.method): row.top1_percent for row in rows}
    divergences = {(row.scheme, row.method): row.divergence_nats for row in rows}
    tables = (_crossed("top-1 %", top1), _crossed("KL, nats", divergences))
    return "\n\n".join((*tables, report.conditions))


def _crossed(corner: str, cells: dict[tuple[str, str], str]) -> str:
    """A Markdown table of cells by scheme and method."""
    schemes = list(dict.fromkeys(scheme for scheme, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))
    lines = [[corner, *schemes], ["---", *("---:" for _ in schemes)]]
    for method in methods:
        lines.append([method, *(cells.get((scheme, method), "–") for scheme in schemes)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
