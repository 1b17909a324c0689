"""The page of the refinement: what training leaves of the loss, with the codes as they are.

Each report is of `marrq evaluate`, for one refined model.
"""

from layout import Json, page, table


def refined(record: Json) -> str:
    """The page that the record gives."""
    reports = record["reports"].values()
    float_model = next(iter(reports))["models"]["float"]
    return page(
        record,
        "Refined models",
        f"""
        `marrq quantize --refine` behind `marr`, one draw, on a real DINOv2 ViT-S/14 (112 px, 99
        classes of emoji). Scales, biases, norms and clip factors are trained towards the logits of
        full precision, on images that neither calibrated nor judge; the codes stay. All are judged
        on {float_model["images"]} images; full precision has a top-1 of
        {100 * float_model["top1"]:.1f} %. Brackets hold 95 % intervals. [Accuracy](accuracy.md) has
        the models that nothing was trained for.""",
        table(
            ["model", "divergence, nats", "top-1, %"],
            [cells for report in reports for cells in _rows(report)],
        ),
    )


def _rows(report: Json) -> list[list[str]]:
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
