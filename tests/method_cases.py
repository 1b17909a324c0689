"""A small linear with its calibration tokens, for the tests of the methods: correlated inputs, what
they have drifted, and the codes that the papers' arithmetic gives (tests/reference.py)."""

from dataclasses import dataclass, replace

import numpy as np
import reference
import torch
from torch import Tensor

from marrq.methods.alpha_spec import AlphaSpec
from marrq.methods.problem import Problem
from marrq.methods.spec import MethodSpec
from marrq.methods.statistics import ResidualStatistics
from marrq.schemes import WeightSpec

OUTPUTS, INPUTS = 6, 24
THREE_BITS = WeightSpec(3)


@dataclass(frozen=True)
class Case:
    """A weight and raw tokens of both halves: x, x_float [tokens, n]; shortfall: e [tokens, m]
    if it is not W dx; importance: [m]."""

    weight: Tensor
    x: Tensor
    x_float: Tensor
    shortfall: Tensor | None = None
    importance: Tensor | None = None

    def statistics(self, tokens: slice) -> ResidualStatistics:
        sums = ResidualStatistics.zeros(INPUTS, self.x.device, self.importance)
        sums.add(
            self.x[tokens],
            (self.x_float - self.x if self.shortfall is None else self.shortfall)[tokens],
        )
        return sums

    def problem(self, spec: MethodSpec, weights: WeightSpec = THREE_BITS) -> Problem:
        half = len(self.x) // 2
        return Problem.of(
            (self.statistics(slice(half)), self.statistics(slice(half, None))), weights, spec
        )

    def moments(self, centre: bool) -> reference.Moments:
        return reference.Moments.of(self.x.numpy(), self.x_float.numpy(), centre)

    def wanted_moment(self, centre: bool) -> np.ndarray:
        """G = Σ e xᵀ."""
        shortfall = (
            (self.x_float - self.x) @ self.weight.T if self.shortfall is None else self.shortfall
        )
        x = self.x
        if centre:
            shortfall, x = shortfall - shortfall.mean(0), x - x.mean(0)
        return (shortfall.T @ x).numpy()

    def error(self, quantized: Tensor, bias: Tensor | float = 0.0) -> float:
        """J from the tokens themselves."""
        wanted = (
            self.x_float @ self.weight.T
            if self.shortfall is None
            else self.x @ self.weight.T + self.shortfall
        )
        square = (self.x @ quantized.T + bias - wanted).square()
        return float((square * (1 if self.importance is None else self.importance)).sum())


def make_case(seed: int, tokens: int = 200, drift: float = 0.3) -> Case:
    """Correlated inputs with means that are not 0, and a drift that is correlated with them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = normal(tokens, INPUTS) @ normal(INPUTS, INPUTS) + 3 * normal(INPUTS)
    dx = drift * (
        x @ normal(INPUTS, INPUTS) / INPUTS**0.5 + normal(tokens, INPUTS) + 2 * normal(INPUTS)
    )
    return Case(normal(OUTPUTS, INPUTS), x, x + dx)


def stream_case(seed: int) -> Case:
    """The same with a shortfall e of its own, and outputs that differ in importance."""
    case, generator = make_case(seed), torch.Generator().manual_seed(seed + 100)
    mix = torch.randn(INPUTS, OUTPUTS, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(case.x), OUTPUTS, dtype=torch.float64, generator=generator)
    return replace(
        case,
        shortfall=0.3 * case.x @ mix + noise + 1,
        importance=torch.linspace(0.1, 2, OUTPUTS, dtype=torch.float64),
    )


def case_for(name: str, seed: int) -> Case:
    """Only the methods that aim at the stream are given a shortfall."""
    return stream_case(seed) if name.endswith("stream") else make_case(seed)


def constant(name: str, alpha: float, **changes: object) -> MethodSpec:
    return MethodSpec(name, alpha=AlphaSpec("global", alpha), **changes)


def expected_codes(
    case: Case, spec: MethodSpec, alpha: float, kind: WeightSpec = THREE_BITS
) -> np.ndarray:
    """The codes of a method with a given α, by the reference."""
    moments, weight = case.moments(spec.correct_bias), case.weight.numpy()
    family = spec.name.removeprefix("marr-")
    alphas = {"gptaq": (alpha, 0.0), "rescomp": (alpha, alpha)}.get(family, (0.0, 0.0))
    if family in ("exact", "stream"):
        weight = reference.target(
            weight, case.wanted_moment(spec.correct_bias), moments, alpha, spec.target_damping
        )
    laid = (weight, kind.num_bits, kind.group_size, kind.grid)
    grid, order = reference.weight_grid(*laid), moments.order(spec.act_order)
    if family == "rtn":
        return grid.codes(weight)
    if spec.clip == "outputs":
        clipped = [reference.weight_grid(*laid, (1 - 0.06 * i,)) for i in range(12)]
        grid = reference.swept_grid(weight, [*clipped, grid], moments, order, spec.damping)
    return reference.sweep(weight, grid, moments, order, alphas, spec.damping)
