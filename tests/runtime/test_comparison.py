"""The comparison of methods: its rows against hand-computed values, its table and Markdown, and its
plots and those of the α search."""

import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from runtime.errors import BenchError
from runtime.quantization import QuantizedModule
from runtime.report.comparison import (
    SCHEMA,
    ComparisonReport,
    ComparisonRow,
    markdown,
    summarize,
    table,
)
from runtime.report.inspection import quantization_table
from runtime.report.plots import plot_alphas, plot_comparison


def costs(seconds: float, peak_memory_mb: float) -> dict[str, float]:
    return {"seconds": seconds, "peak_memory_mb": peak_memory_mb}


def run(scheme: str, method: str, seed: int, top1: float, **changes: float) -> dict[str, Any]:
    numbers = {
        "agreement": 0.5,
        "divergence": 0.75,
        "error": 100.0,
        "relative_error": 0.25,
        "bits_per_weight": 4.125,
        **costs(2.0, 300.0),
    }
    interval = {"top1_low": top1 - 0.03, "top1_high": top1 + 0.03, "top5": 1.0}
    return {
        "scheme": scheme,
        "method": method,
        "seed": seed,
        "top1": top1,
        **interval,
        **numbers,
        **changes,
        "alphas": {},
    }


def read(runs: list[dict[str, Any]]) -> ComparisonReport:
    """The report with these runs."""
    return ComparisonReport.read(
        {
            "schema": SCHEMA,
            "environment": {},
            "model": "demo",
            "data": {"path": "images", "images": 5, "hash": "0"},
            "samples": 256,
            "float": {"top1": 0.875, "images": 64},
            "runs": runs,
        }
    )


@pytest.fixture
def report(runs: list[dict[str, Any]]) -> ComparisonReport:
    return read(runs)


@pytest.fixture
def runs() -> list[dict[str, Any]]:
    """In an order that interleaves the schemes; gptq was not run at W2A8."""
    return [
        run("W4A4 per-token", "gptq", 0, 0.5),
        run("W2A8", "marr-exact", 0, 0.125),
        run(
            "W4A4 per-token",
            "marr-exact",
            0,
            0.75,
            agreement=0.25,
            error=1e4,
            relative_error=0.5,
            **costs(4.0, 200.0),
        ),
        run(
            "W4A4 per-token",
            "marr-exact",
            1,
            0.5,
            agreement=0.75,
            error=3e4,
            relative_error=1.0,
            divergence=0.25,
            **costs(8.0, 400.0),
        ),
    ]


def searched(path: str, alpha: float | None, steps: list[dict[str, Any]]) -> QuantizedModule:
    """A module with the steps of its search."""
    numbers = {"error": 1.0, "relative_error": 0.1, "mse": 0.1, "clipped": 0.0, "damping": 0.01}
    found = {"path": path, "num_bits": 4, "alpha": alpha, "trajectory": steps, "fallback": None}
    return QuantizedModule.read({**found, **numbers})


@pytest.fixture
def quantization() -> list[QuantizedModule]:
    """Two blocks: searches judged by halves, one judged on its own data, one step long, one without
    J, and a module that has no α."""
    halves = [
        {"half": 1, "alpha": 0.25, "error": 8.0},
        {"half": 1, "alpha": 0.5, "error": 6.0},
        {"half": 0, "alpha": 0.25, "error": 7.0},
    ]
    whole = [
        {"half": None, "alpha": 0.25, "error": 8.0},
        {"half": None, "alpha": 1.5, "error": float("inf")},
    ]
    still = [{"half": None, "alpha": 0.0, "error": 0.0}]
    modules = [
        ("blocks.0.qkv", 0.5, halves),
        ("blocks.0.fc1", None, []),
        ("blocks.1.qkv", 0.25, whole),
        ("blocks.1.fc2", 0.0, still),
    ]
    return [searched(*module) for module in modules]


def test_a_row_is_the_mean_over_its_seeds_with_the_extremes_of_top1_and_the_largest_memory(
    report: ComparisonReport,
):
    rows = summarize(report)
    assert [(row.scheme, row.method) for row in rows] == [
        ("W4A4 per-token", "gptq"),
        ("W2A8", "marr-exact"),
        ("W4A4 per-token", "marr-exact"),
    ]
    assert rows[2] == ComparisonRow(
        scheme="W4A4 per-token",
        method="marr-exact",
        score=0.625,
        score_worst=0.5,
        score_best=0.75,
        alike=0.5,
        divergence=0.5,
        divergence_worst=0.75,
        divergence_best=0.25,
        error=2e4,
        relative_error=0.75,
        bits_per_weight=4.125,
        seconds=6.0,
        peak_memory_mb=400.0,
        seeds=2,
    )


def test_a_single_seed_has_no_spread(report: ComparisonReport):
    assert [row.score_percent(1) for row in summarize(report)] == ["50.0", "12.5", "62.5 ± 12.5"]


def test_the_table_has_a_section_for_each_scheme_with_its_best_top1_in_bold(
    report: ComparisonReport,
):
    names, top1, *_ = (list(column.cells) for column in table(report).columns)
    assert names == ["W4A4 per-token", "  gptq", "  marr-exact", "W2A8", "  marr-exact"]
    assert [str(cell) for cell in top1 if isinstance(cell, Text) and cell.style == "bold"] == [
        "62.5 ± 12.5",
        "12.5",
    ]


def test_the_table_fits_100_columns_with_nothing_cut_off(runs: list[dict[str, Any]]):
    runs.append(
        run(
            "W3A16-g128 per-token",
            "rescomp-lowrank",
            0,
            1.0,
            error=1.234e-5,
            relative_error=0.01234,
            seconds=12345.6,
        )
    )
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table(read(runs)))
    text = capture.get()
    row = next(line for line in text.splitlines() if "rescomp-lowrank" in line)
    assert row.split() == [
        "rescomp-lowrank",
        "100.0",
        "50.0",
        "0.750",
        "1.23e-05",
        "0.0123",
        "4.12",
        "12345.6",
        "300",
        "1",
    ]
    assert "…" not in text
    assert "full precision 87.5 % on 64 images of images, 256 calibration images" in text


def test_markdown_has_a_dash_where_a_method_was_not_run(report: ComparisonReport):
    assert markdown(report).splitlines() == [
        "| top-1 % | W4A4 per-token | W2A8 |",
        "| --- | ---: | ---: |",
        "| gptq | 50.0 | – |",
        "| marr-exact | 62.5 ± 12.5 | 12.5 |",
        "",
        "| KL, nats | W4A4 per-token | W2A8 |",
        "| --- | ---: | ---: |",
        "| gptq | 0.750 | – |",
        "| marr-exact | 0.500 ± 0.250 | 0.750 |",
        "",
        "full precision 87.5 % on 64 images of images, 256 calibration images",
    ]


SIGNATURES = {".png": b"\x89PNG\r\n", ".svg": b"<?xml"}


def test_a_long_name_of_a_method_is_broken_at_its_settings(
    runs: list[dict[str, Any]], tmp_path: Path
):
    runs.append(
        run("W2A8", "marr-gptaq,pid.proportional=0.3,pid.integral=0.05,lowrank=srr:32", 0, 0.25)
    )
    plot_comparison(read(runs), tmp_path / "comparison.svg")
    text = (tmp_path / "comparison.svg").read_text()
    for part in ("marr-gptaq,pid.proportional=0.3,", "pid.integral=0.05,lowrank=srr:32"):
        assert f">{part}</" in text


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_the_same_input_gives_the_same_bytes_of_the_format_that_the_suffix_names(
    report: ComparisonReport, quantization: list[QuantizedModule], tmp_path: Path, suffix: str
):
    def draw(name: str) -> list[bytes]:
        files = [tmp_path / f"{name}-comparison{suffix}", tmp_path / f"{name}-alphas{suffix}"]
        plot_comparison(report, files[0])
        plot_alphas(quantization, files[1])
        return [file.read_bytes() for file in files]

    first = draw("first")
    assert all(content.startswith(SIGNATURES[suffix]) for content in first)
    assert draw("second") == first


def test_the_plot_of_a_comparison_names_methods_schemes_and_full_precision_as_text(
    runs: list[dict[str, Any]], tmp_path: Path
):
    runs += [run(scheme, "rtn", 0, 0.125) for scheme in ("W3A8", "W4A8")]
    plot_comparison(read(runs), tmp_path / "comparison.svg")
    text = (tmp_path / "comparison.svg").read_text()
    for name in (
        "gptq",
        "marr-exact",
        "rtn",
        "W4A4 per-token",
        "W2A8",
        "W3A8",
        "W4A8",
        "full precision, 87.5 %",
    ):
        assert f">{name}</text>" in text


def test_the_plot_of_alphas_leaves_out_the_modules_without_one(
    quantization: list[QuantizedModule], tmp_path: Path
):
    plot_alphas(quantization, tmp_path / "alphas.svg")
    text = (tmp_path / "alphas.svg").read_text()
    assert [kind for kind in ("qkv", "fc1", "fc2") if f">{kind}</text>" in text] == ["qkv", "fc2"]


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_a_method_without_a_search_has_no_plot_of_alphas(alpha: float | None, tmp_path: Path):
    module = searched("blocks.0.qkv", alpha, [])
    with pytest.raises(BenchError, match="no search of α"):
        plot_alphas([module], tmp_path / "alphas.png")
    assert not (tmp_path / "alphas.png").exists()


@pytest.mark.parametrize("name", ["plot.pdf", "plot"])
def test_another_suffix_is_refused_with_the_choices(
    report: ComparisonReport, tmp_path: Path, name: str
):
    with pytest.raises(BenchError, match=rf"\.png or \.svg: got the suffix '{Path(name).suffix}'"):
        plot_comparison(report, tmp_path / name)


def test_without_matplotlib_the_error_says_how_to_install_it(
    report: ComparisonReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match=r"pip install '.\[plots\]' in the clone"):
        plot_comparison(report, tmp_path / "plot.png")


def test_a_long_path_cuts_off_no_number_of_how_an_artifact_was_quantized():
    path = "model.encoder.layer.11.attention.attention.query_projection"
    console = Console(width=80, record=True, file=StringIO())
    console.print(quantization_table([searched(path, 0.25, [])]))
    text = console.export_text()
    assert "…" not in text
    [row] = [line for line in text.splitlines() if "0.25" in line]
    assert row.split()[1:] == ["4", "0.25", "0", "1.00e-01", "0.0", "0.01"]
