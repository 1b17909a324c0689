"""What the bench's JSON (schema marrq.bench/2, made by runtime/bench.py) says, for people. Nothing is measured or computed here."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def table(report: dict[str, Any]) -> Table:
    """The report for people; fits 80 columns with two batch sizes."""
    caption = f"{report['data']['images']} images of {report['data']['path']}, ONNX Runtime {report['environment']['onnxruntime']}"
    result = Table(caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    result.add_column("\nmodel", min_width=11, overflow="fold")
    batches = [row["batch"] for row in report["models"][0]["latency"]]
    headings = ("top-1 %\n(95 %)", "agree\n%", "\nMB", "bits/\nweight", *(f"batch {batch}\nms (× fp32)" for batch in batches))
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for model in report["models"]:
        accuracy = model["accuracy"]
        result.add_row(
            model["name"],
            f"{100 * accuracy['top1']:.1f} ({100 * accuracy['top1_low']:.1f}–{100 * accuracy['top1_high']:.1f})",
            "–" if accuracy["agreement"] is None else f"{100 * accuracy['agreement']:.1f}",
            f"{model['size_bytes'] / 1e6:.2f}",
            f"{model['bits_per_weight']:.2f}",
            *(
                f"{row['p50_ms']:.2f} ({'–' if row['ratio_fp32'] is None else format(row['ratio_fp32'], '.2f')})"
                for row in model["latency"]
            ),
        )
    return result


def parity_table(model: dict[str, Any]) -> Table:
    """What each stage of a model's way to a served file does to its logits."""
    section = model["parity"]
    result = Table(title=f"{model['name']}, parity", caption=f"{section['images']} images", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("\nstage")
    for heading in ("cosine\nleast", "\nmedian", "same\ntop-1 %", "top-1 %\nbefore, after"):
        result.add_column(heading, justify="right", no_wrap=True)
    for stage in section["stages"]:
        result.add_row(
            stage["stage"],
            f"{stage['least_cosine']:.5f}",
            f"{stage['median_cosine']:.5f}",
            f"{100 * stage['agreement']:.1f}",
            f"{100 * stage['top1_source']:.1f}, {100 * stage['top1_target']:.1f}",
        )
    return result


def parity_lines(section: dict[str, Any]) -> list[str]:
    """The verdicts of a parity section: the first stage that loses, why each does, and how near the worst linear is."""
    worst = max(section["linears"], key=lambda row: float(row["relative_error"]))
    return [
        f"the first stage that loses: {section['first_loss'] or 'none'}",
        *(f"{stage['stage']} loses: {stage['loss']}" for stage in section["stages"] if stage["loss"]),
        f"largest relative error of a linear on torch's input: {worst['relative_error']:.1e}, {worst['linear']}",
        f"torch against itself with pixels nudged by a millionth: least cosine {section['nudged']['least_cosine']:.5f}, "
        f"median {section['nudged']['median_cosine']:.5f}",
    ]
