"""`marrq quantize --refine`: what it writes; neither a stop nor more processes change it."""

import json
from pathlib import Path

import pytest
from test_distributed import torchrun

from marrq.cli import main
from marrq.cli.common import Bar
from marrq.quantized_model import RefinementRecord

SETTINGS = ("images=8", "held-out=8", "batch=4", "epochs=3")


class Stopped(Exception):
    pass


def command(tiny: str, images: Path, output: Path, *options: str) -> list[str]:
    chosen = ["--scheme", "W3A4", "--method", "gptq", "--samples", "8", "--refine"]
    settings = [part for one in SETTINGS for part in ("--set", f"refine.{one}")]
    return [
        "quantize",
        tiny,
        "--data",
        str(images),
        *chosen,
        *settings,
        *options,
        "-o",
        str(output),
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_command_refines_and_every_file_says_so(
    tiny: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    # The tiny model knows nothing, so that six steps help or not by chance.
    monkeypatch.setattr(RefinementRecord, "helped", property(lambda record: True))
    output = tmp_path / "artifact"
    assert main(command(tiny, image_folder, output)) == 0
    config = json.loads((output / "config.json").read_text())
    record = config["refinement"]
    assert (record["images"], record["held_out"], record["steps"]) == (8, 8, 6)
    assert record["files_sha256"] != config["calibration"]["files_sha256"]
    assert "refined on 8 further images in 6 steps: the loss" in capsys.readouterr().err
    assert main(["inspect", str(output)]) == 0
    assert "refined on 8 further images in 6 steps: the loss on 8" in capsys.readouterr().out
    assert "gptq refined" in (output / "README.md").read_text()


def test_no_file_calls_a_model_refined_whose_refinement_was_taken_back(
    tiny: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(RefinementRecord, "helped", property(lambda record: False))
    output = tmp_path / "artifact"
    assert main(command(tiny, image_folder, output)) == 0
    assert "the refinement was taken back" in " ".join(capsys.readouterr().err.split())
    assert "gptq refined" not in (output / "README.md").read_text()


def test_too_few_images_are_told_with_their_number_before_the_first_block(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wanted = command(tiny, image_folder, tmp_path / "artifact", "--seed", "1")
    assert main([text.replace("images=8", "images=10") for text in wanted]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "8 images calibrate, the refinement learns from 10 others and is judged by 8" in message
    assert "has 24: lower --samples, refine.images or refine.held-out, together by 2" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_is_refined_goes_on_to_the_same_bytes(
    tiny: str, image_folder: Path, tmp_path: Path
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(command(tiny, image_folder, whole)) == 0

    def show(bar: Bar, done: int, total: int, note: str) -> None:
        if note.startswith("loss") and done == 2:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "show", show)
        with pytest.raises(Stopped):
            main(command(tiny, image_folder, stopped))
    # The blocks are kept, and belong to no refinement.
    assert (tmp_path / ".stopped.checkpoint").exists()
    plain = [text for text in command(tiny, image_folder, stopped) if "refine" not in text]
    assert main([text for text in plain if text != "--set"]) == 1
    assert main(command(tiny, image_folder, stopped, "--resume")) == 0
    assert content(stopped) == content(whole)
    assert not (tmp_path / ".stopped.checkpoint").exists()


@pytest.mark.slow
def test_several_processes_write_the_bytes_of_one(tiny: str, image_folder: Path, tmp_path: Path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = torchrun(1, "-m", "marrq", *command(tiny, image_folder, alone))
    assert done.returncode == 0, done.stderr
    done = torchrun(2, "-m", "marrq", *command(tiny, image_folder, together))
    assert done.returncode == 0, done.stderr
    assert content(together) == content(alone)
