"""`marrq compare --ray`: the same runs, by several workers."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from marrq.cli import main

pytest.importorskip("ray")
pytestmark = [  # Ray leaves sockets and files to the end of the process, and announces its own changes
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def command(tiny: str, images: Path, file: Path, *options: str) -> list[str]:
    few = ["--samples", "8", "--seeds", "2", "--scheme", "W4A8", "--scheme", "W4A4", "--method", "gptq", "--method", "marr"]
    return ["compare", tiny, "--data", str(images), "-o", str(file), *few, *options]


def runs(file: Path) -> list[dict[str, Any]]:
    report = json.loads(file.read_text())
    return [{name: value for name, value in run.items() if name not in ("seconds", "peak_memory_mb")} for run in report["runs"]]


def test_two_workers_give_what_one_process_gives_and_do_only_what_is_missing(tiny: str, image_folder: Path, tmp_path: Path):
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    assert main(command(tiny, image_folder, alone)) == 0
    assert main(command(tiny, image_folder, together, "--ray", "local")) == 0
    assert runs(together) == runs(alone)
    reports = [json.loads(file.read_text()) for file in (alone, together)]
    assert reports[0]["float"] == reports[1]["float"]
    kept = reports[1] | {"runs": reports[1]["runs"][::2]}
    together.write_text(json.dumps(kept))
    assert main(command(tiny, image_folder, together, "--ray", "local")) == 0
    assert json.loads(together.read_text())["runs"][:4] == kept["runs"], "what was there is not done again"
    assert runs(together) == runs(alone)[::2] + runs(alone)[1::2]


def test_an_error_of_a_worker_is_its_sentence_and_what_was_done_is_kept(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "c.json"
    assert main(command(tiny, image_folder, file, "--method", "gptq,lowrank=srr:4000", "--seeds", "1", "--ray", "local")) == 1
    assert "the rank of srr:4000 is larger than a weight" in capsys.readouterr().err
    done = len(runs(file)) if file.exists() else 0
    assert main(command(tiny, image_folder, file, "--seeds", "1", "--ray", "local")) == 0
    assert len(runs(file)) == 4 >= done


def kill_a_worker() -> None:
    """The first process of Ray's that shows itself as a worker of ours."""
    for _ in range(6000):
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if file.read_bytes().startswith(b"ray::Worker"):
                    os.kill(int(file.parent.name), signal.SIGKILL)
                    return
        time.sleep(0.01)


def test_a_worker_that_is_killed_ends_the_command_with_a_sentence(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    assert main(command(tiny, image_folder, tmp_path / "c.json", "--ray", "local")) == 1
    killer.join()
    assert "a run on Ray failed" in capsys.readouterr().err


def test_an_address_without_ray_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def refuses(**options: object) -> None:
        raise ConnectionError("nothing there")

    monkeypatch.setattr("ray.init", refuses)
    assert main(command(tiny, image_folder, tmp_path / "c.json", "--ray", "nowhere:1")) == 1
    assert "no Ray at 'nowhere:1': start a cluster there, or pass --ray local" in capsys.readouterr().err
