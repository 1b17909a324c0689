"""The papers' arithmetic, slow and direct, in float64 NumPy. Shares no code with marrq; tests hold
marrq against it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """A grid; scale and zero: a number for each weight."""

    scale: Array
    zero: Array
    low: int
    high: int

    def codes(self, weight: Array) -> Array:
        return np.clip(np.rint(weight / self.scale) + self.zero, self.low, self.high)

    def value(self, codes: Array) -> Array:
        return (codes - self.zero) * self.scale

    def column(self, j: int) -> "Affine":
        return Affine(self.scale[:, j], self.zero[:, j], self.low, self.high)


SHRINKING = tuple(1 - i / 100 for i in range(80))


def weight_grid(
    weight: Array,
    num_bits: int,
    group_size: int | None = None,
    kind: str = "asymmetric",
    factors: tuple[float, ...] = SHRINKING,
) -> Affine:
    """The grid of each row, or of each group of inputs in it, one after the other."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    one_grid = {"asymmetric": asymmetric, "symmetric": symmetric, "mxint": mxint}[kind]
    size = group_size or weight.shape[1]
    scale, zero = np.empty_like(weight), np.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], size):
            part = slice(start, start + size)
            scale[row, part], zero[row, part] = one_grid(weight[row, part], low, high, factors)
    return Affine(scale, zero, -high if kind == "mxint" else low, high)


def asymmetric(
    values: Array, low: int, high: int, factors: tuple[float, ...]
) -> tuple[float, float]:
    """GPTQ's: the best of some shrunk min/max ranges that include 0, by Σ |q - w|^2.4."""

    def at(factor: float) -> tuple[float, float]:
        minimum, maximum = min(values.min() * factor, 0), max(values.max() * factor, 0)
        scale = (maximum - minimum) / (high - low)
        return scale, np.clip(np.rint(low - minimum / scale), low, high)

    return _least_error(values, low, high, [at(factor) for factor in factors])


def symmetric(
    values: Array, low: int, high: int, factors: tuple[float, ...]
) -> tuple[float, float]:
    """The same with the zero point 0: the largest magnitude, shrunk, is the largest code."""
    return _least_error(
        values, low, high, [(np.abs(values).max() / high * factor, 0.0) for factor in factors]
    )


def _least_error(
    values: Array, low: int, high: int, grids: list[tuple[float, float]]
) -> tuple[float, float]:
    def error(grid: tuple[float, float]) -> float:
        quantized = (np.clip(np.rint(values / grid[0]) + grid[1], low, high) - grid[1]) * grid[0]
        return float((np.abs(quantized - values) ** 2.4).sum())

    return min(grids, key=error)


def mxint(block: Array, low: int, high: int, factors: tuple[float, ...]) -> tuple[float, float]:
    """2^(e - b + 2) with e the exponent of the largest magnitude: one bit before the binary point,
    b - 2 behind it."""
    num_bits = int(high).bit_length() + 1
    return 2.0 ** (np.floor(np.log2(np.abs(block).max())) - num_bits + 2), 0.0


@dataclass(frozen=True)
class Moments:
    """H and D of tokens on both paths, [tokens, n], their means taken out if a bias takes up the
    mean error."""

    hessian: Array
    drift: Array

    @classmethod
    def of(cls, x: Array, x_float: Array, centre: bool) -> "Moments":
        dx = x_float - x
        if centre:
            x, dx = x - x.mean(0), dx - dx.mean(0)
        return cls(x.T @ x, dx.T @ x)

    def damped(self, damping: float) -> Array:
        return self.hessian + damping * np.mean(np.diag(self.hessian)) * np.eye(len(self.hessian))

    def order(self, act_order: bool) -> NDArray[np.int64]:
        return (
            np.argsort(-np.diag(self.hessian), kind="stable")
            if act_order
            else np.arange(len(self.hessian))
        )


def sweep(
    weight: Array,
    grid: Affine | None,
    moments: Moments,
    order: NDArray[np.int64],
    alphas: tuple[float, float],
    damping: float = 0.01,
) -> Array:
    """Codes, or the compensated weights if no grid rounds them, column by column by the formulas.

    alphas: of GPTAQ's and of ResComp's residual term.
    """
    n = len(order)
    damped, drift = (
        moments.damped(damping)[np.ix_(order, order)],
        moments.drift[np.ix_(order, order)],
    )
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    cross = moments.hessian[np.ix_(order, order)] + drift
    p1, p2 = (np.triu(np.triu(moment @ upper.T, 1) @ upper, 1) for moment in (drift, cross))
    original = weight[:, order]
    w, result = original.copy(), np.empty_like(weight)
    for j in range(n):
        rounded = w[:, j].copy()
        result[:, order[j]] = rounded
        if grid is not None:
            column = grid.column(order[j])
            result[:, order[j]] = column.codes(w[:, j])
            rounded = column.value(result[:, order[j]])
        after = slice(j + 1, None)
        w[:, after] -= np.outer((w[:, j] - rounded) / upper[j, j], upper[j, after])
        w[:, after] += np.outer(alphas[0] * w[:, j], p1[j, after])
        w[:, after] += np.outer(alphas[1] * (original[:, j] - w[:, j]), p2[j, after])
    return result


def swept_grid(
    weight: Array,
    grids: list[Affine],
    moments: Moments,
    order: NDArray[np.int64],
    damping: float = 0.01,
) -> Affine:
    """For each row the grid with which GPTQ's sweep leaves the least error of the output."""
    scale, zero, least = grids[0].scale.copy(), grids[0].zero.copy(), np.full(len(weight), np.inf)
    for grid in grids:
        error = grid.value(sweep(weight, grid, moments, order, (0.0, 0.0), damping)) - weight
        for row in range(len(weight)):
            power = error[row] @ moments.hessian @ error[row]
            if power < least[row]:
                least[row], scale[row], zero[row] = power, grid.scale[row], grid.zero[row]
    return Affine(scale, zero, grids[0].low, grids[0].high)


def target(
    weight: Array, moment: Array, moments: Moments, alpha: float, damping: float = 0.1
) -> Array:
    """W + α G (H + λI)⁻¹."""
    return weight + alpha * moment @ np.linalg.inv(moments.damped(damping))
