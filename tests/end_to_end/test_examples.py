"""The scripts in examples/ run as their docstrings say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_benchmark_prints_the_sweep_beside_its_products():
    command = [
        sys.executable,
        str(EXAMPLES / "benchmark_quantize.py"),
        "sweep",
        "--size",
        "128",
        "--rounds",
        "1",
    ]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(report["seconds"]) == {"sweep", "products"}
    assert report["ratio"] > 0


def test_the_benchmark_prints_each_methods_time_against_gptqs(tiny: str, image_folder: Path):
    options = [
        "methods",
        tiny,
        "--data",
        str(image_folder),
        "--samples",
        "8",
        "--method",
        "marr-gptaq",
    ]
    command = [sys.executable, str(EXAMPLES / "benchmark_quantize.py"), *options]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(report["seconds"]) == {"gptq", "marr-gptaq"}
    assert report["ratio"]["marr-gptaq"] == pytest.approx(
        report["seconds"]["marr-gptaq"][0] / report["seconds"]["gptq"][0]
    )


def test_the_benchmark_prints_the_peak_memory():
    options = ["memory", "--model", "vit_tiny_patch16_224", "--samples", "2", "--depth", "1"]
    command = [sys.executable, str(EXAMPLES / "benchmark_quantize.py"), *options]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["peak_mb"] > report["stream_mb"] > 0


def test_the_comparison_of_tools_has_a_row_for_each_and_says_why_one_has_no_figures(
    tiny: str, image_folder: Path, tmp_path: Path
):
    (tmp_path / "openvino.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')\n"
    )
    tools = ("integer", "static", "dynamic", "matmulnbits", "openvino")
    options = [option for name in tools for option in ("--tool", name)]
    options += [
        "--data",
        str(image_folder),
        "--samples",
        "8",
        "--images",
        "9",
        "--rounds",
        "1",
        "--seconds",
        "0",
    ]
    options += ["--threads", "1", "--method", "rtn", "--json", str(tmp_path / "report.json")]
    command = [sys.executable, str(EXAMPLES / "compare_tools" / "compare.py"), tiny, *options]
    path = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    }
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **path}
    ).stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert list(rows) == ["fp32", *tools]
    assert all(name in printed for name in rows)
    assert rows["fp32"]["least_cosine"] == pytest.approx(1)
    assert rows["fp32"]["latency"][0]["ratio_fp32"] == 1
    for name in tools[:-1]:
        assert 0 < rows[name]["size_bytes"] < rows["fp32"]["size_bytes"]
        assert 0.9 < rows[name]["median_cosine"] < 1
        assert rows[name]["latency"][1]["ratio_fp32"] > 0
    assert (
        rows["openvino"]["failure"]
        == "cannot import openvino: pip install -r examples/compare_tools/requirements.txt"
    )


def test_the_scaling_model_gives_less_time_to_more_processes_but_for_what_each_does_itself():
    command = [sys.executable, str(EXAMPLES / "scaling_model.py"), "--model", "ViT-L"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    one, eight, many = report["seconds"]
    assert [row["processes"] for row in report["seconds"]] == [1, 8, 64]
    assert eight["passes"] == pytest.approx(one["passes"] / 8) == pytest.approx(8 * many["passes"])
    assert one["column loop"] == many["column loop"]
    assert one["communication"] == 0 < eight["communication"]
    assert one["all"] == pytest.approx(
        sum(value for name, value in one.items() if name not in ("model", "processes", "all"))
    )
