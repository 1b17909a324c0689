"""Several processes and threads find what one finds, to the last bit, and fail together."""

import hashlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchrun_results
from tiny_models import vit

from marrq.distributed import ROW_TILE, Processes, one_thread
from marrq.errors import MarrqError
from marrq.methods.exact_sums import Units
from marrq.methods.statistics import ResidualStatistics
from marrq.models.load import weights_sha256
from marrq.pipeline.block_inputs import cut, share_of

FOLDER = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}


def torchrun(count: int, *command: str) -> subprocess.CompletedProcess[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, check=False, env=environment()
    )


COLLECTIVES = """
import torch
from marrq.distributed import process_group

with process_group(torch.device("cpu")) as processes:
    rank = processes.rank
    gathered = processes.all_gather(torch.full((1 + rank, 2), rank))
    assert gathered.tolist() == [[0, 0], [1, 1], [1, 1]]
    total = torch.tensor(10.0 + rank)
    processes.all_reduce(total)
    assert total == 21
    assert processes.broadcast(torch.arange(2 + rank)).tolist() == [0, 1]
    assert processes.broadcast_object({"rank": rank}) == {"rank": 0}
    assert (processes.all_agree(True), processes.all_agree(rank == 0)) == (True, False)
    rows = processes.rows(70)
    part = torch.arange(70.0)[rows]
    assert processes.gather_rows(part, 70).tolist() == list(range(70))
    assert processes.sum_rows(part, 70) == 69 * 35
"""


def test_two_processes_gather_add_and_agree(tmp_path: Path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    done = torchrun(2, str(tmp_path / "collectives.py"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("images", [2, 5, 64, 256, 1000, 3720])
@pytest.mark.parametrize("most", [1, 4, 16])
def test_the_batches_that_stand_for_all_are_evenly_spaced_over_both_halves(images: int, most: int):
    batches = cut(images, 16)
    chosen = [batch.index for batch in batches if batch.is_among(most)]
    # At most so many, and more than half of them if there are enough.
    assert min(most, len(batches)) / 2 < len(chosen) <= most or len(chosen) == len(batches)
    assert chosen[0] == 0
    assert len({after - before for before, after in pairwise(chosen)}) <= 1
    assert all(batch.count == len(batches) for batch in batches)
    if most > 1:
        assert {batch.half for batch in batches if batch.is_among(most)} == {0, 1}


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    with one_thread():
        return torchrun_results.results()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_find_the_codes_that_one_finds_to_the_last_bit(count: int, alone: dict[str, str]):
    done = torchrun(count, str(FOLDER / "torchrun_results.py"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == alone


@pytest.mark.slow
def test_two_threads_find_what_one_finds_to_the_last_bit(alone: dict[str, str]):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torchrun_results.results() == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("of_outputs", [False, True])
@pytest.mark.parametrize("size", [1e-10, 1.0, 1e12])
def test_sums_do_not_depend_on_the_order_of_batches_or_on_who_adds_them(
    size: float, of_outputs: bool
):
    generator = torch.Generator().manual_seed(0)
    batches = [
        size * torch.randn(9, 6, generator=generator) * torch.logspace(-4, 1, 6) for _ in range(20)
    ]
    drifts = [
        0.1 * size * torch.randn(9, 4 if of_outputs else 6, generator=generator) for _ in range(20)
    ]
    units = Units.of(batches[0], drifts[0], 180)
    importance = torch.rand(4) if of_outputs else None

    def sums(order: list[int]) -> ResidualStatistics:
        total = ResidualStatistics.zeros(6, torch.device("cpu"), importance, units)
        for index in order:
            total.add(batches[index], drifts[index])
        return total

    def told(total: ResidualStatistics) -> list[torch.Tensor]:
        return [
            total.hessian,
            total.input_sum,
            total.drift.moment,
            total.drift.power,
            total.drift.sum,
        ]

    expected = told(sums(list(range(20))))
    shuffled = torch.randperm(20, generator=generator).tolist()
    apart = sums(shuffled[:3]) + (sums(shuffled[3:11]) + sums(shuffled[11:]))
    for one, other in zip(expected, told(apart), strict=True):
        assert torch.equal(one, other)
    x = torch.cat(batches).double()
    exact = x.T @ x
    scale = exact.diagonal().sqrt()
    assert ((expected[0] - exact).abs() <= 1e-6 * scale * scale[:, None]).all()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_row_and_every_batch_belongs_to_one_process(size: int):
    teams = [Processes(rank, size) for rank in range(size)]
    for count in (ROW_TILE * size, 1000, 1024):
        rows = [range(count)[processes.rows(count)] for processes in teams]
        assert [row for part in rows for row in part] == list(range(count))
        assert all(part.start % ROW_TILE == 0 and len(part) >= ROW_TILE for part in rows)
    batches = cut(101, 4)
    assert [batch for processes in teams for batch in share_of(batches, processes)] == batches
    assert [range(101)[batch.rows] for batch in batches][-1][-1] == 100


def test_rows_that_are_too_few_to_share_out_are_swept_by_all():
    assert {
        Processes(rank, 4).rows(4 * ROW_TILE - 1) == slice(0, 4 * ROW_TILE - 1) for rank in range(4)
    } == {True}


def test_more_processes_than_batches_are_refused():
    with pytest.raises(MarrqError, match="3 processes for 2 batches of calibration images"):
        share_of(cut(8, 4), Processes(0, 3))


@pytest.mark.slow
def test_a_corrupt_image_ends_all_processes_with_its_name(
    tiny: str, image_folder: Path, tmp_path: Path
):
    root = tmp_path / "images"
    for file in sorted(image_folder.glob("train/*/*.png")):
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / file.parent.name / file.name).write_bytes(file.read_bytes())
    broken = root / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    options = ["--data", str(root), "--samples", "24", "-o", str(tmp_path / "artifact")]
    done = torchrun(2, "-m", "marrq", "quantize", tiny, *options)
    assert done.returncode != 0
    assert f"marrq: cannot read image {str(broken)!r}" in done.stderr
    assert (
        "Traceback (most recent call last):\n  File"
        not in done.stderr.split("marrq: cannot read image")[0]
    )
    assert not (tmp_path / "artifact").exists()


@pytest.mark.slow
def test_evaluation_by_two_processes_gives_what_one_gives(
    tiny: str, image_folder: Path, tmp_path: Path
):
    reports = []
    for count in (1, 2):
        file = tmp_path / f"{count}.json"
        done = torchrun(
            count, "-m", "marrq", "evaluate", tiny, "--data", str(image_folder), "--json", str(file)
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 1
        reports.append(json.loads(file.read_text()))
    assert reports[0] == reports[1]


def test_processes_that_disagree_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Processes, "broadcast_object", lambda self, value: "another")
    with pytest.raises(
        MarrqError,
        match=r"different results in block 'blocks\.0': run them on machines of one kind",
    ):
        Processes().check_agreement(weights_sha256(vit()), "block 'blocks.0'")


@pytest.mark.slow
def test_the_commands_of_the_pipelines_readme_run_on_the_demo(tmp_path: Path):
    """The block under "Commands"; each quantizes anew, so each has a folder of its own, but for
    the evaluation of what is there."""
    readme = (FOLDER.parent / "marrq" / "pipeline" / "README.md").read_text()
    block = re.search(r"## Commands\n.*?```sh\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    lines = [line.split("#")[0].split() for line in block.group(1).splitlines()]
    assert [words[0] for words in lines] == ["torchrun", "torchrun", "marrq", "marrq", "marrq"]
    place = tmp_path
    for number, words in enumerate(lines):
        words = ["demo" if word in ("MODEL", "IMAGES") else word for word in words]
        words += {
            "quantize": ["--samples", "32"],
            "compare": ["--samples", "32", "--seeds", "1", "--method", "rtn"],
        }.get(next(word for word in words if word in ("quantize", "evaluate", "compare")), [])
        if "evaluate" not in words:
            place = tmp_path / str(number)
            place.mkdir()
        launcher = [
            sys.executable,
            "-m",
            *(
                {"torchrun": ["torch.distributed.run", "--standalone"], "marrq": ["marrq"]}[
                    words[0]
                ]
            ),
        ]
        done = subprocess.run(
            [*launcher, *words[1:]],
            capture_output=True,
            text=True,
            check=False,
            cwd=place,
            env=environment(),
        )
        assert done.returncode == 0, done.stderr
    hashes = [
        hashlib.sha256(
            (tmp_path / str(number) / "artifact" / "model.safetensors").read_bytes()
        ).hexdigest()
        for number in (0, 2, 3)
    ]
    assert len(set(hashes)) == 1
    assert len(json.loads((tmp_path / "4" / "compare.json").read_text())["runs"]) == 1
