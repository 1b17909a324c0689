"""The sweep's kernel, without a GPU: run by Triton's interpreter, and compiled for GPUs that are
not here.

It is held against the loop in torch and against a slow float64 NumPy reference that shares no code
with either."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from marrq.methods.column_block import ColumnBlock
from marrq.methods.gptq import round_columns, sweep
from marrq.methods.problem import SweepFactors
from marrq.methods.spec import MethodSpec
from marrq.methods.statistics import ResidualStatistics
from marrq.quantizers.affine import Grid, search_weight_grid
from marrq.schemes import WeightSpec

pytest.importorskip("triton", reason="the package triton is for Linux")

HERE = Path(__file__).parent
BLOCKS = [
    (rows, width, terms, groups)
    for rows, width in ((5, 7), (32, 16), (70, 33))
    for terms in (1, 2, 3)
    for groups in (1, 4)
]
SWEEPS = [(residuals, group) for residuals in (0, 1, 2) for group in (None, 8)]
QUICK = [(5, 7, 1, 4), (32, 16, 2, 1), (70, 33, 3, 4), (0, None), (2, 8)]
OUTPUTS, INPUTS, BLOCK = 37, 40, 16
"""Of a whole sweep: no multiple of the tile's rows, and none of the block's columns."""
Case = tuple[Any, ...]
Rounding = Callable[[ColumnBlock], None]
ROWS_THAT_MAY_DIFFER = 0.03
"""If float32 rounds, two orders of a sum may fall on two sides of a half: a step differs, and with
it the rest of the row."""


@dataclass
class Drawn:
    """Random columns, and what their rounding takes."""

    w: Tensor
    kernels: Tensor
    grid: Grid
    original: Tensor
    alpha: Tensor

    @classmethod
    def of(cls, rows: int, width: int, terms: int, groups: int, exact: bool) -> "Drawn":
        """exact: of small dyadic numbers, with which no float32 operation rounds."""
        generator = torch.Generator().manual_seed(rows + width + terms + groups)

        def numbers(*shape: int) -> Tensor:
            if exact:
                return torch.randint(-64, 65, shape, generator=generator) / 64
            return torch.randn(shape, generator=generator)

        w, original = numbers(width, rows), numbers(width, rows)
        kernels = torch.stack(
            [torch.triu(numbers(width, width) / width**0.5, 1) for _ in range(terms)], 2
        )
        if exact:  # every second column reaches the next, so that sums stay short
            kernels = kernels.sign() * torch.diag(torch.arange(width - 1) % 2 == 0, 1)[..., None]
        scale = 2.0 ** torch.randint(-4, -1, (rows, groups), generator=generator)
        grid = Grid(scale, torch.randint(-3, 4, scale.shape, generator=generator).float(), -8, 7)
        return cls(
            w, kernels, grid, original, torch.randint(0, 3, (rows,), generator=generator) / 2
        )

    def rounded(self, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Steps and terms."""
        width, rows = self.w.shape
        whole = (
            -(-width // self.grid.scale.shape[1]) * self.grid.scale.shape[1]
        )  # columns that the groups have in equal parts
        columns = self.grid.columns(torch.arange(whole))[:width]
        steps, terms = torch.empty_like(self.w), torch.empty(width, self.kernels.shape[2], rows)
        rounding(
            ColumnBlock(
                self.w.clone(), self.original, self.kernels, columns, self.alpha, steps, terms
            )
        )
        return steps, terms

    def by_the_formulas(self) -> Tensor:
        """The steps in float64, column by column."""
        w, kernels, original, alpha = (
            part.double().numpy().copy()
            for part in (self.w, self.kernels, self.original, self.alpha)
        )
        columns = -(-len(w) // self.grid.scale.shape[1])  # of a group
        scale, zero = (
            part.double().numpy().repeat(columns, 1).T
            for part in (self.grid.scale, self.grid.zero_point)
        )
        steps = np.empty_like(w)
        for j, column in enumerate(w):
            steps[j] = (
                np.clip(np.rint(column / scale[j]) + zero[j], self.grid.low, self.grid.high)
                - zero[j]
            )
            terms = (column - steps[j] * scale[j], alpha * column, alpha * (original[j] - column))
            for i in range(kernels.shape[2]):
                w[j + 1 :] += np.outer(kernels[j, j + 1 :, i], terms[i])
        return torch.from_numpy(steps)


def rows_apart(left: Tensor, right: Tensor) -> float:
    """The share of rows, which are the last dimension, that are not the same."""
    return float((left != right).any(0).float().mean())


def compared(block: Drawn, rounding: Rounding) -> list[float]:
    """How far it is from the loop and from the formulas, in rows; and its terms from the loop's
    where the steps are the same."""
    (steps, terms), (expected, wanted) = block.rounded(rounding), block.rounded(round_columns)
    apart = torch.where((steps == expected).all(0), (terms - wanted).abs(), 0)
    return [
        rows_apart(steps, expected),
        rows_apart(steps, block.by_the_formulas()),
        float(apart.max()),
    ]


def beside_a_broken_row(rounding: Rounding, value: float) -> list[bool]:
    """Whether a row that holds NaN or infinity comes out as the loop has it, and the others as if
    they were alone."""
    block = Drawn.of(40, 8, 3, 1, exact=True)
    alone, _ = block.rounded(rounding)
    block.w[2, 3] = value
    (steps, _), (expected, _) = block.rounded(rounding), block.rounded(round_columns)
    others = torch.arange(40) != 3
    return [
        torch.allclose(steps, expected, rtol=0, atol=0, equal_nan=True),
        torch.equal(steps[:, others], alone[:, others]),
    ]


def swept(residuals: int, group: int | None, device: str = "cpu") -> float:
    """A whole sweep in float32, several blocks, each row with its own α: the share of rows apart
    from the papers' arithmetic."""
    random = np.random.default_rng(residuals)
    x = random.normal(size=(200, INPUTS)) @ random.normal(size=(INPUTS, INPUTS))
    x_float = x + 0.3 * random.normal(size=x.shape)
    sums = ResidualStatistics.zeros(INPUTS, torch.device(device))
    sums.add(torch.from_numpy(x).to(device), torch.from_numpy(x_float - x).to(device))
    factors = SweepFactors(sums, MethodSpec("rescomp"))
    kernels = (factors.drift_residual, factors.error_residual)[:residuals]
    weight = torch.from_numpy(random.normal(size=(OUTPUTS, INPUTS))).float().to(device)
    alpha = torch.linspace(0, 1, OUTPUTS, device=device)
    grid = search_weight_grid(weight, WeightSpec(3, group))
    codes = sweep(weight, grid, factors.factor, kernels, alpha, BLOCK)

    scale, zero = (
        part.double().cpu().numpy()
        for part in (grid.spread(INPUTS).scale, grid.spread(INPUTS).zero_point)
    )
    moments, laid = (
        reference.Moments.of(x, x_float, centre=False),
        reference.Affine(scale, zero, grid.low, grid.high),
    )
    first, second = (alpha.double().cpu().numpy() if term < residuals else 0.0 for term in range(2))
    expected = reference.sweep(
        weight.double().cpu().numpy(), laid, moments, moments.order(True), (first, second)
    )
    return rows_apart(codes.cpu().T, torch.from_numpy(expected).T)


def interpreted(blocks: list[Case], sweeps: list[Case]) -> dict[str, list[float]]:
    """What the kernel gives in a process with Triton's interpreter."""
    from marrq.methods.sweep_kernel import sweep_columns

    found = {
        f"{exact} {case}": compared(Drawn.of(*case, exact), sweep_columns)
        for exact in (True, False)
        for case in blocks
    }
    found |= {str(value): beside_a_broken_row(sweep_columns, value) for value in (np.nan, np.inf)}
    with patch("marrq.methods.gptq.block_rounding", lambda w: sweep_columns):
        return found | {f"sweep {case}": [swept(*case)] for case in sweeps}


@functools.cache
def found(quick: bool) -> dict[str, list[float]]:
    """What `interpreted` gives for the quick cases, or for the others. The interpreter has to be
    chosen before Triton is imported, so that it needs a process."""
    blocks, sweeps = (
        [case for case in cases if (case in QUICK) == quick] for cases in (BLOCKS, SWEEPS)
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    code = (
        "import json, test_sweep_kernel as t; "
        f"print(json.dumps(t.interpreted({blocks!r}, {sweeps!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, list[float]] = json.loads(done.stdout)
    return result


def marked(cases: list[Case]) -> list[Any]:
    """The cases, all but the quick ones marked slow: the interpreter takes its time."""
    return [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", marked(BLOCKS), ids=str)
def test_where_no_operation_rounds_the_kernel_gives_what_the_loop_and_the_formulas_give(case: Case):
    assert found(case in QUICK)[f"True {case}"] == [0, 0, 0]


@pytest.mark.parametrize("case", marked(BLOCKS), ids=str)
def test_elsewhere_hardly_a_row_differs(case: Case):
    from_the_loop, from_the_formulas, distance = found(case in QUICK)[f"False {case}"]
    assert max(from_the_loop, from_the_formulas) <= ROWS_THAT_MAY_DIFFER
    assert distance < 1e-4


@pytest.mark.parametrize("case", marked(SWEEPS), ids=str)
def test_a_sweep_with_the_kernel_gives_the_codes_of_the_papers_arithmetic(case: Case):
    assert found(case in QUICK)[f"sweep {case}"][0] <= ROWS_THAT_MAY_DIFFER


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_row_that_is_not_finite_comes_out_as_from_the_loop_and_disturbs_no_other(value: str):
    assert found(True)[value] == [True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", SWEEPS, ids=str)
def test_a_sweep_on_a_gpu_gives_the_codes_of_the_papers_arithmetic(case: tuple[int, int | None]):
    assert swept(*case, device="cuda") <= ROWS_THAT_MAY_DIFFER


@pytest.mark.parametrize(
    ("terms", "per_column", "capability"),
    [
        (3, True, 90),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product([1, 2, 3], [False, True], [80, 90])
            if case != (3, True, 90)
        ),
    ],
)
def test_the_kernel_compiles_for_gpus_that_are_not_here_and_fits_their_registers(
    terms: int, per_column: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from marrq.methods.sweep_kernel import HALFWAY, KERNEL_OPTIONS, ROWS, _columns

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    names = (
        "w",
        "influences",
        "scales",
        "lowest",
        "highest",
        "originals",
        "alphas",
        "steps",
        "terms",
    )
    sizes = {
        "TERMS": terms,
        "PER_COLUMN": per_column,
        "WIDTH": 128,
        "ROWS": ROWS,
        "HALFWAY": HALFWAY,
    }
    signature = {
        **dict.fromkeys(names, "*fp32"),
        "rows": "i32",
        "width": "i32",
        **dict.fromkeys(sizes, "constexpr"),
    }
    source = ASTSource(_columns, signature, constexprs=sizes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=KERNEL_OPTIONS
    )
    assert "div.rn.f32" in compiled.asm["ptx"]
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    used = subprocess.check_output(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "cubin"], text=True
    )
    registers, stack, shared = (
        int(number) for number in re.findall(r"(?:REG|STACK|SHARED):(\d+)", used)
    )
    assert registers <= 128
    assert stack == 0  # nothing is spilled
    assert shared <= 4096
