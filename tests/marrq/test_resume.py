"""A run that is killed loses nothing: what it goes on to write is, byte for byte, what it would
have written."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_models import WIDTHS, hashed, noise, quantized, randomized, swin, vit
from torch import nn

from marrq.artifact.checkpoint import FolderCheckpoint
from marrq.cli import main
from marrq.cli.common import Bar
from marrq.distributed import ONE_PROCESS
from marrq.errors import MarrqError
from marrq.methods.spec import MethodSpec
from marrq.pipeline.block_inputs import in_files
from marrq.quantized_model import CalibrationRecord, QuantizationSettings
from marrq.schemes import parse_scheme

SETTINGS = {"model": {"name": "tiny"}, "scheme": 4}


def mobilevit() -> nn.Module:
    return randomized(timm.create_model("mobilevit_xxs", num_classes=5))


class Stopped(Exception):
    pass


def stop_after(blocks: int) -> Callable[..., None]:
    def done(count: int, total: int, reports: Any) -> None:
        if count == blocks:
            raise Stopped

    return done


def checkpoint(folder: Path, numbers: str, **settings: object) -> FolderCheckpoint:
    chosen = QuantizationSettings(
        parse_scheme(numbers, "per-tensor"),
        MethodSpec(),
        CalibrationRecord("noise", 10, 0, ""),
        WIDTHS if numbers.startswith("Wmix") else {},
    )
    return FolderCheckpoint(folder, {**SETTINGS, **settings}, chosen, ONE_PROCESS)


CASES = [
    (vit, "W4A4", "stream"),
    (vit, "W3A8-e8", "gptq,lowrank=lqer:4:int8"),
    (vit, "W3A8", "gptq,lowrank=serq:4"),
    (vit, "W2A16-mxint", "marr-exact,rotate=0"),
    (vit, "WmixA8-e8", "gptq"),
    pytest.param(vit, "W4A8", "marr", marks=pytest.mark.slow),
    pytest.param(swin, "W4A8", "rtn", marks=pytest.mark.slow),
    pytest.param(mobilevit, "W4A8", "exact", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("build", "scheme", "method"), CASES)
def test_a_run_that_is_stopped_after_any_block_goes_on_to_the_same_model(
    build: Callable[[], nn.Module], scheme: str, method: str, tmp_path: Path
):
    images = noise(10)
    expected = hashed(quantized(build(), images, scheme, method, batch_size=4))
    # Patch embedding and head are a fourth link: a run may end between it and the artifact.
    for blocks in (1, 2, 3, 4):
        try:
            stopped = checkpoint(tmp_path / "work", scheme)
            quantized(
                build(),
                images,
                scheme,
                method,
                batch_size=4,
                checkpoint=stopped,
                block_done=stop_after(blocks),
            )
        except Stopped:
            assert len(list((tmp_path / "work").glob("block-*"))) == blocks
    resumed = quantized(
        build(),
        images,
        scheme,
        method,
        batch_size=4,
        checkpoint=checkpoint(tmp_path / "work", scheme),
    )
    assert hashed(resumed) == expected


@pytest.mark.parametrize("build", [vit, pytest.param(mobilevit, marks=pytest.mark.slow)])
def test_tokens_in_files_give_what_tokens_in_memory_give_and_leave_no_file(
    build: Callable[[], nn.Module], tmp_path: Path
):
    models = [
        quantized(build(), noise(10), "W4A4", "gptq", batch_size=4, **options)
        for options in ({}, {"store": in_files(tmp_path)})
    ]
    assert hashed(models[0]) == hashed(models[1])
    assert not list(tmp_path.iterdir())


def test_a_batch_in_a_file_is_mapped_only_while_it_is_used(tmp_path: Path):
    batches = [torch.randn(3, 5, 7), torch.randn(2, 5, 7), torch.randn(0, 5, 7)]
    kept = in_files(tmp_path)(batches)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(kept, batches, strict=True))
    kept[0].zero_()
    assert torch.equal(kept[0], batches[0])


def leave_first_block(folder: Path) -> None:
    """An unfinished run of a tiny model in the folder."""
    with pytest.raises(Stopped):
        quantized(
            vit(),
            noise(4),
            "W4A8",
            "rtn",
            checkpoint=checkpoint(folder, "W4A8"),
            block_done=stop_after(1),
        )


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path):
    leave_first_block(tmp_path)
    with pytest.raises(MarrqError, match="is of a run with another scheme: remove it"):
        checkpoint(tmp_path, "W4A8", scheme=3)
    with pytest.raises(MarrqError, match=r"another model, name tiny and not large: remove it"):
        checkpoint(tmp_path, "W4A8", model={"name": "large"})


def test_a_run_without_a_finished_block_leaves_nothing(tmp_path: Path):
    checkpoint(tmp_path / "work", "W4A8")
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_before_its_first_block_was_written_is_in_nobody_s_way(
    tmp_path: Path,
):
    (tmp_path / "settings.json").write_text("{")
    checkpoint(tmp_path, "W4A8", scheme=3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_checkpoint_is_refused(text: str, tmp_path: Path):
    leave_first_block(tmp_path)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(MarrqError, match="is damaged: remove it to begin again"):
        checkpoint(tmp_path, "W4A8")


def test_a_damaged_block_is_refused_by_name(tmp_path: Path):
    leave_first_block(tmp_path)
    file = tmp_path / "block-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        MarrqError,
        match=r"block-0000\.safetensors' is damaged: remove it to quantize its block again",
    ):
        quantized(vit(), noise(4), "W4A8", "rtn", checkpoint=checkpoint(tmp_path, "W4A8"))


def test_a_block_that_another_run_wrote_meanwhile_is_refused(tmp_path: Path):
    # Two runs of other settings in one folder: both began before either had finished a block.
    ours, theirs = checkpoint(tmp_path, "W4A8"), checkpoint(tmp_path, "W4A8", scheme=3)
    with pytest.raises(Stopped):
        quantized(vit(), noise(4), "W4A8", "rtn", checkpoint=theirs, block_done=stop_after(1))
    with pytest.raises(MarrqError, match="is of another run, which writes to the same place"):
        quantized(vit(), noise(4), "W4A8", "rtn", checkpoint=ours)


def command(tiny: str, images: Path, output: Path, *options: str) -> list[str]:
    return ["quantize", tiny, "--data", str(images), "--samples", "8", "-o", str(output), *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def started(*arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    def lower() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "marrq", *arguments]
    return subprocess.Popen(
        whole,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lower,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.slow
def test_a_killed_command_goes_on_by_resume_to_the_same_bytes(
    tiny: str, image_folder: Path, tmp_path: Path
):
    assert main(command(tiny, image_folder, tmp_path / "whole")) == 0
    output, work = tmp_path / "killed", tmp_path / ".killed.checkpoint"
    process = started(*command(tiny, image_folder, output))
    while not (work / "block-0000.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not output.exists()
    assert main(command(tiny, image_folder, output, "--resume")) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_resume_begins_where_nothing_is_there_and_leaves_alone_what_is_complete(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "artifact"
    assert main(command(tiny, image_folder, output, "--resume")) == 0
    before = contents(output)
    assert main(command(tiny, image_folder, output, "--resume")) == 0
    assert "is complete" in capsys.readouterr().err
    assert contents(output) == before
    assert main(command(tiny, image_folder, output, "--resume", "--method", "rtn")) == 1
    assert "exists: choose another place, or pass --force" in capsys.readouterr().err


def test_resume_of_what_is_complete_leaves_the_unfinished_run_of_another_scheme(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wanted = ["quantize", tiny, "--data", str(image_folder), "--samples", "8", "--method", "rtn"]
    wanted += ["-o", str(tmp_path / "a")]
    assert main(wanted) == 0

    def stop(bar: Bar, done: int, total: int, note: str) -> None:
        if done == 1:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "show", stop)
        with pytest.raises(Stopped):
            main([*wanted, "--scheme", "W2A8", "--force"])
    blocks = sorted((tmp_path / ".a.checkpoint").iterdir())
    assert len(blocks) == 2
    assert main([*wanted, "--resume"]) == 0
    assert "is complete" in capsys.readouterr().err
    assert sorted((tmp_path / ".a.checkpoint").iterdir()) == blocks


def test_an_unfinished_run_is_not_lost_by_beginning_again(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output, work = tmp_path / "artifact", tmp_path / ".artifact.checkpoint"
    stop_command_after_a_block(command(tiny, image_folder, output))
    assert main(command(tiny, image_folder, output)) == 1
    assert (
        f"an unfinished run is in {str(work)!r}: pass --resume to go on with it, or --force to "
        "begin again" in capsys.readouterr().err
    )
    assert main(command(tiny, image_folder, output, "--method", "rtn")) == 1
    errors = capsys.readouterr().err
    assert f"an unfinished run with other options is in {str(work)!r}" in errors
    assert "--resume" not in errors
    assert main(command(tiny, image_folder, output, "--force")) == 0
    assert not work.exists()


def stop_command_after_a_block(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # The first thing that happens after a block is that the progress bar is told.
        patch.setattr(Bar, "show", lambda self, *shown: stop_after(1)(*shown))
        with pytest.raises(Stopped):
            main(arguments)


def test_groups_that_do_not_fit_are_told_with_the_linear_before_the_first_block(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "artifact"
    assert main(command(tiny, image_folder, output, "--scheme", "W4A8-g7")) == 1
    assert (
        "linear blocks.0.attn.qkv has 48 inputs, which groups of 7 do not divide: choose -g6, or "
        "no groups" in " ".join(capsys.readouterr().err.split())
    )
    assert not list(tmp_path.iterdir())
    compare = ["compare", tiny, "--data", str(image_folder), "--samples", "8", "--scheme", "W4A8"]
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "show", lambda self, count, *_: done.append(count))
        options = ["--scheme", "W4A8-g7", "-o", str(tmp_path / "compare.json")]
        assert main([*compare, *options]) == 1
    assert "which groups of 7 do not divide" in " ".join(capsys.readouterr().err.split())
    assert not any(done)


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_with_a_sentence_and_keeps_earlier_blocks(
    tiny: str, image_folder: Path, tmp_path: Path
):
    """A limit on the size of files stands in for the disk: a block's file exceeds it, or tokens
    do."""
    output = tmp_path / "artifact"
    process = started(*command(tiny, image_folder, output), limit=8_000)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "marrq: cannot write checkpoint" in errors
    assert "blocks before it are kept, for --resume" in errors
    assert "Traceback" not in errors
    process = started(
        *command(tiny, image_folder, output, "--resume", "--work-dir", str(tmp_path / "work")),
        limit=8_000,
    )
    _, errors = process.communicate()
    assert process.returncode == 1
    assert f"marrq: cannot keep tokens in {str(tmp_path / 'work')!r}" in errors
    assert not output.exists()


def test_a_folder_that_is_removed_while_running_ends_the_run_with_a_sentence(tmp_path: Path):
    def remove(count: int, total: int, reports: Any) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        tmp_path.rmdir()

    with pytest.raises(MarrqError, match=r"cannot write checkpoint .*: No such file or directory"):
        quantized(
            vit(),
            noise(4),
            "W4A8",
            "rtn",
            checkpoint=checkpoint(tmp_path, "W4A8"),
            block_done=remove,
        )
