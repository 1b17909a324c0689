"""Write the result pages: NAME.md beside this script, from what was measured in NAME.json.

    python examples/results/pages.py             # write all pages
    python examples/results/pages.py --check     # exit code 1 if a page is not what its JSON gives

Every figure of a page comes from its JSON. record.py writes the JSON, from the reports of `marrq
bench`, `marrq compare` and the scripts in examples/.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from accuracy_page import accuracy_at_low_bits
from branches_page import branches
from budget_page import budget
from embeddings_page import embeddings
from families_page import families
from layout import Json, page, table
from preprocessing_page import preprocessing
from refined_page import refined
from saturation_page import saturation

FOLDER = Path(__file__).parent

ACCURACY = ("top-1, %", "drop, points", "divergence, nats", "same answer, %")

ACCURACY_WORDS = """
Brackets behind an accuracy hold its 95 % interval. The drop is what a file loses in top-1 against
fp32; it is judged on pairs of answers to the same image. The divergence is how far the classes'
probabilities are from those of fp32 (Kullback-Leibler). Every image counts in it, so it tells two
files apart sooner than top-1 does."""

INDEX_WORDS = """
Each page says what was measured, with which commands, on what machine, and of which commit. Its
figures come from the JSON beside it: `python examples/results/pages.py` writes the pages.
"""

TOOLS = {
    "fp32": "ONNX Runtime, fp32",
    "fp16": "ONNX Runtime, fp16",
    "integer": "marrq `integer`, W4A8",
    "static": "ONNX Runtime `quantize_static`, W8A8",
    "dynamic": "ONNX Runtime `quantize_dynamic`, W8A8",
    "matmulnbits": "ONNX Runtime MatMulNBits, 4 bits",
    "openvino": "OpenVINO, fp32",
    "nncf": "OpenVINO with NNCF, W8A8",
}
"""Rows of examples/compare_tools/compare.py, in words."""


def dinov2_small(record: Json) -> str:
    report = record["reports"]["bench"]
    models = {model["name"]: model for model in report["models"]}
    fp32, chosen = models["fp32"], models["W4A8 marr-stream"]
    batches = [row["batch"] for row in fp32["latency"]]
    headings = ["file", "MB", "bits / weight"]
    headings += [f"ms, batch {batch} (× fp32)" for batch in batches]
    rows = [
        [
            name,
            f"{model['size_bytes'] / 1e6:.2f}",
            f"{model['bits_per_weight']:.2f}",
            *(timed(*pair) for pair in zip(model["latency"], fp32["latency"], strict=True)),
        ]
        for name, model in models.items()
    ]
    smaller = fp32["size_bytes"] / chosen["size_bytes"]
    ratios = " and ".join(f"{row['ratio_fp32']:.2f}" for row in chosen["latency"])
    environment = report["environment"]
    return page(
        record,
        "DINOv2 ViT-S/14: size and latency of files",
        f"""
        A real DINOv2 ViT-S/14 (112 px, 99 classes of emoji) is quantized at five schemes. All files
        are measured beside fp32 and fp16 in one run, in the same {environment["rounds"]} rounds
        with {environment["threads"]} thread. Neither size nor time depends on which codes a method
        has chosen; [accuracy](accuracy.md) does.""",
        table(headings, rows),
        """
        `marr-stream` is the full name of `marr`. W4A4 has an activation range for each token, found
        at run time; the other schemes have static ranges. Brackets behind milliseconds hold the
        ratio to fp32 within a round: its median over rounds, and its range. The machine was shared,
        and the range shows how much that matters.""",
        f"""
        W4A8 by `marr` is {smaller:.1f} times smaller than fp32, and takes {ratios} of its time at
        batch 1 and 8.""",
    )


def eight_bit_codes(record: Json) -> str:
    reports = record["reports"]
    processors = (("VNNI", reports["products"]["rows"]), ("AVX2", reports["products_avx2"]["rows"]))
    choices = list(dict.fromkeys(row["codes"] for row in reports["products"]["rows"]))
    full, reduced, unsigned = choices
    columns = [(*one, kind) for kind in ("extreme", "uniform") for one in processors]
    exact = [[codes, *(wrong(rows, codes, kind) for _, rows, kind in columns)] for codes in choices]
    linears: dict[str, dict[str, Json]] = {}
    for row in reports["times"]["rows"]:
        linears.setdefault(f"{row['inputs']} → {row['outputs']}", {})[row["codes"]] = row
    speed = [
        [codes, *(kernel_time(rows[codes]) for rows in linears.values())]
        for codes in ("float32", *choices)
    ]
    slower = [rows[unsigned]["ratio"] / rows[reduced]["ratio"] for rows in linears.values()]
    answers = reports["answers"]["rows"]
    names = {"full": f"W8A8, {full}", "reduced": f"W8A8, {reduced}"}
    files = [[names.get(row["file"], row["file"]), *accuracy(row["accuracy"])] for row in answers]
    divergences = {row["file"]: row["accuracy"]["divergence"] for row in answers}
    beside = next(row["beside"] for row in answers if row["file"] == "reduced")
    return page(
        record,
        "Codes of 8-bit weights",
        """
        marrq keeps 8-bit weight codes in -64 … 63 where activations are quantized too. This page
        sets that choice beside two others: all of -128 … 127, and unsigned codes with zero point
        128. Activation codes are unsigned, with 8 bits.""",
        "## Exactness",
        """
        The share of an integer product's sums that ONNX Runtime gets wrong, and the largest error,
        against 64-bit integers in NumPy. MatMulInteger and MatMulIntegerToFloat were run, and the
        worse counts. Valgrind emulates the processor with AVX2 and without VNNI. Extreme codes are
        each the smallest or the largest; uniform codes are any.""",
        table(["codes", *(f"{name}, {kind}" for name, _, kind in columns)], exact),
        "## Speed",
        """
        Milliseconds of one linear on 197 tokens with one thread: QuantizeLinear, then
        MatMulIntegerToFloat with bias, on a processor with VNNI. It is processor time, the least of
        a round, since the machine was shared. In brackets: the ratio to MatMul and Add in float32,
        the median over rounds and the range.""",
        table(["codes", *linears], speed),
        """
        No processor with AVX2 and without VNNI was at hand. So times there are not measured. On
        such a processor `python examples/eight_bit_codes.py times` measures them.""",
        "## Accuracy",
        f"""
        DINOv2 ViT-S/14 at W8A8 by `marr`, on {answers[0]["accuracy"]["images"]} images and the
        processor with VNNI.""",
        table(["file", *ACCURACY], files),
        ACCURACY_WORDS,
        f"""
        Against the full range, the reduced range loses {points(beside)} points of top-1:
        {beside["only_baseline"]} images are right with the full range alone,
        {beside["only_model"]} with the reduced range alone (p = {beside["p_value"]:.2f}).""",
        "## Conclusion",
        f"""
        Signed codes of 8 bits give wrong sums on processors without VNNI. Unsigned codes are exact,
        but take at least {min(slower):.1f} times as long as signed ones. Signed codes of 7 bits are
        exact on both processors and as fast as those of 8 bits. They cost
        {divergences["reduced"]:.3f} nats of divergence in place of {divergences["full"]:.3f}, and
        no top-1 that so many images can show.""",
    )


def wrong(rows: Sequence[Json], codes: str, kind: str) -> str:
    """How many sums are wrong, and by how much at most, in the worse of the operators."""
    found = [row for row in rows if row["codes"] == codes and row["kind"] == kind]
    worst = max(found, key=lambda row: row["wrong"])
    share, error = percent(worst["wrong"] / worst["sums"]), worst["largest_error"]
    return f"{share} % wrong, by up to {error:,}" if error else "exact"


def kernel_time(row: Json) -> str:
    if row["codes"] == "float32":
        return f"{row['ms']:.2f}"
    spread = f"{row['least_ratio']:.2f} … {row['largest_ratio']:.2f}"
    return f"{row['ms']:.2f} ({row['ratio']:.2f}; {spread})"


def other_tools(record: Json) -> str:
    reports = record["reports"]
    environment = next(iter(reports.values()))["environment"]
    packages = environment["packages"]
    made = {
        label: {row["name"]: row for row in report["rows"]} for label, report in reports.items()
    }
    headings = ["made by"]
    for label in made:
        headings += [f"{label}: MB", "ms, batch 1 (× fp32)", "ms, batch 8 (× fp32)"]
    rows = [
        [text, *(cell for found in made.values() for cell in tool_cells(found[name]))]
        for name, text in TOOLS.items()
    ]
    return page(
        record,
        "marrq beside other tools",
        f"""
        Files that each tool makes of the same float model: their size, and their latency with
        {environment["threads"]} threads. Weights are random and images are noise, so this page says
        nothing about accuracy.""",
        f"""
        The other tools are OpenVINO {packages["openvino"]} and NNCF {packages["nncf"]}. A ratio is
        the median over {environment["rounds"]} rounds of the ratio to fp32 within a round.""",
        table(headings, rows),
        *(fastest(label, found) for label, found in made.items()),
    )


def tool_cells(row: Json) -> list[str]:
    """Size and times of a file, or why there is none."""
    if "failure" in row:
        return [row["failure"], "–", "–"]
    times = [f"{latency['p50_ms']:.2f} ({latency['ratio_fp32']:.2f})" for latency in row["latency"]]
    return [f"{row['size_bytes'] / 1e6:.2f}", *times]


def fastest(label: str, rows: dict[str, Json]) -> str:
    """Which file is the smallest, and which the fastest at each batch size."""
    made = {name: row for name, row in rows.items() if "failure" not in row}
    smallest = min(made, key=lambda name: made[name]["size_bytes"])
    sentences = [f"{label}: {TOOLS[smallest]} makes the smallest file."]
    for slot, latency in enumerate(made["fp32"]["latency"]):
        ratios = {name: row["latency"][slot]["ratio_fp32"] for name, row in made.items()}
        best = min(ratios, key=lambda name: ratios[name])
        sentence = f"{TOOLS[best]} makes the fastest at batch {latency['batch']}, with"
        behind = "" if best == "integer" else f"; marrq's takes {ratios['integer']:.2f}"
        sentences.append(f"{sentence} {ratios[best]:.2f} of fp32's time{behind}.")
    return " ".join(sentences)


def accuracy(measured: Json) -> list[str]:
    """The cells under ACCURACY."""
    low, high = percent(measured["top1_low"]), percent(measured["top1_high"])
    return [
        f"{percent(measured['top1'])} ({low} … {high})",
        points(measured.get("against")),
        f"{measured['divergence']:.3f}",
        percent(measured["agreement"]),
    ]


def points(drop: Json | None) -> str:
    """A drop in top-1 with its interval, in points. A positive drop is a loss."""
    if drop is None:
        return "–"
    value, low, high = (percent(drop[key]) for key in ("drop", "drop_low", "drop_high"))
    return f"{value} ({low} … {high})"


def percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}"  # + 0.0: no -0.0


def timed(row: Json, fp32: Json) -> str:
    """A median time in milliseconds, the ratio to fp32's, and the ratio's range over rounds."""
    if row == fp32:
        return f"{row['p50_ms']:.2f}"
    ratios = [a / b for a, b in zip(row["rounds_ms"], fp32["rounds_ms"], strict=True)]
    spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
    return f"{row['p50_ms']:.2f} ({row['ratio_fp32']:.2f}; {spread})"


PAGES: dict[str, Callable[[Json], str]] = {
    "accuracy": accuracy_at_low_bits,
    "branches": branches,
    "budget": budget,
    "dinov2_small": dinov2_small,
    "eight_bit_codes": eight_bit_codes,
    "embeddings": embeddings,
    "families": families,
    "other_tools": other_tools,
    "preprocessing": preprocessing,
    "refined": refined,
    "saturation": saturation,
}
"""The pages by name."""


def rendered(name: str) -> str:
    """The page that NAME.json gives."""
    return PAGES[name](json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def index(pages: dict[str, str]) -> str:
    """The list of the pages, by their titles."""
    titles = {name: text.splitlines()[0].removeprefix("# ") for name, text in pages.items()}
    links = [f"- [{title}]({name})" for name, title in titles.items()]
    return "\n".join(["# Measured", "", INDEX_WORDS.strip(), "", *links]) + "\n"


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    stale = []
    pages = {f"{name}.md": rendered(name) for name in PAGES}
    for name, text in {**pages, "README.md": index(pages)}.items():
        file = FOLDER / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(file.name)
            if not sys.argv[1:]:
                file.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name} is not what its JSON gives" if sys.argv[1:] else f"{name} written")
    sys.exit(1 if sys.argv[1:] and stale else 0)


if __name__ == "__main__":
    main()
