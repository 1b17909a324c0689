"""The page of the refinement: what training leaves of the loss, with codes that move and without.

Each report is of `marrq evaluate`, for one refined model: `moved_…` with codes that may move by one
step, `kept_…` with `refine.codes=off`.
"""

from layout import Json, page, table

CODES = {"moved": "may move", "kept": "stay"}
"""What codes may do, by the first word of a report's label."""


def refined(record: Json) -> str:
    """The page that the record gives."""
    reports = record["reports"]
    float_model = next(iter(reports.values()))["models"]["float"]
    return page(
        record,
        "Refined models",
        f"""
        `marrq quantize --refine` behind `marr`, one draw, on a real DINOv2 ViT-S/14 (112 px, 99
        classes of emoji). Scales, biases, norms and clip factors are trained towards the logits of
        full precision, on images that neither calibrated nor judge; a code may move by one step, or
        all codes stay (`refine.codes=off`). All are judged on {float_model["images"]} images; full
        precision has a top-1 of {100 * float_model["top1"]:.1f} %. Brackets hold 95 % intervals.
        The model that teaches was trained on the images that are learned from, so a gain in top-1
        is in part the labels that it has seen: the divergence is the better judge.
        [Accuracy](accuracy.md) has the models that nothing was trained for.""",
        table(
            ["model", "codes", "divergence, nats", "top-1, %"],
            [cells for label, report in reports.items() for cells in _rows(label, report)],
        ),
    )


def _rows(label: str, report: Json) -> list[list[str]]:
    """A row for each model but the float one."""
    return [
        [
            f"`{title}`",
            CODES[label.partition("_")[0]],
            f"{model['divergence']:.3f}",
            f"{100 * model['top1']:.1f} "
            f"({100 * model['top1_low']:.1f} … {100 * model['top1_high']:.1f})",
        ]
        for title, model in report["models"].items()
        if title != "float"
    ]
