"""`marrq compare` and `marrq inspect`: runs once each, resumable, and drawn."""

import json
import shutil
from pathlib import Path
from shlex import split

import pytest

from marrq.cli import main
from marrq.quantized_model import RefinementRecord
from marrq.workflows.devices import peak_memory

RUN = {
    *split("scheme method seed top1 top1_low top1_high top5 top5_low top5_high agreement images"),
    *split("divergence error relative_error bits_per_weight seconds peak_memory_mb"),
    *split("alphas fallbacks shortfalls"),
}
"""The keys of a run."""


@pytest.fixture
def arguments(tiny: str, image_folder: Path, tmp_path: Path) -> list[str]:
    few = split("--samples 8 --scheme W4A4:per-token")
    return ["compare", tiny, "--data", str(image_folder), *few, "-o", str(tmp_path / "c.json")]


def test_every_run_is_in_the_report_once_and_is_not_done_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    few = [*arguments, "--method", "gptq", "--method", "marr-gptaq,alpha=grid", "--seeds", "2"]
    assert main(few) == 0
    first = json.loads((tmp_path / "c.json").read_text())
    assert first["schema"] == "marrq.compare/2"
    assert all(set(run) == RUN for run in first["runs"])
    assert (
        len({(run["scheme"], run["method"], run["seed"]) for run in first["runs"]})
        == len(first["runs"])
        == 4
    )
    printed = capsys.readouterr().out
    assert "| gptq |" in printed
    assert main([*few, "--method", "rtn"]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["runs"][:4] == first["runs"]
    assert "rtn" in capsys.readouterr().out
    assert main(few) == 0
    assert "rtn" not in capsys.readouterr().out, "runs that were not asked for are not shown"


def test_sharing_the_full_precision_tokens_changes_no_result(arguments: list[str], tmp_path: Path):
    def errors(*methods: str) -> dict[str, float]:
        (tmp_path / "c.json").unlink(missing_ok=True)
        chosen = [word for method in methods for word in ("--method", method)]
        assert main([*arguments, "--seeds", "1", *chosen]) == 0
        runs = json.loads((tmp_path / "c.json").read_text())["runs"]
        return {run["scheme"]: run["error"] for run in runs if run["method"] == "marr-stream"}

    assert errors("gptq,equalize=off", "gptq", "marr-stream") == errors("marr-stream")


def test_another_model_or_sample_does_not_get_into_the_same_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.json").write_text("{}")
    assert main(arguments) == 1
    assert "is no comparison" in capsys.readouterr().err
    (tmp_path / "c.json").unlink()
    assert main([*arguments, "--method", "rtn", "--seeds", "1"]) == 0
    assert main([*arguments, "--method", "rtn", "--seeds", "1", "--samples", "9"]) == 1
    assert "compares with another samples" in capsys.readouterr().err


def test_images_that_were_added_to_train_begin_another_comparison(
    arguments: list[str], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copied = tmp_path / "images"
    shutil.copytree(image_folder, copied)
    few = [str(copied) if word == str(image_folder) else word for word in arguments]
    few += ["--method", "rtn", "--seeds", "1"]
    assert main(few) == 0
    first = next(copied.rglob("train/*/*.png"))
    shutil.copy(first, first.with_name("added.png"))
    assert main(few) == 1
    assert "compares with another calibration" in capsys.readouterr().err


def test_two_names_of_one_method_are_one_run(arguments: list[str], tmp_path: Path):
    names = ["--method", "marr", "--method", "marr-stream", "--method", "marr"]
    assert main([*arguments, "--seeds", "1", *names]) == 0
    assert len(json.loads((tmp_path / "c.json").read_text())["runs"]) == 1


def test_what_a_run_could_not_do_is_told_and_in_the_report(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(RefinementRecord, "helped", property(lambda record: False))
    few = "refine=on,refine.images=6,refine.batch=2,refine.held-out=4"
    assert main([*arguments, "--seeds", "1", "--method", f"gptq,{few}"]) == 0
    [run] = json.loads((tmp_path / "c.json").read_text())["runs"]
    assert "the refinement was taken back" in run["shortfalls"][0]
    said = " ".join(capsys.readouterr().err.split())
    assert "seed 0: the refinement was taken back" in said


def test_a_refinement_is_not_judged_by_the_images_it_learns_from(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    both = tmp_path / "both"
    shutil.copytree(image_folder / "train", both)
    few = "--samples 8 --seeds 1 --method gptq,refine=on,refine.images=6,refine.held-out=4"
    few += ",refine.batch=2"
    command = ["compare", tiny, "--data", str(both), *split(few), "-o", str(tmp_path / "c.json")]
    assert main(command) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "would learn from images" in said


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ("--scheme W8A8 --method gptq --method gptq,lowrank=serq:4", "needs weights of"),
        ("--scheme WmixA8 --method gptq", "has no weight bits"),
        ("--method gptq --method gptq,refine=on", "the refinement learns from 1200 others"),
    ],
)
def test_a_run_that_cannot_be_done_is_told_before_the_first_one(
    arguments: list[str],
    chosen: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert main([*arguments, *split(chosen)]) == 1
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "c.json").exists()


def test_a_plot_that_could_not_be_written_is_refused_before_the_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*arguments, "--plot", str(tmp_path / "c.gif")]) == 1
    assert ".png or .svg" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()


def test_the_comparison_is_drawn(arguments: list[str], tmp_path: Path):
    assert (
        main([*arguments, "--method", "rtn", "--seeds", "1", "--plot", str(tmp_path / "c.svg")])
        == 0
    )
    assert "rtn" in (tmp_path / "c.svg").read_text()


def test_inspect_shows_every_linear_and_draws_the_search(
    demo_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", str(demo_artifact), "--plot", str(tmp_path / "alpha.svg")]) == 0
    printed = capsys.readouterr().out
    paths = [
        report["path"] for report in json.loads((demo_artifact / "quantization.json").read_text())
    ]
    assert all(path in printed for path in paths)
    assert "α" in (tmp_path / "alpha.svg").read_text()


def test_all_settings_together_give_an_artifact_that_loads(
    tiny: str, image_folder: Path, tmp_path: Path
):
    from marrq.artifact.folder import load

    few = ["quantize", tiny, "--data", str(image_folder), "--samples", "8"]
    scheme = split("--scheme W3A4-g16-sym --activations per-token")
    named = split("--alpha grid --lowrank srr:4:int8 --rotate")
    others = split("--set equalize=off --set damping=0.05 --set clip=weights")
    folder = tmp_path / "a"
    assert main([*few, *scheme, *named, *others, "-o", str(folder)]) == 0
    method = load(folder).method
    assert (method.alpha.strategy, str(method.lowrank), method.rotation, method.equalize) == (
        "grid",
        "srr:4:int8",
        0,
        False,
    )
    assert (method.damping, method.clip, method.name) == (0.05, "weights", "marr-stream")


def test_the_peak_is_that_of_the_block_alone():
    with peak_memory() as peak:
        before = peak()
        if before is None:
            pytest.skip("the system does not tell the peak")
        held = bytearray(200_000_000)
        del held
    highest = peak() or 0
    assert 190 < highest - before < 400
    with peak_memory() as later:
        assert (later() or 0) < highest - 150
