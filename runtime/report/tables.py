"""What the bench's JSON (schema marrq.bench/2, made by runtime/measure/bench.py) says, for people.
Nothing is measured or computed here."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from runtime.report.inspection import shortfalls


def tables(report: dict[str, Any]) -> list[Table]:
    """All tables of a report: models, throughput and parity of those that have it."""
    throughput = any(model["throughput"] for model in report["models"])
    parities = [parity_table(model) for model in report["models"] if model["parity"] is not None]
    return [table(report), *([throughput_table(report)] if throughput else []), *parities]


def below_tables(report: dict[str, Any]) -> list[str]:
    """All sentences of a report: linears that do not run as their scheme says, then the rest."""
    return [*shortfalls(report), *sentences(report)]


def table(report: dict[str, Any]) -> Table:
    """The report for people; fits 80 columns with two batch sizes. A positive drop is a loss."""
    caption = f"{report['data']['images']} images of {report['data']['path']}, ONNX Runtime {report['environment']['onnxruntime']}"
    batches = [row["batch"] for row in report["models"][0]["latency"]]
    headings = (
        "top-1 % (95 %)\ndrop (95 %)",
        "agree\n%",
        "\nMB",
        "bits/\nweight",
        *(f"batch {batch}\nms (× fp32)" for batch in batches),
    )
    result = _empty_table(caption, "\nmodel", headings)
    for model in report["models"]:
        accuracy = model["accuracy"]
        result.add_row(
            model["name"],
            _top1(accuracy),
            "–" if accuracy["agreement"] is None else f"{100 * accuracy['agreement']:.1f}",
            f"{model['size_bytes'] / 1e6:.2f}",
            f"{model['bits_per_weight']:.2f}",
            *(
                f"{row['p50_ms']:.2f} "
                f"({'–' if row['ratio_fp32'] is None else format(row['ratio_fp32'], '.2f')})"
                for row in model["latency"]
            ),
        )
    return result


def throughput_table(report: dict[str, Any]) -> Table:
    """Images per second: a row for each model and batch size, a column for each number of
    threads."""
    threads = list(dict.fromkeys(row["threads"] for row in report["models"][0]["throughput"]))
    result = _empty_table(
        "images per second", "\nmodel", ("\nbatch", *(f"threads\n{number}" for number in threads))
    )
    for model in report["models"]:
        by_batch: dict[int, list[str]] = {}
        for row in model["throughput"]:
            by_batch.setdefault(row["batch"], []).append(f"{row['images_per_s']:.1f}")
        for batch, rates in by_batch.items():
            result.add_row(model["name"], str(batch), *rates)
    return result


def parity_table(model: dict[str, Any]) -> Table:
    """What each stage of a model's way to a served file does to its logits."""
    section = model["parity"]
    headings = ("cosine\nleast", "\nmedian", "same\ntop-1 %", "top-1 %\nbefore, after")
    result = _empty_table(
        f"parity of {model['name']}, {section['images']} images", "\nstage", headings
    )
    for stage in section["stages"]:
        result.add_row(
            stage["stage"],
            f"{stage['least_cosine']:.5f}",
            f"{stage['median_cosine']:.5f}",
            f"{100 * stage['agreement']:.1f}",
            f"{100 * stage['top1_source']:.1f}, {100 * stage['top1_target']:.1f}",
        )
    return result


def sentences(report: dict[str, Any]) -> list[str]:
    """What is to be read below the table: nodes that fell back to another provider, what parity
    says, the gate's verdicts, the recommendation."""
    fallbacks = [
        f"{model['name']}: {count} of {sum(model['executed_on'].values())} nodes ran on {provider}"
        for model in report["models"]
        if len(model["executed_on"]) > 1
        for provider, count in model["executed_on"].items()
    ]
    parities = [
        sentence
        for model in report["models"]
        if model["parity"]
        for sentence in _parity_sentences(model)
    ]
    verdicts = [verdict["sentence"] for verdict in (report["gate"] or {"models": []})["models"]]
    return (
        fallbacks
        + parities
        + verdicts
        + [choice["sentence"] for choice in (report["recommendation"] or {}).values()]
    )


def _parity_sentences(model: dict[str, Any]) -> list[str]:
    """The first stage that loses, why each does, and how far linears and logits may be trusted to
    tell."""
    section = model["parity"]
    worst = max(section["linears"], key=lambda row: float(row["relative_error"]))
    nudged = section["nudged"]
    return [
        f"{model['name']}: the first stage that loses is {section['first_loss'] or 'none'}",
        *(
            f"{stage['stage']} loses: {stage['loss']}"
            for stage in section["stages"]
            if stage["loss"]
        ),
        "the largest relative error of a linear on torch's input is "
        f"{worst['relative_error']:.1e}, at {worst['linear']}",
        f"with pixels nudged by a millionth torch is at {nudged['least_cosine']:.5f} (least), "
        f"{nudged['median_cosine']:.5f} of itself",
    ]


def _empty_table(caption: str, first: str, headings: tuple[str, ...]) -> Table:
    """A first column that folds, and one to the right for each heading that does not."""
    result = Table(
        caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    result.add_column(first, min_width=11, overflow="fold")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    return result


def _top1(accuracy: dict[str, Any]) -> str:
    """Top-1, and on a second line what it loses against the baseline, in points."""
    top1 = f"{100 * accuracy['top1']:.1f} ({100 * accuracy['top1_low']:.1f}–{100 * accuracy['top1_high']:.1f})"
    against = accuracy["against"]
    if against is None:
        return top1
    return f"{top1}\n{100 * against['drop']:.1f} ({100 * against['drop_low']:.1f}…{100 * against['drop_high']:.1f})"
