"""What the bench's report says, for people in a terminal: tables, and sentences below them. Nothing
is measured or computed here."""

import math
from collections.abc import Iterator

from rich.table import Table

from runtime.measure.bench import BenchReport
from runtime.measure.measured import (
    COSINE,
    KNN_TOP1,
    TOP1,
    ComparedLatency,
    MeasuredModel,
    reference_of,
)
from runtime.measure.parity import Parity
from runtime.report.answers import (
    embedding_tables,
    empty_table,
    interval,
    lost,
    output_table,
    share,
)
from runtime.report.inspection import reasons

MEASURES = {TOP1: "top-1 %", KNN_TOP1: "k-NN %", COSINE: "cosine"}
"""Headings of the scores that stand in the table of models."""


def tables(report: BenchReport) -> list[Table]:
    """All tables of a report: models, embeddings and other outputs if there are any, throughput if
    it was measured, and parity of each model that has it."""
    found = [models_table(report), *answer_tables(report)]
    if any(model.throughput for model in report.models):
        found.append(throughput_table(report))
    return found + [
        parity_table(model.name, model.parity) for model in report.models if model.parity
    ]


def models_table(report: BenchReport) -> Table:
    """A row for each model; fits 80 columns with two batch sizes. A positive drop is a loss. What
    needs a baseline stands in the table if there is one."""
    images = _images(report)
    reference = reference_of(report.models)
    baseline = None if reference is None else reference.flavor
    # Whether any model can be set beside another: on the same images, and beside float32.
    loses = any(model.against is not None for model in report.models)
    agrees = any(model.alike is not None for model in report.models)
    ms = "ms" if baseline is None else f"ms (× {baseline})"
    # One model gives embeddings or dense outputs, so all do.
    scores = [model.score for model in report.models if model.score is not None]
    measure = MEASURES.get(scores[0].measure, "top-1 %") if scores else "top-1 %"
    headings = (
        f"{measure} (95 %)\ndrop (95 %)" if loses else f"{measure}\n(95 %)",
        *(["agree\n%"] if agrees else []),
        "\nMB",
        "bits/\nweight",
        *(f"batch {row.batch}\n{ms}" for row in report.models[0].latency),
    )
    caption = f"{images}, ONNX Runtime {report.environment.onnxruntime}"
    result = empty_table(caption, "\nmodel", headings)
    for model in report.models:
        result.add_row(
            model.name,
            _top1(model),
            *([share(model.alike)] if agrees else []),
            f"{model.size_bytes / 1e6:.2f}",
            f"{model.bits_per_weight:.2f}",
            *(_time(row, baseline) for row in model.latency),
        )
    return result


def answer_tables(report: BenchReport) -> list[Table]:
    """What the table of models has no room for: embeddings, and outputs beside them."""
    images, found = _images(report), list[Table]()
    embeddings = {one.name: one.embedding for one in report.models if one.embedding is not None}
    if embeddings:
        found += embedding_tables(embeddings, images)
    outputs = {one.name: one.outputs for one in report.models if one.outputs}
    return [*found, output_table(outputs, images)] if outputs else found


def throughput_table(report: BenchReport) -> Table:
    """Images per second: a row for each model and batch size, a column for each number of
    threads."""
    # All models were measured with the same numbers of threads.
    threads = list(dict.fromkeys(row.threads for row in report.models[0].throughput))
    headings = ("\nbatch", *(f"threads\n{number}" for number in threads))
    result = empty_table("images per second", "\nmodel", headings)
    for model in report.models:
        # Rows come in the order of threads, then batches; the table has batches as rows.
        by_batch: dict[int, list[str]] = {}
        for row in model.throughput:
            by_batch.setdefault(row.batch, []).append(f"{row.images_per_s:.1f}")
        for batch, rates in by_batch.items():
            result.add_row(model.name, str(batch), *rates)
    return result


def parity_table(name: str, parity: Parity) -> Table:
    """What each stage does to a model's outputs on the way to a served file."""
    headings = ("cosine\nleast", "\nmedian", "same\ntop-1 %", "top-1 %\nbefore, after")
    caption = f"parity of {name}, {parity.images} images"
    result = empty_table(caption, "\nstage", headings)
    several = len({stage.output for stage in parity.stages}) > 1
    for stage in parity.stages:
        result.add_row(
            f"{stage.stage}, {stage.output}" if several else stage.stage,
            f"{stage.least_cosine:.5f}",
            f"{stage.median_cosine:.5f}",
            share(stage.agreement),
            f"{share(stage.top1_source)}, {share(stage.top1_target)}",
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
    first = f"{name}: the first stage that loses is {parity.first_loss or 'none'}"
    # Dense outputs have no classes; those of the logits tell.
    top1 = [stage.top1_target for stage in parity.stages if stage.stage == "quantization"]
    if top1 and all(share is None for share in top1):
        first += "; what quantization loses cannot be told without classes"
    return [
        first,
        *losses,
        "the largest relative error of a linear on torch's input is "
        f"{worst.relative_error:.1e}, at {worst.linear}",
        f"with pixels nudged by a millionth torch is at {parity.nudged.least_cosine:.5f} (least), "
        f"{parity.nudged.median_cosine:.5f} of itself",
    ]


def _images(report: BenchReport) -> str:
    return f"{report.data.images} images of {report.data.path}"


def _top1(model: MeasuredModel) -> str:
    """Top-1, of k-NN for embeddings, and on a second line what is lost of it, in points; without
    classes the least mean cosine."""
    score = model.score
    if model.not_finite is not None:
        return "NaN or infinite"
    # The agreement has a column of its own.
    if score is None or score.measure not in MEASURES:
        return "–"
    if score.right is None:
        return f"{score.value:.4f}\n({score.low:.4f}–{score.high:.4f})"
    top1 = interval(score.low, score.value, score.high)
    return top1 if model.against is None else f"{top1}\n{lost(model.against)}"


def _time(latency: ComparedLatency, baseline: str | None) -> str:
    """The median, and its ratio to the baseline of that flavour if there is one."""
    if baseline is None:
        return f"{latency.p50_ms:.2f}"
    ratio = latency.ratio(baseline)
    return f"{latency.p50_ms:.2f} ({'–' if ratio is None else f'{ratio:.2f}'})"
