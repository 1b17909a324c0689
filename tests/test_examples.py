"""The scripts in examples/ run as their docstrings say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_benchmark_prints_the_sweep_beside_its_products():
    command = [sys.executable, str(EXAMPLES / "benchmark_quantize.py"), "sweep", "--size", "128", "--rounds", "1"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(report["seconds"]) == {"sweep", "products"}
    assert report["ratio"] > 0


def test_the_benchmark_prints_each_methods_time_against_gptqs(tiny: str, image_folder: Path):
    options = ["methods", tiny, "--data", str(image_folder), "--samples", "8", "--method", "marr-gptaq"]
    command = [sys.executable, str(EXAMPLES / "benchmark_quantize.py"), *options]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(report["seconds"]) == {"gptq", "marr-gptaq"}
    assert report["ratio"]["marr-gptaq"] == pytest.approx(report["seconds"]["marr-gptaq"][0] / report["seconds"]["gptq"][0])


def test_the_benchmark_prints_the_peak_memory():
    options = ["memory", "--model", "vit_tiny_patch16_224", "--samples", "2", "--depth", "1"]
    command = [sys.executable, str(EXAMPLES / "benchmark_quantize.py"), *options]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["peak_mb"] > report["stream_mb"] > 0


def test_the_parity_of_the_demo_is_float_rounding(demo_artifact: Path, tmp_path: Path):
    from marrq.cli import main

    file = tmp_path / "model.onnx"
    assert main(["export", str(demo_artifact), "-o", str(file)]) == 0
    command = [sys.executable, str(EXAMPLES / "parity.py"), str(demo_artifact), str(file), "--data", "demo", "--images", "100"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["images"] == 100
    assert report["torch to onnxruntime"]["least_cosine"] >= 0.9999
    assert report["torch to onnxruntime"]["same_top1"] >= 0.995
