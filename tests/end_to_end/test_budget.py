"""A budget from the command line: measured once, met exactly, and judged by accuracy if it is a
limit of accuracy."""

import json
from pathlib import Path
from shlex import split

import pytest

from marrq.artifact.folder import load
from marrq.artifact.tensors import tensors_of
from marrq.cli import main
from marrq.quantizers.linear import bits_per_weight

TINY = "--samples 8 --method gptq"


@pytest.fixture
def data(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return f"--data {image_folder} {TINY}"


def test_costs_are_measured_once_and_serve_every_budget(
    tiny: str, data: str, capsys: pytest.CaptureFixture[str]
):
    assert main(split(f"sensitivity {tiny} {data} --json costs.json --plot costs.svg")) == 0
    printed = capsys.readouterr().out
    assert "blocks.1.mlp.fc2" in printed
    assert "3 everywhere" in printed
    assert Path("costs.svg").read_text().startswith("<?xml")
    costs = json.loads(Path("costs.json").read_text())
    assert costs["schema"] == "marrq.sensitivity/1"
    limit = f"quantize {tiny} {data} --sensitivity costs.json"
    assert main(split(f"{limit} --budget 4.2 -o bits")) == 0
    assert "bits a weight" in capsys.readouterr().err
    assert bits_per_weight(load("bits").module) <= 4.2
    # The same budget, measured on the way.
    assert main(split(f"quantize {tiny} {data} --budget 4.2 -o again")) == 0
    for name in ("config.json", "model.safetensors"):
        assert Path("bits", name).read_bytes() == Path("again", name).read_bytes()
    # And with tokens in files.
    files = f"quantize {tiny} {data} --budget 4.2 --work-dir work -o files"
    assert main(split(files)) == 0
    name = "model.safetensors"
    assert Path("bits", name).read_bytes() == Path("files", name).read_bytes()
    assert Path("work").is_dir()
    assert main(split("inspect bits")) == 0
    size = costs["curve"][len(costs["curve"]) // 2]["size_bytes"]
    assert main(split(f"{limit} --max-size {size / 1e6}MB -o size")) == 0
    tensors = tensors_of(load("size").module).values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= size
    assert main(split(f"{limit} --budget 2.1 -o small")) == 1
    assert "is too small" in capsys.readouterr().err


class Killed(BaseException):
    """A run that is killed."""


def test_a_budget_run_that_was_killed_goes_on_without_measuring_again(
    tiny: str, data: str, monkeypatch: pytest.MonkeyPatch
):
    run = f"quantize {tiny} {data} --budget 4.2"
    assert main(split(f"{run} -o whole")) == 0

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("marrq.workflows.budget.quantize_to_folder", killed)
        with pytest.raises(Killed):
            main(split(f"{run} -o killed"))
    with monkeypatch.context() as patched:
        patched.setattr("marrq.workflows.budget.sensitivity_of", killed)
        # Other images have other costs.
        with pytest.raises(Killed):
            main(split(f"{run} --seed 1 -o killed --resume"))
        # Without --resume everything begins again.
        with pytest.raises(Killed):
            main(split(f"{run} -o killed"))
        assert main(split(f"{run} -o killed --resume")) == 0
    for name in ("config.json", "model.safetensors"):
        assert Path("whole", name).read_bytes() == Path("killed", name).read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["killed", "whole"]


def test_costs_of_another_model_are_refused(
    tiny: str, data: str, capsys: pytest.CaptureFixture[str]
):
    assert main(split(f"sensitivity {tiny} {data} --json costs.json")) == 0
    limit = f"quantize {tiny} {data} --sensitivity costs.json --budget 4.2 -o out"
    assert main(split(f"{limit} --scheme WmixA4")) == 1
    assert "is the sensitivity of 'WmixA8 per-tensor'" in capsys.readouterr().err
    # Scales that the other costs did not count would break the budget.
    assert main(split(f"{limit} --set equalize=off")) == 1
    assert "is the sensitivity of 'gptq', not 'gptq,equalize=off'" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(split(f"{limit} --outputs tokens")) == 1
    assert "is the sensitivity of a model with other outputs" in " ".join(
        capsys.readouterr().err.split()
    )
    # A search of α is no part of the costs.
    assert main(split(f"{limit.replace('-o out', '-o searched')} --method marr")) == 0
    costs = json.loads(Path("costs.json").read_text())
    costs["about"]["weights_sha256"] = "0"
    Path("costs.json").write_text(json.dumps(costs))
    assert main(split(limit)) == 1
    assert "is the sensitivity of another model" in capsys.readouterr().err
    Path("costs.json").write_text("{}")
    assert main(split(limit)) == 1
    assert "the file is no sensitivity" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_smallest_model_within_a_limit_of_accuracy_is_found(
    tiny: str, data: str, capsys: pytest.CaptureFixture[str]
):
    # 24 images decide little, so the limit is wide; no limit at all is met by the smallest model.
    assert main(split(f"quantize {tiny} {data} --budget auto --max-drop 100 -o a")) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "models were made and judged on 24 images" in said
    assert set(load("a").widths.values()) == {2}
    # Nothing surely loses nothing.
    assert main(split(f"quantize {tiny} {data} --budget auto --max-drop 0 -o b")) == 1
    assert "no model surely loses at most 0 points" in capsys.readouterr().err
    assert not Path("b").exists()


@pytest.mark.slow
def test_the_smallest_embedder_is_found_by_its_neighbours(
    embedder: str, data: str, capsys: pytest.CaptureFixture[str]
):
    assert main(split(f"quantize {embedder} {data} --budget auto --max-drop 100 -o a")) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "models were made and judged on 24 images" in said
    assert set(load("a").widths.values()) == {2}
    # The drop is that of k-NN, as `evaluate` has it.
    assert main(split(f"evaluate a {data.partition(TINY)[0]} --json judged.json")) == 0
    [model] = [
        one
        for name, one in json.loads(Path("judged.json").read_text())["models"].items()
        if name != "float"
    ]
    drop = 100 * model["retrieval"]["knn20"]["against"]["drop"]
    assert f"lost {drop:.1f} points" in said


def test_embedders_of_images_without_classes_are_refused_before_work(
    embedder: str,
    data: str,
    tmp_path: Path,
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted(image_folder.rglob("*.png"))[:8]):
        (flat / f"{number}.png").write_bytes(image.read_bytes())
    command = f"quantize {embedder} --data {flat} {TINY} --budget auto --max-drop 1 -o a"
    assert main(split(command)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "accuracy cannot be measured" in said
    assert "is in no class folder" in said


def test_models_of_dense_outputs_are_refused_before_work(
    tiny: str, data: str, capsys: pytest.CaptureFixture[str]
):
    command = f"quantize {tiny} --outputs tokens {data} --budget auto --max-drop 1 -o a"
    assert main(split(command)) == 1
    assert "gives dense outputs alone" in " ".join(capsys.readouterr().err.split())


def test_what_can_be_known_is_told_before_the_costs_are_measured(
    tiny: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def measure(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    limit = f"quantize {tiny} {data} --budget 4.2"
    assert main(split(f"quantize {tiny} {data} -o there")) == 0
    capsys.readouterr()
    monkeypatch.setattr("marrq.pipeline.sensitivity.fisher_energies", measure)
    for more, sentence in (
        ("-o a --refine", "the refinement learns from 1200 others"),
        ("-o there --resume", "output 'there' exists"),
        ("-o a --budget 2.01", "is too small"),
        ("-o a --max-drop 1 --budget auto --refine", "the refinement learns from 1200 others"),
    ):
        assert main(split(f"{limit} {more}")) == 1
        assert sentence in " ".join(capsys.readouterr().err.split())
