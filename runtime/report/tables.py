"""What the bench's report says, for people in a terminal: tables, and sentences below them. Nothing
is measured or computed here."""

import math
from collections.abc import Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from runtime.measure.accuracy import Accuracy
from runtime.measure.bench import BenchReport
from runtime.measure.measured import ComparedLatency, MeasuredModel, reference_of
from runtime.measure.parity import Parity
from runtime.report.inspection import reasons


def tables(report: BenchReport) -> list[Table]:
    """All tables of a report: models, throughput if it was measured, and parity of each model that
    has it."""
    found = [models_table(report)]
    if any(model.throughput for model in report.models):
        found.append(throughput_table(report))
    return found + [
        parity_table(model.name, model.parity) for model in report.models if model.parity
    ]


def models_table(report: BenchReport) -> Table:
    """A row for each model; fits 80 columns with two batch sizes. A positive drop is a loss. What
    needs a baseline stands in the table if there is one."""
    images = f"{report.data.images} images of {report.data.path}"
    reference = reference_of(report.models)
    baseline = None if reference is None else reference.flavor
    # Whether any model can be set beside another: on the same images, and beside float32.
    loses = any(model.against is not None for model in report.models)
    agrees = any(model.alike is not None for model in report.models)
    ms = "ms" if baseline is None else f"ms (× {baseline})"
    headings = (
        "top-1 % (95 %)\ndrop (95 %)" if loses else "top-1 %\n(95 %)",
        *(["agree\n%"] if agrees else []),
        "\nMB",
        "bits/\nweight",
        *(f"batch {row.batch}\n{ms}" for row in report.models[0].latency),
    )
    caption = f"{images}, ONNX Runtime {report.environment.onnxruntime}"
    result = _empty_table(caption, "\nmodel", headings)
    for model in report.models:
        result.add_row(
            model.name,
            _top1(model),
            *([_share(model.alike)] if agrees else []),
            f"{model.size_bytes / 1e6:.2f}",
            f"{model.bits_per_weight:.2f}",
            *(_time(row, baseline) for row in model.latency),
        )
    return result


def accuracy_table(accuracies: Mapping[str, Accuracy], images: str) -> Table:
    """A row for each model by its name; the first one is what the others are compared with.

    images: name of the image set.
    """
    headings = ("\ntop-1 % (95 %)", "\ntop-5 %", "agree\n%", "\ndivergence")
    count = next(iter(accuracies.values())).images
    result = _empty_table(f"{count} images of {images}", "\nmodel", headings)
    for place, (name, accuracy) in enumerate(accuracies.items()):
        # The agreement of the first model with itself would say nothing.
        own = place == 0 or accuracy.agreement is None or accuracy.divergence is None
        result.add_row(
            name,
            _percent(accuracy),
            f"{100 * accuracy.top5:.1f}",
            "–" if own else f"{100 * (accuracy.agreement or 0):.1f}",
            "–" if own else f"{accuracy.divergence:.4f}",
        )
    return result


def throughput_table(report: BenchReport) -> Table:
    """Images per second: a row for each model and batch size, a column for each number of
    threads."""
    # All models were measured with the same numbers of threads.
    threads = list(dict.fromkeys(row.threads for row in report.models[0].throughput))
    headings = ("\nbatch", *(f"threads\n{number}" for number in threads))
    result = _empty_table("images per second", "\nmodel", headings)
    for model in report.models:
        # Rows come in the order of threads, then batches; the table has batches as rows.
        by_batch: dict[int, list[str]] = {}
        for row in model.throughput:
            by_batch.setdefault(row.batch, []).append(f"{row.images_per_s:.1f}")
        for batch, rates in by_batch.items():
            result.add_row(model.name, str(batch), *rates)
    return result


def parity_table(name: str, parity: Parity) -> Table:
    """What each stage does to a model's logits on the way to a served file."""
    headings = ("cosine\nleast", "\nmedian", "same\ntop-1 %", "top-1 %\nbefore, after")
    caption = f"parity of {name}, {parity.images} images"
    result = _empty_table(caption, "\nstage", headings)
    for stage in parity.stages:
        result.add_row(
            stage.stage,
            f"{stage.least_cosine:.5f}",
            f"{stage.median_cosine:.5f}",
            f"{100 * stage.agreement:.1f}",
            f"{100 * stage.top1_source:.1f}, {100 * stage.top1_target:.1f}",
        )
    return result


def sentences(report: BenchReport) -> list[str]:
    """What is to be read below the tables.

    In this order: warnings of the run, models without finite logits, linears that do not run as
    their scheme says, nodes that fell back to another provider, what parity says, the gate's
    verdicts, and the recommendation.
    """
    # What is wrong comes first, what is advised comes last.
    found = list(report.warnings)
    for model in report.models:
        if model.not_finite is not None:
            found.append(f"{model.name} {model.not_finite.sentence}")
    found += shortfalls(report)
    for model in report.models:
        found += _fallbacks(model)
    for model in report.models:
        if model.parity is not None:
            found += _parity_sentences(model.name, model.parity)
    if report.gate is not None:
        found += [verdict.sentence for verdict in report.gate.models]
    if report.recommendation is not None:
        found += [choice.sentence for choice in report.recommendation.values()]
    return found


def shortfalls(report: BenchReport) -> Iterator[str]:
    """A sentence for each reason why linears of a candidate do not run as their scheme says."""
    for model in report.models:
        # Baselines have no scheme that could be missed.
        if model.is_candidate:
            yield from (f"{model.name}: {reason}" for reason in reasons(model.audit))


def _fallbacks(model: MeasuredModel) -> list[str]:
    """How many nodes ran on each provider, if there is more than one."""
    if len(model.executed_on) < 2:
        return []
    nodes = sum(model.executed_on.values())
    return [
        f"{model.name}: {count} of {nodes} nodes ran on {provider}"
        for provider, count in model.executed_on.items()
    ]


def _parity_sentences(name: str, parity: Parity) -> list[str]:
    """The first stage that loses, why each stage loses, and how far linears and logits may be
    trusted to tell."""
    # Named also if it is small: it shows how far the file is from losing. NaN is the worst.
    worst = max(
        parity.linears, key=lambda row: (math.isnan(row.relative_error), row.relative_error)
    )
    losses = [f"{stage.stage} loses: {stage.loss}" for stage in parity.stages if stage.loss]
    return [
        f"{name}: the first stage that loses is {parity.first_loss or 'none'}",
        *losses,
        "the largest relative error of a linear on torch's input is "
        f"{worst.relative_error:.1e}, at {worst.linear}",
        f"with pixels nudged by a millionth torch is at {parity.nudged.least_cosine:.5f} (least), "
        f"{parity.nudged.median_cosine:.5f} of itself",
    ]


def _empty_table(caption: str, first: str, headings: tuple[str, ...]) -> Table:
    """A first column that folds, and a column to the right for each heading that does not."""
    result = Table(
        caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    result.add_column(first, min_width=11, overflow="fold")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    return result


def _top1(model: MeasuredModel) -> str:
    """Top-1, and on a second line what it loses against the baseline, in points."""
    if model.accuracy is None:
        return "–" if model.not_finite is None else "NaN or infinite"
    top1 = _percent(model.accuracy)
    against = model.against
    if against is None:
        return top1
    low, drop, high = (100 * x for x in (against.drop_low, against.drop, against.drop_high))
    return f"{top1}\n{drop:.1f} ({low:.1f}…{high:.1f})"


def _percent(accuracy: Accuracy) -> str:
    """Top-1 with its 95 % interval, in percent."""
    low, top1, high = (100 * x for x in (accuracy.top1_low, accuracy.top1, accuracy.top1_high))
    return f"{top1:.1f} ({low:.1f}–{high:.1f})"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _time(latency: ComparedLatency, baseline: str | None) -> str:
    """The median, and its ratio to the baseline of that flavour if there is one."""
    if baseline is None:
        return f"{latency.p50_ms:.2f}"
    ratio = latency.ratio(baseline)
    return f"{latency.p50_ms:.2f} ({'–' if ratio is None else f'{ratio:.2f}'})"
