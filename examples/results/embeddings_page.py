"""The page of DINOv2 without its head: what quantization costs an embedder."""

from collections.abc import Sequence

from layout import Json, page, table

HEADINGS = (
    "file",
    "cosine",
    "same neighbours, %",
    "divergence, nats",
    "k-NN, k = 20, %",
    "drop, points",
    "recall@1 across vendors, %",
    "drop, points",
    "mAP, %",
    "MB",
)

SHARES = {
    "knn20": "top-1 of k-NN",
    "knn1": "recall@1 across vendors",
    "recall1": "recall@1 within a vendor",
}


def embeddings(record: Json) -> str:
    """The page that the record gives."""
    report, apart = record["reports"]["bench"], record["reports"]["apart"]
    models = {model["name"]: model for model in report["models"]}
    fp32, environment = models["fp32"], report["environment"]
    seen = fp32["embedding"]["retrieval"]
    batches = [row["batch"] for row in fp32["latency"]]
    times = [f"ms, batch {batch} (× fp32)" for batch in batches]
    rows = [
        [name, *_answers(model["embedding"]), f"{model['size_bytes'] / 1e6:.2f}", *_times(model)]
        for name, model in models.items()
    ]
    return page(
        record,
        "DINOv2 ViT-S/14 as an embedder: likeness, k-NN and retrieval",
        f"""
        A real DINOv2 ViT-S/14 without its head gives 384 features of an image of 112 px. It is
        quantized at five schemes by two methods, on one draw of 256 emoji of two vendors, and all
        files are measured beside fp32 in one run, in the same {environment["rounds"]} rounds, with
        {environment["threads"]} thread. Queries are {report["data"]["images"]} emoji of a third
        vendor, in {seen["classes"]} classes; they are looked for among all
        {seen["gallery"]} emoji of those two vendors.""",
        table([*HEADINGS, *times], rows),
        """
        The cosine is that of an image's features with those of fp32, mean over the images. *Same
        neighbours* is the share of an image's 10 nearest images that are the same as in fp32. The
        divergence is that of the shares that all other images have by their cosines. k-NN is the
        weighted vote of DINO. Recall@1 across vendors is the same with k = 1: the share of queries
        whose nearest image of the other vendors has their class. mAP is retrieval among the
        queries. Brackets hold 95 % intervals; behind milliseconds, the ratio to fp32's within a
        round: its median. The machine was shared.""",
        "## marr beside gptq",
        f"""
        By how many points `{apart["methods"][1]}` is ahead of `{apart["methods"][0]}`, query by
        query, with the 95 % interval of paired shares. Above 0, the first is better; a scheme is
        decided if 0 lies outside of its interval.""",
        table(["scheme", *SHARES.values()], _ahead(apart["rows"])),
        _conclusion(apart["rows"]),
    )


def _answers(embedding: Json) -> list[str]:
    """The cells under HEADINGS between the name and the size."""
    alike, seen = embedding["likeness"], embedding["retrieval"]
    precision = seen["mean_average_precision"]
    return [
        f"{alike['cosine']:.4f} ({alike['cosine_low']:.4f} … {alike['cosine_high']:.4f})",
        _percent(alike["overlap"]),
        f"{alike['divergence']:.3f}",
        _interval(seen["knn20"]["share"], seen["knn20"]["low"], seen["knn20"]["high"]),
        _lost(seen["knn20"]["against"]),
        _interval(seen["knn1"]["share"], seen["knn1"]["low"], seen["knn1"]["high"]),
        _lost(seen["knn1"]["against"]),
        _interval(precision["mean"], precision["low"], precision["high"]),
    ]


def _times(model: Json) -> list[str]:
    return [f"{row['p50_ms']:.2f} ({row['ratio_fp32']:.2f})" for row in model["latency"]]


def _ahead(rows: Sequence[Json]) -> list[list[str]]:
    """A row for each scheme, a cell for each share."""
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    found = {(row["scheme"], row["share"]): _lost(row) for row in rows}
    return [[scheme, *(found[scheme, share] for share in SHARES)] for scheme in schemes]


def _conclusion(rows: Sequence[Json]) -> str:
    """A sentence for each share: at which schemes it decides between the methods."""
    sentences = []
    for share, words in SHARES.items():
        of_share = [row for row in rows if row["share"] == share]
        ahead = [row["scheme"] for row in of_share if row["drop_low"] > 0]
        behind = [row["scheme"] for row in of_share if row["drop_high"] < 0]
        sentences.append(
            f"Judged by {words}, `marr` is ahead at {_listed(ahead)}, and behind at "
            f"{_listed(behind)}."
        )
    return " ".join(sentences)


def _listed(schemes: Sequence[str]) -> str:
    return ", ".join(schemes) or "no scheme"


def _lost(drop: Json | None) -> str:
    if drop is None:
        return "–"
    return _interval(drop["drop"], drop["drop_low"], drop["drop_high"])


def _interval(value: float, low: float, high: float) -> str:
    """A share, or a difference of two, in percent with its interval."""
    return f"{_percent(value)} ({_percent(low)} … {_percent(high)})"


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}"  # + 0.0: no -0.0
