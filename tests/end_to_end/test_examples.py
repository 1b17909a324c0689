"""The scripts in examples/ run as their docstrings say."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from shlex import split

import pytest
import torch
import typer

FOLDED = ["folded W4A16", "folded W3A16", "folded W2A16"]
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *options: str, environment: dict[str, str] | None = None) -> str:
    """What a script prints."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **(environment or {})},
    ).stdout


@pytest.mark.slow
def test_the_benchmark_prints_the_sweep_beside_its_products():
    report = json.loads(run("benchmark_quantize.py", *split("sweep --size 128 --rounds 1")))
    assert set(report["seconds"]) == {"sweep", "products"}
    assert report["ratio"] > 0


@pytest.mark.slow
def test_the_benchmark_prints_each_methods_time_against_gptqs(tiny: str, image_folder: Path):
    options = ["--data", str(image_folder), *split("--samples 8 --method marr-gptaq")]
    report = json.loads(run("benchmark_quantize.py", "methods", tiny, *options))
    assert set(report["seconds"]) == {"gptq", "marr-gptaq"}
    assert report["ratio"]["marr-gptaq"] == pytest.approx(
        report["seconds"]["marr-gptaq"][0] / report["seconds"]["gptq"][0]
    )


@pytest.mark.slow
def test_the_benchmark_prints_the_peak_memory():
    options = split("memory --model vit_tiny_patch16_224 --samples 2 --depth 1")
    report = json.loads(run("benchmark_quantize.py", *options))
    assert report["peak_mb"] > report["stream_mb"] > 0


@pytest.mark.slow
def test_the_comparison_of_tools_has_a_row_for_each_and_says_why_one_has_no_figures(
    tiny: str, image_folder: Path, tmp_path: Path
):
    (tmp_path / "openvino.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')\n"
    )
    tools = ("integer", "static", "dynamic", "matmulnbits", "openvino")
    chosen = [option for name in tools for option in ("--tool", name)]
    few = split("--samples 8 --images 9 --rounds 1 --seconds 0 --threads 1 --method rtn")
    report = tmp_path / "report.json"
    options = [*chosen, "--data", str(image_folder), *few, "--json", str(report)]
    # A package that cannot be imported, found before one that may be installed.
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    printed = run("compare_tools/compare.py", tiny, *options, environment={"PYTHONPATH": path})
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
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
    report = json.loads(run("scaling_model.py", "--model", "ViT-L"))
    one, eight, many = report["seconds"]
    assert [row["processes"] for row in report["seconds"]] == [1, 8, 64]
    assert eight["passes"] == pytest.approx(one["passes"] / 8) == pytest.approx(8 * many["passes"])
    assert one["column loop"] == many["column loop"]
    assert one["communication"] == 0 < eight["communication"]
    assert one["all"] == pytest.approx(
        sum(value for name, value in one.items() if name not in ("model", "processes", "all"))
    )


@pytest.mark.parametrize(
    ("name", "tiny", "reason"),
    [
        ("there", True, "there' exists: choose another place"),
        pytest.param(
            "new.json",
            False,
            "torch finds no CUDA device; --tiny tries the script on the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_the_measurements_on_a_gpu_are_refused_before_anything_is_made(
    name: str,
    tiny: bool,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.syspath_prepend(EXAMPLES)
    gpu_server = importlib.import_module("gpu_server")
    (tmp_path / "there").mkdir()
    with pytest.raises(typer.Exit):
        gpu_server.main(tmp_path / name, tiny)
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("gpu_server.py: ")
    assert sentence.endswith(reason)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
def test_the_measurements_on_a_gpu_run_in_small_on_the_cpu(tmp_path: Path):
    report = tmp_path / "gpu.json"
    run("gpu_server.py", "--tiny", "-o", str(report))
    found = json.loads(report.read_text())
    assert list(found["graphs"]) == ["fp16, torch's trace", "fp16", *FOLDED]
    for row in found["graphs"].values():
        assert row["finite"]
        assert row["misplaced"] == []
        assert set(row["plain"]["ms"]) == {"1", "2"}
    assert found["graphs"]["fp16"]["plain"]["to_fp16"] == {"1": 1, "2": 1}
    assert found["quantize"]["tiny"]["exit_code"] == 0
