"""The page of budgets: mixed widths beside uniform ones, in exported files."""

from layout import Json, page, table

HEADINGS = ("bits / weight", "MB", "divergence, nats", "top-1, %", "drop, points", "× fp32")


def budget(record: Json) -> str:
    """The page that the record gives."""
    report = record["reports"]["bench"]
    models = [model for model in report["models"] if model["method"] != "none"]
    return page(
        record,
        "A budget of bits: mixed widths beside uniform ones",
        f"""
        A real DINOv2 ViT-S/14 (112 px, 99 classes of emoji) is quantized with one width of weights
        for all linears, and within a budget: each linear then has 2, 3, 4 or 8 bits, chosen by
        `marrq quantize --budget`. All files are measured in one run, on
        {report["data"]["images"]} images with {report["environment"]["threads"]} thread. Bits
        count scales and zero points; brackets hold 95 % intervals.""",
        table(
            ["file", *HEADINGS],
            [_row(model) for model in sorted(models, key=lambda one: one["bits_per_weight"])],
        ),
        "## What each linear costs",
        """
        The divergence that each width of each linear is expected to add, and the curve of the best
        plan of each size, by `marrq sensitivity`. Expected divergences order plans; they are lower
        than what is measured, since errors of linears add up.""",
        "![What each linear costs, and the curve of size against divergence](budget.svg)",
    )


def _row(model: Json) -> list[str]:
    accuracy = model["accuracy"]
    drop = accuracy["against"]
    shares = [(accuracy["top1"], accuracy["top1_low"], accuracy["top1_high"])]
    shares.append((drop["drop"], drop["drop_low"], drop["drop_high"]))
    return [
        model["name"],
        f"{model['bits_per_weight']:.3f}",
        f"{model['size_bytes'] / 1e6:.2f}",
        f"{accuracy['divergence']:.3f}",
        *(f"{100 * a:.1f} ({100 * low:.1f} … {100 * high:.1f})" for a, low, high in shares),
        " and ".join(f"{row['ratio_fp32']:.2f}" for row in model["latency"]),
    ]
