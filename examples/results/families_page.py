"""The page of tests/walk_families.py: which families of models work, and why others are refused."""

from collections.abc import Iterator

from layout import Json, page, table

HEADINGS = ("tried", "of timm's module", "as it", "linears", "median cosine", "least")


def families(record: Json) -> str:
    """The page that the record gives."""
    reports = record["reports"]
    rows = [[library, *map(str, _counts(report))] for library, report in reports.items()]
    timm, transformers = reports["timm"], reports["transformers"]
    return page(
        record,
        "Families of models: what works, and what is refused",
        """
        Architectures of timm's transformers and of models beside them, and image classifiers and
        image encoders of transformers, at tiny size with random weights: from a checkpoint folder
        through `quantize` (W4A8, `rtn`), the saved artifact and its export to ONNX Runtime. A model
        works if the median cosine of the file's outputs to the simulation's, over 8 images, is at
        least 0.9999. A refusal is the sentence that `marrq quantize` says before it quantizes
        anything. Architectures of timm that compute the same once they are small are tried
        once.""",
        table(("library", "tried", "work", "refused", "failed", "not built", "not tried"), rows),
        """
        "Work" and what follows counts architectures, those that compute the same included. "Not
        built": the library itself could not make the class that small, or needs a package that was
        not installed. "Not tried": the walk had not come to them; it goes on where it stopped.""",
        "## timm: these work",
        table(HEADINGS, list(_working(timm))),
        "## timm: these do not",
        table(("tried", "as it", "why"), list(_others(timm))),
        "## transformers: these work",
        table((HEADINGS[0], *HEADINGS[3:]), [[row[0], *row[3:]] for row in _working(transformers)]),
        "## transformers: these do not",
        table(("tried", "why"), [[name, why] for name, _, why in _others(transformers)]),
    )


def _counts(report: Json) -> Iterator[int]:
    """Kinds that were tried; names by what became of them; names that were not tried."""
    yield len(report["rows"])
    found = [report["rows"].get(kind["name"], {}).get("result") for kind in report["kinds"]]
    for result in ("works", "refused", "failed", "not built", None):
        yield sum(
            1 + len(kind["same"])
            for kind, became in zip(report["kinds"], found, strict=True)
            if became == result
        )


def _tried(report: Json) -> Iterator[tuple[Json, Json]]:
    """Kinds with their rows, by module and name."""
    for kind in sorted(report["kinds"], key=lambda kind: (kind["group"], kind["name"])):
        if kind["name"] in report["rows"]:
            yield kind, report["rows"][kind["name"]]


def _working(report: Json) -> Iterator[list[str]]:
    for kind, row in _tried(report):
        if row["result"] == "works":
            yield [
                f"`{kind['name']}`",
                kind["group"],
                str(len(kind["same"])),
                str(row["linears"]),
                f"{row['cosine']:.6f}",
                f"{row['least']:.6f}",
            ]


def _others(report: Json) -> Iterator[list[str]]:
    for kind, row in _tried(report):
        if row["result"] != "works":
            # What stands before the reason is the same for all.
            reason = row["reason"].split("FOLDER': ")[-1]
            yield [f"`{kind['name']}`", str(len(kind["same"])), f"{row['result']}: {reason}"]
