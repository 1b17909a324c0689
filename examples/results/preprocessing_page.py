"""The page about preprocessing, from what examples/preprocessing.py printed."""

from collections.abc import Callable, Iterable

from layout import Json, page, table

REASONS = {
    "different sizes": "its images have different sizes",
    "a video or several parts": "it makes a video or several parts of an image",
    "which cannot be expressed": "it has a step that marrq does not have",
    "does what its settings do not tell": "its pixels are not those that its settings tell",
    "no height and width": "its crop has no height and width",
    "alone (": "it makes no pixels of one RGB image alone, or needs another package for it",
    "without a checkpoint": "its settings are those of a checkpoint of timm, see above",
}
"""Parts of the sentence with which a processor is refused, and the same in words."""


def preprocessing(record: Json) -> str:
    report = record["reports"]["preprocessing"]
    configs, rows = report["timm"], report["transformers"]
    same = [row for row in rows if "refused" not in row]
    # Some processors are refused as they are, and expressed with a size of their own.
    refused = [row for row in rows if "refused" in row and not row["settings"]]
    names = sorted({row["processor"] for row in same})
    sizes = ", ".join(f"{width} × {height}" for width, height in report["sizes"])
    versions = report["versions"]
    return page(
        record,
        "Preprocessing: the pixels of timm and of transformers",
        f"""
        Every pretrained config of timm {versions["timm"]} and every image processor of
        transformers {versions["transformers"]} is compared with marrq, on images of noise of
        {sizes}. Differences are the largest of all pixels, in levels of 255. Those below 1e-3 come
        from the rounding of float32 alone.
        "marrq" is what a model is quantized with, "file" what an exported file's metadata give in
        NumPy and Pillow.""",
        "## timm",
        f"""
        {sum(row["models"] for row in configs)} models have {len(configs)} different configs. The
        reference is `create_transform`. None is refused.""",
        timm_table(configs),
        "## transformers",
        f"""
        AutoImageProcessor loads {len({row["processor"] for row in rows})} classes, those with
        torchvision where there are two. {len(names)} of them are expressed, in {len(same)}
        settings.
        The last column says how far the PIL variant of a processor is from the reference. Pillow
        resizes rows before columns or after them, whichever is cheaper, and rounds in between; its
        `nearest` takes another pixel in places; and the two variants put an odd margin on different
        sides.""",
        transformers_table(same),
        f"Expressed: {', '.join(map(short, names))}.",
        "## Refused",
        f"{len(refused)} classes are refused with their default settings, by name.",
        refusals(refused),
    )


def timm_table(rows: list[Json]) -> str:
    kinds = grouped(rows, lambda row: f"{row['crop_mode']}, {row['interpolation']}")
    cells = [
        [kind, f"{len(of)}", f"{sum(row['models'] for row in of)}", *largest(of)]
        for kind, of in kinds.items()
    ]
    return table(["crop, filter", "configs", "models", "marrq", "file"], cells)


def transformers_table(rows: list[Json]) -> str:
    kinds = grouped(
        rows, lambda row: f"{row['resampling']}, {row['crop_mode']}, {row['interpolation']}"
    )
    cells = []
    for kind, of in kinds.items():
        pil = [row["pil_levels"] for row in of if row["pil_levels"] is not None]
        variants = f"{max(pil):.0f}" if pil else "–"
        processors = len({row["processor"] for row in of})
        cells.append([kind, f"{processors}", f"{len(of)}", *largest(of), variants])
    headings = ["resampling, crop, filter", "classes", "settings", "marrq", "file", "PIL variant"]
    return table(headings, cells)


def refusals(rows: list[Json]) -> str:
    kinds = grouped(rows, lambda row: reason(row["refused"]))
    lines = [
        f"| {why} | {len(of)} | {', '.join(short(row['processor']) for row in of)} |"
        for why, of in kinds.items()
    ]
    return "\n".join(["| because | classes | which |", "| --- | ---: | --- |", *lines])


def reason(sentence: str) -> str:
    return next(words for part, words in REASONS.items() if part in sentence)


def largest(rows: list[Json]) -> list[str]:
    """The largest differences of marrq and of a file."""
    return [levels(max(row[key] for row in rows)) for key in ("levels", "levels_of_file")]


def levels(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def short(processor: str) -> str:
    return processor.removesuffix("ImageProcessor")


def grouped(rows: Iterable[Json], key: Callable[[Json], str]) -> dict[str, list[Json]]:
    """The rows by their kind, the most frequent kind first."""
    kinds: dict[str, list[Json]] = {}
    for row in rows:
        kinds.setdefault(key(row), []).append(row)
    return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))
