"""The bench's page: what the report says stands there as it is, none of it is taken for markup, and
a browser has no complaint."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_report import (
    BARE_MODEL,
    BARE_REPORT,
    DENSE,
    EMBEDDER,
    EMBEDDER_REPORT,
    FP16,
    FP32,
    LINEARS,
    REPORT,
    W4A8,
    without_accuracy,
)

from marrq.cli import main
from runtime.errors import BenchError
from runtime.measure.bench import BenchReport
from runtime.measure.gate import Gate, Verdict
from runtime.measure.measured import Agreement, MeasuredModel, reference_of
from runtime.report.headline import key_numbers, sentence
from runtime.report.html import check_page, page

SECTIONS = [
    "warnings",
    "recommendation",
    "models",
    "accuracy",
    "latency",
    "size",
    "parity",
    "precision",
    "audit",
    "quantization",
    "conditions",
    "json",
]
VOID = {"meta", "link", "br"}


class Parsed(HTMLParser):
    """What a page says. text: by section ("" before the first); rows: cells of each table row, by
    section; document: the JSON in it; tags: outside of plots."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {"": ""}
        self.rows: dict[str, list[list[str]]] = {"": []}
        self.attributes: list[tuple[str, str, str]] = []
        self.document, self.tags = "", list[str]()
        self._section, self._open = "", list[str]()
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if "svg" not in self._open:
            self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.text[self._section], self.rows[self._section] = "", []
        if tag == "tr":
            self.rows[self._section].append([])
        if tag in ("td", "th"):
            self.rows[self._section][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            self.document += data
        elif "style" not in self._open:
            self.text[self._section] += data
            if {"td", "th"} & set(self._open):
                self.rows[self._section][-1][-1] += data


@pytest.fixture(scope="module")
def source() -> str:
    """The page of the whole report. Its figures take two seconds, so it is made once."""
    return page(REPORT)


@pytest.fixture(scope="module")
def parsed(source: str) -> Parsed:
    return Parsed(source)


def rows(parsed: Parsed, section: str) -> list[str]:
    return [" | ".join(cell.replace("\xa0●", "") for cell in row) for row in parsed.rows[section]]


def test_the_sections_stand_in_the_order_in_which_a_reader_decides(parsed: Parsed):
    assert list(parsed.text) == ["", *SECTIONS]


def test_the_page_begins_with_what_is_gained_what_it_costs_and_the_verdict(parsed: Parsed):
    words = " ".join(parsed.text[""].split())
    assert "vit_sample" in words
    assert (
        "W4A8 marr-stream is 6.9 × smaller than fp32, and 2.2 × as fast at batch 1." in words
    )  # 87.02 / 12.58, 1 / 0.46
    assert "It loses 1.3 points of top-1 accuracy against fp32." in words
    for number, label, basis in (
        ("6.9 ×", "smaller", "12.58 MB, fp32 87.02 MB"),
        ("2.2 ×", "as fast at batch 1", "7.34 ms, fp32 15.90 ms"),
        ("1.3", "points of top-1 lost", "95 % interval 0.2 to 2.4"),
        ("4.08", "bits a weight", "with scales and zero points"),
    ):
        assert f"{label}{number}{basis}" in words
    assert (
        "Gate ?undecided: W4A8 marr-stream loses 1.3 points (0.2…2.4): about 4,700 images would "
        "tell" in words
    )
    recommended = parsed.text["recommendation"]
    assert all(choice.sentence in recommended for choice in REPORT.recommendation.values())


def test_the_tables_have_every_number(parsed: Parsed):
    assert rows(parsed, "models")[1:] == [
        "fp16 | fp16 | 55.5 (53.2–57.7) | 99.8 | 43.92 | 16.00 | 17.70 (1.11) | 106.77 (1.08)",
        "fp32 | fp32 | 55.5 (53.2–57.7) | 100.0 | 87.02 | 32.00 | 15.90 (1.00) | 98.83 (1.00)",
        "W4A8 marr-stream | integer | 54.2 (51.9–56.4) | 83.4 | 12.58 | 4.08 | 7.34 (0.46) | 41.72 "
        "(0.42)",
    ]
    assert rows(parsed, "accuracy")[3:4] + rows(parsed, "accuracy")[5:] == [
        "W4A8 marr-stream | 54.2 (51.9–56.4) | 78.1 (76.2–79.9) | 83.4 | 0.138",
        "W4A8 marr-stream | fp32 | 1.3 (0.2 to 2.4) | 87 | 63 | 0.0602",
    ]
    assert rows(parsed, "latency")[5:7] + rows(parsed, "latency")[-1:] == [
        "W4A8 marr-stream | 1 | 7.34 | 7.92 | 9.45 | 136.2 | 0.41 | 0.46",
        "W4A8 marr-stream | 8 | 41.72 | 43.15 | 46.38 | 191.8 | 0.39 | 0.42",
        "W4A8 marr-stream | 8 | 2 | 191.9",
    ]
    assert rows(parsed, "size")[-1] == "W4A8 marr-stream | 4.08 | 33.8 | 118.6 | 731.0"
    assert rows(parsed, "parity")[1:4] + rows(parsed, "parity")[-1:] == [
        "quantization | float torch | simulated torch | 0.91342 | 0.98517 | 83.7 | 55.1 | 53.9",
        "export | simulated torch | ONNX Runtime | 0.98491 | 0.99438 | 93.7 | 53.9 | 53.6",
        "preprocessing | ONNX Runtime | ONNX Runtime, the file’s preprocessing | 0.99999 | 1.00000 "
        "| 99.7 | 53.6 | 53.3",
        "blocks.1.mlp.fc2 | 9.04e-06",
    ]
    assert rows(parsed, "precision")[3:4] + rows(parsed, "precision")[5:] == [
        "W4A8 marr-stream | W4A8 | 4 | 8 | 4 | 4.08 | 8 | 8",
        "patch embedding | Conv | 1 | the scheme leaves it in float",
        "products of attention | Attention | 2 | activations on both sides, no weight to quantize",
    ]
    assert rows(parsed, "quantization")[4::4] == [
        "blocks.0.mlp.fc2 | – | 0 | 1.49e+00 | 1.21e-03 | 1.73e-04 | 3.4 | 0.1 | "
        "the Hessian had no factor at this damping: rounded to nearest",
        "blocks.1.mlp.fc2 | 0.28 | 4 | 1.07e+01 | 8.67e-03 | 1.24e-03 | 5.7 | 0.01 | –",
    ]
    for table in (rows(parsed, name) for name in ("parity", "quantization")):
        assert [line.split(" | ")[0] for line in table][-len(LINEARS) :] == LINEARS


def test_linears_that_agree_are_counted_together_and_exceptions_stand_first(parsed: Parsed):
    reason = "Gemm with transB has no integer kernel: export it again, marrq writes MatMul"
    assert rows(parsed, "audit")[1:5] == [
        f"W4A8 marr-stream | 1 | Gemm | float32 | float32 | float | {reason}blocks.1.mlp.fc1",
        "fp16 | 8 | MatMul | float32 | float32 | float | as it says",
        "fp32 | 8 | MatMul | float32 | float32 | float | as it says",
        "W4A8 marr-stream | 7 | MatMulIntegerToFloat | int4 | uint8 | integers | as it says",
    ]
    assert [line.split(" | ")[0] for line in rows(parsed, "audit")].count("blocks.1.mlp.fc1") == 3
    assert "QuantizeLinear × 8" in parsed.text["audit"]


def test_the_environment_is_there_in_full_and_the_json_whole(parsed: Parsed):
    report = REPORT.to_json()
    for value in (*report["environment"].values(), *report["data"].values()):
        parts = (
            value.items()
            if isinstance(value, dict)
            else value
            if isinstance(value, list)
            else [value]
        )
        for part in parts:
            words = (
                f"{part[0]} {part[1]}"
                if isinstance(part, tuple)
                else "not set"
                if part is None
                else str(part)
            )
            assert words in parsed.text["conditions"]
    assert json.loads(parsed.document) == report


def test_figures_say_what_they_show_and_no_two_have_an_id_in_common(parsed: Parsed):
    labels = [
        value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "aria-label")
    ]
    assert [label.split(":")[0].split(" of ")[0] for label in labels] == [
        "Top-1 accuracy",
        "Top-1 lost",
        "Median time",
        "Time",
        "Size",
        "Relative error",
        "Relative error",
        "α and J at each step",
        "α",
    ]
    assert "fp32 55.5 %" in labels[0]
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {
        match
        for _, _, value in parsed.attributes
        for match in re.findall(r"(?:^|url\()#([\w-]+)", value)
    }
    assert references <= set(ids)


def test_nothing_is_fetched_and_no_script_is_there(parsed: Parsed, source: str):
    assert "script" not in {tag for tag, *_ in parsed.attributes}
    fetched = [
        value
        for _, name, value in parsed.attributes
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    assert {value for value in fetched if not value.startswith("#")} == {"data:,"}
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    assert not re.search(r"<(script|iframe|object|embed|base)\b", source)


@pytest.mark.slow
def test_the_same_report_gives_the_same_page(source: str):
    assert page(REPORT) == source


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in channels
    ]
    return sum(
        weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_plots_have_the_contrast_that_wcag_aa_asks_for(theme: int, source: str):
    colors = dict(
        re.findall(
            r"--([\w-]+): (#\w{6});",
            re.findall(r":root \{(.*?)\}", source, re.DOTALL)[theme],
        )
    )
    text, plots = (
        ["ink", "soft", "accent", "alarm"],
        [name for name in colors if name.startswith("plot-")],
    )
    assert len(plots) == 6  # the first plot colour is the accent
    for name, paper, least in [
        (name, paper, 4.5) for name in text for paper in ("paper", "wash")
    ] + [(name, "paper", 3) for name in plots]:
        darker, lighter = sorted(luminance(colors[key]) for key in (name, paper))
        assert (lighter + 0.05) / (darker + 0.05) >= least, (name, paper)


def test_sections_that_the_report_lacks_are_not_there():
    parsed = Parsed(page(BARE_REPORT))
    gone = {"warnings", "recommendation", "parity", "quantization"}
    assert list(parsed.text) == ["", *(section for section in SECTIONS if section not in gone)]
    words = " ".join(parsed.text[""].split())
    assert (
        "W4A8 marr-stream takes 12.58 MB, and 7.34 ms at batch 1. Its top-1 accuracy is 54.2 "
        "(51.9–56.4) %." in words
    )
    assert "Gate" not in words
    assert not any(heading in parsed.text["latency"] for heading in ("Throughput", "threads"))
    assert "Image by image" not in parsed.text["accuracy"]
    for words in parsed.text.values():
        assert "None" not in words


@pytest.mark.slow
@pytest.mark.parametrize("others", [(), (FP16, FP32)])
def test_a_page_has_models_without_finite_logits_and_says_why(others: tuple[MeasuredModel, ...]):
    model = without_accuracy(replace(BARE_MODEL, latency=W4A8.latency))
    report = replace(BARE_REPORT, models=(*others, model), recommendation={})
    parsed = Parsed(page(report))
    assert "reaches 9.1e+07, where float16 ends at 65504. It has no accuracy." in " ".join(
        parsed.text["models"].split()
    )
    # The section of accuracies has the models that have one, and is left out without any.
    assert ("accuracy" in parsed.text) == bool(others)
    named = rows(parsed, "accuracy")[1:] if others else []
    assert [row.startswith("W4A8") for row in named] == [False] * len(others)


def test_a_page_of_embeddings_says_how_like_they_are_what_they_find_and_what_is_lost():
    parsed = Parsed(page(EMBEDDER_REPORT))
    words = " ".join(parsed.text[""].split())
    assert "It loses 1.3 points of k-NN top-1 accuracy against fp32." in words
    assert "points of k-NN top-1 lost" in words
    assert rows(parsed, "models")[0].startswith("model | flavour | k-NN top-1 % (95 %) | cosine")
    assert rows(parsed, "models")[2].startswith(
        "W4A8 marr-stream | integer | 54.2 (52.2–56.2) | 0.9876 | 12.58"
    )
    assert "Embeddings" in parsed.text["accuracy"]
    assert "among 3,720 images of train" in parsed.text["accuracy"]
    table = rows(parsed, "accuracy")
    assert (
        "W4A8 marr-stream | 0.9876 (0.9872–0.9880) | 0.9676 | 0.8876 | 83.0 (82.0–84.0) | 0.0371"
        in table
    )
    found = "54.2 (52.2–56.2)1.3 (0.2…2.4)"
    assert (
        f"W4A8 marr-stream | {found} | {found} | {found} | 54.2 (53.2–55.2)1.3 (0.9…1.7)" in table
    )
    assert "W4A8 marr-stream | fp32 | 1.3 (0.2 to 2.4) | 87 | 63 | 0.0602" in table


@pytest.mark.slow
def test_a_page_of_dense_outputs_has_a_row_for_each_and_begins_with_the_least():
    report = replace(EMBEDDER_REPORT, models=(replace(FP32, accuracy=None), DENSE), gallery=None)
    parsed = Parsed(page(report))
    assert "Its outputs have a mean cosine of 0.9712 (0.9701–0.9723) with those of fp32." in (
        " ".join(parsed.text[""].split())
    )
    assert rows(parsed, "outputs")[1:] == [
        "W4A8 marr-stream | tokens | 0.9912 (0.9908–0.9916) | 0.9571 | 0.1312 | –",
        "W4A8 marr-stream | masks | 0.9712 (0.9701–0.9723) | 0.9113 | 0.2312 | 93.4",
    ]


@pytest.mark.slow
def test_a_page_tells_every_verdict_on_a_candidate():
    verdicts = tuple(
        Verdict(EMBEDDER.name, demand, "held", "interval", f"held: {demand}", None)
        for demand in ("max_drop", "min_cosine")
    )
    report = replace(EMBEDDER_REPORT, gate=Gate(2.0, 0.9, "fp32", verdicts))
    words = Parsed(page(report)).text[""]
    assert "held: max_drop" in words
    assert "held: min_cosine" in words


def test_without_classes_a_page_begins_with_how_alike_the_candidate_and_fp32_answer():
    model = replace(W4A8, accuracy=None, agreement=Agreement(0.937, 0.01, 1860, "80" * 233))
    assert sentence(model, FP32).endswith(
        "It gives 93.7 % of 1,860 images the class that fp32 gives them."
    )
    assert ("93.7 %", "with fp32's class", "of 1,860 images") in key_numbers(model, FP32)


@pytest.mark.slow
def test_a_report_of_a_provider_that_compiles_the_graph_is_a_page_still():
    """Nobody can look into such a graph: it has no audit and no precision."""
    model = replace(BARE_MODEL, audit=(), precision=None, peak_memory_mb=None)
    parsed = Parsed(page(replace(BARE_REPORT, models=(model,))))
    assert "precision" not in parsed.text
    assert rows(parsed, "accuracy")[1:] == [
        "W4A8 marr-stream | 54.2 (51.9–56.4) | 78.1 (76.2–79.9) | – | –"
    ]
    assert rows(parsed, "size")[-1] == "W4A8 marr-stream | 4.08 | 33.8 | – | 731.0"


@pytest.mark.parametrize(
    ("low", "drop", "high", "expected"),
    [
        (0.004, 0.013, 0.022, "It loses 1.3 points of top-1 accuracy against fp32."),
        (-0.022, -0.013, -0.004, "It gains 1.3 points of top-1 accuracy against fp32."),
        (
            -0.004,
            0.005,
            0.014,
            "Its top-1 accuracy is 54.2 %, which 1,860 images cannot tell from that of fp32.",
        ),
    ],
)
def test_a_drop_is_claimed_only_where_the_interval_shows_one(
    low: float, drop: float, high: float, expected: str
):
    assert W4A8.accuracy.against is not None
    against = replace(W4A8.accuracy.against, drop_low=low, drop=drop, drop_high=high)
    model = replace(W4A8, accuracy=replace(W4A8.accuracy, against=against))
    assert sentence(model, reference_of(REPORT.models)).endswith(expected)


def test_a_candidate_that_is_slower_has_a_factor_below_one():
    slower = replace(W4A8, latency=(replace(W4A8.latency[0], ratio_fp32=1.25),))
    assert key_numbers(slower, reference_of(REPORT.models))[1][0] == "0.80 ×"


@pytest.mark.slow
def test_flavours_of_one_artifact_share_its_section():
    second = replace(W4A8, name="W4A8 marr-stream qdq", flavor="qdq")
    report = replace(REPORT, models=(*REPORT.models, second))
    text = Parsed(page(report)).text["quantization"]
    assert "W4A8 marr-stream, W4A8 marr-stream qdq" in text
    assert text.count("Every linear") == 2  # the heading of the fold and that of its table


ATTACK = "<script>alert(1)</script>\"&'$x^{"


def planted(value: Any, attack: str = ATTACK) -> Any:
    """The report with the attack behind every text in it, but those that say what something is."""
    if is_dataclass(value):
        kept = ("schema", "role", "flavor", "verdict", "first_loss", "hits", "source")
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(
            value,
            **{key: planted(part, attack) for key, part in parts.items() if key not in kept},
        )
    if isinstance(value, dict):  # operators and packages are names, too
        return {key + attack: planted(part, attack) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(planted(part, attack) for part in value)
    return value + attack if isinstance(value, str) else value


def test_whatever_came_from_files_is_text_and_not_markup(parsed: Parsed):
    report = planted(REPORT)
    source = page(report)
    assert "<script" not in source
    found = Parsed(source)
    assert json.loads(found.document) == report.to_json()
    assert rows(found, "models")[1].startswith(f"fp16{ATTACK} |")
    assert ATTACK in found.text["conditions"]
    assert found.tags == parsed.tags


@pytest.mark.parametrize("name", ["page.htm", "page"])
def test_another_suffix_is_refused_before_anything_is_measured(
    name: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", "nowhere", "--report", name]) == 1
    assert f"written as .html: got the suffix '{Path(name).suffix}'" in capsys.readouterr().err


def test_without_its_packages_the_error_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        BenchError, match=r"pages need jinja2: pip install '.\[plots\]' in the clone"
    ):
        check_page(Path("page.html"))


@pytest.mark.slow
def test_the_bench_writes_the_page_with_how_its_artifact_was_quantized(
    tiny: str, image_folder: Path, tmp_path: Path
):
    artifact, page_file, json_file = (
        tmp_path / "artifact",
        tmp_path / "new" / "bench.html",
        tmp_path / "bench.json",
    )
    data = ["--data", str(image_folder)]
    assert main(["quantize", tiny, *data, "--samples", "8", "-o", str(artifact)]) == 0
    quick = ["--baseline", "fp32", "--batch", "1", "--rounds", "1", "--seconds", "0"]
    assert (
        main(
            [
                "bench",
                str(artifact),
                *data,
                *quick,
                "--report",
                str(page_file),
                "--json",
                str(json_file),
            ]
        )
        == 0
    )
    report = json.loads(json_file.read_text())
    assert [model["quantization"] for model in report["models"]] == [
        None,
        json.loads((artifact / "quantization.json").read_text()),
    ]
    parsed = Parsed(page_file.read_text())
    assert json.loads(parsed.document) == report
    assert (
        len(parsed.rows["quantization"]) == 1 + 8
    )  # four linears in each of two blocks, below the heading


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-quic",
    "disable-gpu",
)
PHONE = 360  # px


def browse(source: str, folder: Path) -> tuple[str, list[str]]:
    """The document that Chromium makes of a page, and what it wrote to its console."""
    file = folder / "page.html"
    file.write_text(source)
    assert CHROMIUM is not None
    flags = [
        f"--{flag}"
        for flag in (
            "headless",
            "no-sandbox",
            *QUIET,
            "enable-logging=stderr",
            "v=0",
            "dump-dom",
            f"user-data-dir={folder / 'user'}",
        )
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    "report",
    [REPORT, BARE_REPORT, planted(REPORT, "-" + "long" * 20)],
    ids=["full", "bare", "long"],
)
def test_a_browser_has_no_complaint_and_the_page_is_no_wider_than_a_phone(
    report: BenchReport, tmp_path: Path
):
    """In frames of a page that measures them, beside one that is too wide: the measure must see
    that."""
    frames = [page(report), f"<!doctype html><div style='width:{PHONE + 1}px'>wide</div>"]
    widths = "Array.from(frames, frame => frame.document.scrollingElement.scrollWidth)"
    outer = "".join(
        f'<iframe width="{PHONE}" height="800" srcdoc="{html.escape(frame)}"></iframe>'
        for frame in frames
    )
    script = (
        "onload = () => { console.error('seen'); "
        f"document.body.textContent = 'widths ' + {widths} }}"
    )
    dumped, console = browse(f"<!doctype html><script>{script}</script><body>{outer}", tmp_path)
    assert [line for line in console if '"seen"' not in line] == []
    assert len(console) == 1
    found = re.search(r"widths (\d+),(\d+)", dumped)
    assert found is not None
    assert (int(found[1]) <= PHONE, int(found[2]) > PHONE) == (True, True)
