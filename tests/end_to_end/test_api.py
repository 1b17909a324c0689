"""The Python API does what the command line does, and loads nothing before it is used."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import marrq
from marrq.artifact.tensors import tensors_of
from marrq.cli import main
from marrq.errors import MarrqError
from marrq.workflows.bench_options import BenchOptions

README = Path(__file__).parents[2] / "README.md"
QUICK = BenchOptions(baselines=(), batches=(1,), rounds=1, seconds=0)


def test_a_model_is_loaded_quantized_saved_exported_and_measured(
    tiny: str, image_folder: Path, tmp_path: Path
):
    model = marrq.load_model(tiny)
    images = marrq.find_images(str(image_folder), "train")
    quantized = marrq.quantize(model, images, scheme="W4A8", method="marr", samples=8, seed=0)
    artifact, file = str(tmp_path / "artifact"), str(tmp_path / "model.onnx")
    marrq.save(quantized, artifact)
    marrq.export(quantized, file)
    report = marrq.bench([file], str(image_folder), QUICK)
    assert [row.name for row in report.models] == ["W4A8 marr-stream"]
    assert marrq.load(artifact).reports == quantized.reports


def test_the_api_finds_the_codes_of_the_command_line(tiny: str, image_folder: Path, tmp_path: Path):
    images = marrq.find_images(str(image_folder), "train")
    quantized = marrq.quantize(marrq.load_model(tiny), images, "W4A4", "gptq", samples=8, seed=3)
    options = ["--scheme", "W4A4", "--method", "gptq", "--samples", "8", "--seed", "3"]
    folder = tmp_path / "artifact"
    command = ["quantize", tiny, "--data", str(image_folder), *options, "-o", str(folder)]
    assert main(command) == 0
    expected = tensors_of(marrq.load(folder).module)
    found = tensors_of(quantized.module)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_quantizing_leaves_the_float_model_as_it_was(tiny: str, image_folder: Path):
    model = marrq.load_model(tiny)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    images = marrq.find_images(str(image_folder), "train")
    quantized = marrq.quantize(model, images, method="rtn,rotate=0", samples=8)
    assert quantized.module is not model.module
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_budget_finds_the_widths_of_the_command_line(
    tiny: str, image_folder: Path, tmp_path: Path
):
    images = marrq.find_images(str(image_folder), "train")
    model = marrq.load_model(tiny)
    found = marrq.quantize(model, images, method="gptq", samples=8, budget=3.5)
    options = ["--method", "gptq", "--samples", "8", "--budget", "3.5"]
    folder = tmp_path / "artifact"
    command = ["quantize", tiny, "--data", str(image_folder), *options, "-o", str(folder)]
    assert main(command) == 0
    expected = marrq.load(folder)
    assert found.widths == expected.widths
    assert len(set(found.widths.values())) > 1
    codes, expected_codes = tensors_of(found.module), tensors_of(expected.module)
    assert all(torch.equal(codes[name], expected_codes[name]) for name in expected_codes)


def test_a_budget_may_be_a_size(tiny: str, image_folder: Path):
    images = marrq.find_images(str(image_folder), "train")
    model = marrq.load_model(tiny)
    small, large = (
        marrq.quantize(model, images, method="rtn", samples=8, budget=size)
        for size in ("70kB", "100kB")
    )
    assert sum(small.widths.values()) < sum(large.widths.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 1.5}, "budget must be more than 2 bits a weight, such as 3.0, or a size"),
        ({"budget": "auto"}, "such as 3.0, or a size such as 10MB: got 'auto'"),
        ({"budget": "1kB"}, "a size of 0.001 MB is too small"),
        ({"budget": 3.0, "scheme": "W4A8"}, "write --scheme WmixA8, not W4A8"),
        ({"scheme": "WmixA8"}, "leaves the weight bits to a budget"),
        ({"scheme": "W5A7"}, "unknown scheme 'W5A7'"),
        ({"method": "awq"}, "unknown method 'awq'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"samples": 99}, "fewer than the 99 samples"),
        ({"samples": -3}, "needs 2 images or more: got samples=-3"),
        ({"seed": 2**70}, "the seed must be a whole number from 0 to 2⁶³ - 1: got"),
        ({"scheme": "W4A16-mxint", "method": "gptq,clip=weights"}, "no clip=weights changes"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(
    tiny: str, image_folder: Path, wrong: dict[str, object], message: str
):
    images = marrq.find_images(str(image_folder), "train")
    with pytest.raises(MarrqError, match=message):
        marrq.quantize(marrq.load_model(tiny), images, **wrong)


def test_paths_are_names_and_a_wrong_split_is_told(tiny: str, image_folder: Path, tmp_path: Path):
    images = marrq.find_images(image_folder, "train")
    model = marrq.load_model(Path(tiny))
    marrq.save(marrq.quantize(model, images, samples=4, method="rtn"), tmp_path / "a")
    with pytest.raises(MarrqError, match="is quantized already: give the float model"):
        marrq.quantize(marrq.load(tmp_path / "a"), images)  # type: ignore[arg-type]
    with pytest.raises(MarrqError, match="the split is train or val: got 'training'"):
        marrq.find_images(image_folder, "training")


def test_every_public_function_is_listed_and_says_what_it_raises():
    assert set(marrq.__all__) <= set(dir(marrq))
    for name in marrq.__all__:
        assert "Raises" in getattr(marrq, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        marrq.quantise  # noqa: B018


def test_importing_marrq_loads_no_other_package():
    code = "import sys; before = set(sys.modules); import marrq; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout
    assert "rich" not in done.stdout


@pytest.mark.slow
def test_the_python_of_the_readme_runs(
    tiny: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its first block, with the model and the images of the tests."""
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    if block is None:
        pytest.skip("the README has no Python")
    code = re.sub(r'load_model\("[^"]*"\)', f"load_model({tiny!r})", block[1])
    code = code.replace('"IMAGES"', repr(str(image_folder)))
    code = re.sub(r"samples=\d+", "samples=8", code)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    assert any(tmp_path.iterdir())
