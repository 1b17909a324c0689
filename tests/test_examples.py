"""The scripts in examples/ run as their docstrings say."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_methods_are_compared_once_each_and_the_table_has_a_row_for_each(tiny: str, image_folder: Path, tmp_path: Path):
    results = tmp_path / "methods.json"
    options = ["--data", str(image_folder), "-o", str(results), "--scheme", "W4A4:per-token", "--seeds", "1", "--samples", "8"]
    command = [sys.executable, str(EXAMPLES / "compare_methods.py"), tiny, *options]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    done = json.loads(results.read_text())
    assert set(done) == {"float", *(f"W4A4:per-token {method} 0" for method in ("rtn", "gptq", "gptaq", "marr"))}
    assert [line.split()[1] for line in first.stdout.splitlines() if line.startswith("|")] == [
        "top-1",
        "---",
        "rtn",
        "gptq",
        "gptaq",
        "marr",
    ]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == first.stdout
    assert again.stderr == ""


def test_the_parity_of_the_demo_is_float_rounding(demo_artifact: Path, tmp_path: Path):
    from marrq.cli import main

    file = tmp_path / "model.onnx"
    assert main(["export", str(demo_artifact), "-o", str(file)]) == 0
    command = [sys.executable, str(EXAMPLES / "parity.py"), str(demo_artifact), str(file), "--data", "demo", "--images", "100"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["images"] == 100
    assert report["torch to onnxruntime"]["least_cosine"] >= 0.9999
    assert report["torch to onnxruntime"]["same_top1"] >= 0.995
