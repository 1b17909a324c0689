"""The page of budgets: mixed widths beside uniform ones.

Its reports: `costs` of `marrq sensitivity`, each `uniform_SCHEME` of `marrq compare`, and each
`budget_N` of `marrq evaluate`, for a model of at most N bits a weight.
"""

from dataclasses import replace

from layout import Json, comparison, first_draws, joined, page, table

from marrq.sensitivity import Plan, Sensitivity, sensitivity_from_json
from runtime.report.comparison import ComparisonReport, summarize

HEADINGS = ("bits / weight", "MB of tensors", "divergence, nats", "expected", "top-1, %")


def budget(record: Json) -> str:
    """The page that the record gives."""
    reports = record["reports"]
    costs = sensitivity_from_json(reports["costs"])
    made = [comparison(one) for label, one in reports.items() if label.startswith("uniform")]
    uniform = _by_marr(first_draws(joined(made)))
    budgets = {
        float(label.partition("_")[2]): report
        for label, report in reports.items()
        if label.startswith("budget")
    }
    rows = [*_uniform(uniform, costs), *(_mixed(*one, costs) for one in budgets.items())]
    return page(
        record,
        "A budget of bits: mixed widths beside uniform ones",
        f"""
        A real DINOv2 ViT-S/14 (112 px, 99 classes of emoji) is quantized with one width of weights
        for all linears, and within a budget: each linear then has 2, 3, 4 or 8 bits, chosen by
        `marrq quantize --budget`. All are judged in torch on {uniform.float_images} images, and
        calibrated on {uniform.samples} others, one draw; full precision has a top-1 of
        {100 * uniform.float_score:.1f} %. Bits count scales and zero points.""",
        table(["weights", *HEADINGS], [cells for _, cells in sorted(rows)]),
        f"""
        The expected divergence is what `marrq sensitivity` adds up, linear by linear, from
        {costs.about["calibration"]["samples"]} images. It orders plans, and is lower than what is
        measured: errors of linears meet each other downstream, and judge and codes share their
        images.""",
        "## What each linear costs",
        """
        Left, the best plan of each size beside uniform widths; right, the divergence that each
        width of each group of linears is expected to add alone. Both by `marrq sensitivity`.""",
        "![What each linear costs, and the curve of size against divergence](budget.svg)",
    )


def _by_marr(report: ComparisonReport) -> ComparisonReport:
    """The runs of the method that the budgets have."""
    return replace(report, runs=tuple(run for run in report.runs if run.method == "marr-stream"))


def _uniform(report: ComparisonReport, costs: Sensitivity) -> list[tuple[float, list[str]]]:
    """Bits and cells of each uniform width."""
    rows = []
    for row in summarize(report):
        plan = costs.uniform(int(row.scheme[1]))
        measured = (row.divergence, row.score)
        rows.append((plan.bits_per_weight, _cells(f"all {row.scheme[1]} bits", plan, measured)))
    return rows


def _mixed(limit: float, report: Json, costs: Sensitivity) -> tuple[float, list[str]]:
    """Bits and cells of the model within a budget."""
    plan = costs.within_bits(limit)
    [model] = [one for title, one in report["models"].items() if title != "float"]
    measured = (model["divergence"], model["top1"])
    return plan.bits_per_weight, _cells(f"`--budget {limit}`", plan, measured)


def _cells(name: str, plan: Plan, measured: tuple[float, float]) -> list[str]:
    divergence, top1 = measured
    return [
        name,
        f"{plan.bits_per_weight:.3f}",
        f"{plan.size_bytes / 1e6:.2f}",
        f"{divergence:.3f}",
        f"{plan.divergence:.3f}",
        f"{100 * top1:.1f}",
    ]
