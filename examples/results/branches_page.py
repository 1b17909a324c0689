"""The page of low-rank branches and salient columns, at equal bits.

Its report `bench` is of `marrq bench`, for the plain model and one model of each kind, whose
artifacts are named by the kinds.
"""

from layout import Json, page, table

PLAIN = "neither"


def branches(record: Json) -> str:
    """The page that the record gives."""
    report = record["reports"]["bench"]
    models = {_kind(model["name"]): model for model in report["models"]}
    made = {kind: model for kind, model in models.items() if kind}
    batches = [row["batch"] for row in models[""]["latency"]]
    headings = ["file", "bits / weight", "MB", "divergence, nats", "top-1, %"]
    headings += [f"ms, batch {batch} (× plain)" for batch in batches]
    environment = report["environment"]
    return page(
        record,
        "A second code for salient columns beside low-rank branches",
        f"""
        A real DINOv2 ViT-S/14 (112 px, 99 classes of emoji) at W2A8 by `marr`, one draw of
        256 images, with what may stand beside the codes: a low-rank branch in floating point
        (`--lowrank srr`, `qera`, `lqer`), or a second code for the weights of the strongest inputs
        (`--lowrank serq`), which needs no second product. Ranks are chosen for equal bits. All
        files are measured in one run, in the same {environment["rounds"]} rounds with
        {environment["threads"]} thread, and judged on {report["data"]["images"]} images; the
        divergence is from fp32.""",
        table(headings, [_row(kind, model, made[PLAIN]) for kind, model in made.items()]),
        """
        Brackets behind milliseconds hold the ratio to the file with neither within a round: its
        median over rounds. The other core was at work too.""",
    )


def _kind(name: str) -> str:
    """What stands beside the codes, by the name of a row; empty for a float model."""
    if not name.startswith("W2A8"):
        return ""
    return name.removeprefix("W2A8 marr-stream").strip() or PLAIN


def _row(kind: str, model: Json, plain: Json) -> list[str]:
    accuracy = model["accuracy"]
    times = [
        f"{own['p50_ms']:.2f} ({_ratio(own, other):.2f})"
        for own, other in zip(model["latency"], plain["latency"], strict=True)
    ]
    return [
        kind if kind == PLAIN else f"`{kind}`",
        f"{model['bits_per_weight']:.3f}",
        f"{model['size_bytes'] / 1e6:.2f}",
        f"{accuracy['divergence']:.3f}",
        f"{100 * accuracy['top1']:.1f}",
        *times,
    ]


def _ratio(own: Json, other: Json) -> float:
    """The median over rounds of the ratio within a round."""
    ratios = sorted(a / b for a, b in zip(own["rounds_ms"], other["rounds_ms"], strict=True))
    return float(ratios[len(ratios) // 2])
