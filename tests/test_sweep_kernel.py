"""The sweep's kernel, without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marrq.affine import Grid
from marrq.methods.gptq import round_columns

pytest.importorskip("triton")

HERE = Path(__file__).parent
CASES = [(rows, width, terms, groups) for rows, width in ((5, 7), (32, 16), (70, 33)) for terms in (1, 2, 3) for groups in (1, 4)]


def problem(rows: int, width: int, terms: int, groups: int, exact: bool) -> tuple[list[Tensor], list[Grid], Tensor]:
    """w, kernels and originals; grid; alpha. exact: of small dyadic numbers, with which no float32 operation rounds."""
    generator = torch.Generator().manual_seed(rows + width + terms + groups)

    def drawn(*shape: int) -> Tensor:
        if exact:
            return torch.randint(-64, 65, shape, generator=generator) / 64
        return torch.randn(shape, generator=generator)

    w, original = drawn(width, rows), drawn(width, rows)
    kernels = torch.stack([torch.triu(drawn(width, width) / (4 if exact else width**0.5), 1).round(decimals=8) for _ in range(terms)], 2)
    if exact:  # every second column reaches the next, so that sums stay short
        kernels = kernels.sign() * torch.diag(torch.arange(width - 1) % 2 == 0, 1)[..., None]
    scale = 2.0 ** torch.randint(-4, -1, (rows, groups), generator=generator)
    grid = Grid(scale, torch.randint(-3, 4, scale.shape, generator=generator).float(), -8, 7)
    alpha = torch.randint(0, 3, (rows,), generator=generator) / 2
    return [w, kernels, original], [grid], alpha


def run(rows: int, width: int, terms: int, groups: int, exact: bool, rounding: object) -> tuple[Tensor, Tensor]:
    (w, kernels, original), [grid], alpha = problem(rows, width, terms, groups, exact)
    width_of_group = -(-width // groups)
    columns = grid.columns(torch.arange(width_of_group * groups))[:width]
    steps, out = torch.empty_like(w), torch.empty(width, terms, rows)
    rounding(w, kernels, columns, original, alpha, steps, out)  # type: ignore[operator]
    return steps, out


def interpreted() -> dict[str, list[float]]:
    """In a process with Triton's interpreter: how far the kernel is from the loop, for each case."""
    from marrq.methods.sweep_kernel import sweep_columns

    found = {}
    for exact in (True, False):
        for case in CASES:
            (steps, terms), (expected, wanted) = (run(*case, exact, rounding) for rounding in (sweep_columns, round_columns))
            differing = float((steps != expected).float().mean())
            same = (steps == expected).all(0)
            found[f"{exact} {case}"] = [differing, float((terms - wanted)[..., same].abs().max())]
    steps, _ = run(40, 8, 1, 1, True, broken(sweep_columns))
    expected, _ = run(40, 8, 1, 1, True, round_columns)
    others = torch.arange(40) != 3
    found["NaN"] = [float(steps[:, 3].isnan().all()), float(torch.equal(steps[:, others], expected[:, others]))]
    return found


def broken(rounding: object) -> object:
    """The same with a row that is not finite."""

    def rounds(w: Tensor, *others: object) -> None:
        w[:, 3] = float("nan")
        rounding(w, *others)  # type: ignore[operator]

    return rounds


@pytest.fixture(scope="module")
def found() -> dict[str, list[float]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    code = "import json, test_sweep_kernel as t; print(json.dumps(t.interpreted()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[float]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_where_no_operation_rounds_the_kernel_gives_what_the_loop_gives_to_the_last_bit(case: object, found: dict[str, list[float]]):
    assert found[f"True {case}"] == [0, 0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_elsewhere_hardly_a_step_differs(case: object, found: dict[str, list[float]]):
    differing, distance = found[f"False {case}"]
    assert differing <= 0.002
    assert distance < 1e-4


def test_a_row_that_is_not_finite_stays_so_and_disturbs_no_other(found: dict[str, list[float]]):
    assert found["NaN"] == [1, 1]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("terms", [1, 3])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability: int, terms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from marrq.methods.sweep_kernel import HALFWAY, ROWS, _columns

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ("w", "kernels", "scales", "lowest", "highest", "originals", "alphas", "steps", "terms")
    sizes = {"TERMS": terms, "PER_COLUMN": False, "WIDTH": 128, "ROWS": ROWS, "HALFWAY": HALFWAY}
    signature = {**dict.fromkeys(names, "*fp32"), "rows": "i32", "width": "i32", **dict.fromkeys(sizes, "constexpr")}
    source = ASTSource(_columns, signature, constexprs=sizes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 0
    assert "div.rn.f32" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 1024
