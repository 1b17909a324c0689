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
from rich.table import Table
from rich.text import Text

from runtime.records import Json

SCHEMA = "marrq.compare/2"

HEADINGS = (
    "\nKL",
    "\nΣJ",
    "relative\nerror",
    "bits/\nweight",
    "time\ns",
    "memory\nMB",
    "\nseeds",
)


@dataclass(frozen=True)
class Measure:
    """What the answers of a comparison are judged by. Both are shares, or cosines times 100.

    score, alike: headings of the number that methods are ranked by, and of how like answers are to
    those of the float model. digits: behind the point.
    """

    score: str
    alike: str
    digits: int = 1


MEASURES = {
    "top1": Measure("top-1 %", "agree\n%"),
    "agreement": Measure("agree %", "agree\n%"),
    "knn20": Measure("k-NN %", "neighb.\n%"),
    "cosine": Measure("cosine %", "neighb.\n%", digits=2),
}
"""Top-1 of classifiers, or their agreement with the float model if the classes of the images are
not known; of embeddings the top-1 of k-NN (k = 20), or the mean cosine without classes. Embeddings
are alike by the neighbours that they share."""

LEGEND = (
    "±: half the spread over the seeds; KL: divergence from full precision, nats; ΣJ: summed over "
    "the linears; memory: the peak"
)


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison, as far as people are shown of it."""

    scheme: str
    method: str
    # By the measure of the report, 0 … 1.
    score: float
    alike: float
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

    @classmethod
    def read(cls, run: Json, measure: str) -> "ComparedRun":
        """From the JSON of a run."""
        # A run has more keys than people are shown.
        judged = dict(zip(("score", "alike", "divergence"), _answers(run, measure), strict=True))
        plain = {key: run[key] for key in cls.__dataclass_fields__ if key not in judged}
        return cls(**{**plain, **judged})


def _measure_of(run: Json) -> str:
    """A key of MEASURES."""
    embedding = run.get("embedding")
    if embedding is not None:
        return "cosine" if embedding["retrieval"] is None else "knn20"
    return "top1" if "top1" in run else "agreement"


def _answers(run: Json, measure: str) -> tuple[float, float, float]:
    """Score, how alike answers are, and the divergence."""
    if measure in ("top1", "agreement"):
        return run[measure], run["agreement"], run["divergence"]
    seen, alike = run["embedding"]["retrieval"], run["embedding"]["likeness"]
    score = alike["cosine"] if measure == "cosine" else seen[measure]["share"]
    return score, alike["overlap"], alike["divergence"]


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison, as far as people are shown of it.

    data: where the images are. samples: calibration images of a run. measure: key of MEASURES.
    float_score, float_images: of the float model by that measure, and the number of images.
    """

    model: str
    data: str
    samples: int
    measure: str
    float_score: float
    float_images: int
    runs: tuple[ComparedRun, ...]

    @classmethod
    def read(cls, report: Json) -> "ComparisonReport":
        """From the JSON of schema marrq.compare/2."""
        # All runs are of one model and on the same images, so they have one measure.
        measure = _measure_of(report["runs"][0])
        return cls(
            model=report["model"],
            data=report["data"]["path"],
            samples=report["samples"],
            measure=measure,
            # The float model agrees with itself in everything.
            float_score=report["float"].get(measure, 1.0),
            float_images=report["float"]["images"],
            runs=tuple(ComparedRun.read(run, measure) for run in report["runs"]),
        )

    @property
    def conditions(self) -> str:
        """What the numbers are to be read against."""
        shown, images = MEASURES[self.measure], f"{self.float_images} images of {self.data}"
        full = f"full precision {100 * self.float_score:.{shown.digits}f} % on {images}"
        return f"{full}, {self.samples} calibration images"


@dataclass(frozen=True)
class ComparisonRow:
    """A method at a scheme: means over its seeds.

    Fields of the same name mean what they mean in ComparedRun. …_worst, …_best: of the seeds.
    peak_memory_mb: the largest of the seeds. seeds: how many there are.
    """

    scheme: str
    method: str
    score: float
    score_worst: float
    score_best: float
    alike: float
    divergence: float
    divergence_worst: float
    divergence_best: float
    error: float
    relative_error: float
    bits_per_weight: float
    seconds: float
    peak_memory_mb: float | None
    seeds: int

    def score_percent(self, digits: int) -> str:
        """Mean ± spread; a single seed has no spread."""
        half = 50 * (self.score_best - self.score_worst)
        spread = f" ± {half:.{digits}f}" if self.seeds > 1 else ""
        return f"{100 * self.score:.{digits}f}{spread}"

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
    scores = [run.score for run in runs]
    divergences = [run.divergence for run in runs]
    # A run on a system that does not tell its memory has none.
    memories = [run.peak_memory_mb for run in runs if run.peak_memory_mb is not None]
    return ComparisonRow(
        scheme=runs[0].scheme,
        method=runs[0].method,
        score=fmean(scores),
        score_worst=min(scores),
        score_best=max(scores),
        alike=fmean(run.alike for run in runs),
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
    """The report for people: a section for each scheme, its best score in bold. Fits 100
    columns."""
    shown = MEASURES[report.measure]
    result = Table(
        title=report.model,
        caption=f"{report.conditions}\n{LEGEND}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    result.add_column("scheme\n  method", overflow="fold")
    for heading in (f"\n{shown.score}", shown.alike, *HEADINGS):
        result.add_column(heading, justify="right", no_wrap=True)
    for scheme, rows in by_scheme(summarize(report)).items():
        result.add_section()
        result.add_row(scheme)
        # Of its scheme: methods are compared at the same bits.
        best = max(row.score for row in rows)
        for row in rows:
            score = row.score_percent(shown.digits)
            result.add_row(*_cells(row, Text(score, style="bold" if row.score == best else "")))
    return result


def _cells(row: ComparisonRow, score: Text) -> list[str | Text]:
    """The row in words, under its scheme."""
    return [
        f"  {row.method}",
        score,
        f"{100 * row.alike:.1f}",
        f"{row.divergence:.3f}",
        f"{row.error:.3g}",
        f"{row.relative_error:.3g}",
        f"{row.bits_per_weight:.2f}",
        f"{row.seconds:.1f}",
        "–" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
        str(row.seeds),
    ]


def markdown(report: ComparisonReport) -> str:
    """A table of scores and a table of the divergence: a row a method, a column a scheme, mean ±
    spread; – if there is no run."""
    rows, shown = summarize(report), MEASURES[report.measure]
    scores = {(row.scheme, row.method): row.score_percent(shown.digits) for row in rows}
    divergences = {(row.scheme, row.method): row.divergence_nats for row in rows}
    tables = (_crossed(shown.score, scores), _crossed("KL, nats", divergences))
    return "\n\n".join((*tables, report.conditions))


def _crossed(corner: str, cells: dict[tuple[str, str], str]) -> str:
    """A Markdown table of cells by scheme and method."""
    schemes = list(dict.fromkeys(scheme for scheme, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))
    lines = [[corner, *schemes], ["---", *("---:" for _ in schemes)]]
    for method in methods:
        lines.append([method, *(cells.get((scheme, method), "–") for scheme in schemes)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
