"""The sums over calibration tokens from which every method works.

For one linear with input x on the quantized path (the linears before it are quantized) and input x̃
on the full-precision path, dx = x̃ - x:

    H = Σ x xᵀ     D = Σ dx xᵀ (not symmetric)     S = Σ dx dxᵀ     Σ x     Σ dx

No activation is stored. The sums give the reconstruction error exactly (our derivation;
MARR, arXiv 2605.17997, uses J as its feedback):

    J(Q) = ‖Q X - W X̃‖² = ⟨E, E H⟩ - 2 ⟨E, G⟩ + c,     E = Q - W,   G = W D,   c = ⟨W S, W⟩

G and c are all that J knows of the wanted output. In general the shortfall e is the wanted output
minus the output of the original weight on x, and G = Σ e xᵀ, c = Σ ‖e‖². If the linear is to repeat
its full-precision output, e = W dx (`InputDrift`). If the linear writes to the residual stream and
the method aims at that stream, e is another vector (`OutputDrift`, methods/exact.py).

Sums add exactly over batches, halves and processes (methods/exact_sums.py).

**Weighted sums.** Tokens may have weights w (marrq/pipeline/token_weights.py). Then every sum above
is Σ w …, the number of tokens k is Σ w, and J is the weighted square error: all that follows from
the sums, the means, the bias and the α that J judges, is weighted too.

**Centred sums.** If the bias takes up the mean error of the outputs (`output_shift`), the error of
centred tokens is left: the same sums without the means, H - k x̄ x̄ᵀ and so on (`centre_`). Then a
method spends no codes on an error that the bias corrects for nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from marrq.distributed import Processes
from marrq.errors import MarrqError
from marrq.methods.exact_sums import BatchTokens, TokenWeights, Units, add_products_

VARIATION = 1e-12
"""An input is a constant if its variance is below this share of its mean square: float32 tokens
resolve no less."""

AnyDrift = TypeVar("AnyDrift", bound="Drift")


@dataclass
class Drift(ABC):
    """Sums of the drift of the quantized path: dx for InputDrift, e for OutputDrift. All float64.

    moment: Σ dx xᵀ [n, n] or Σ e xᵀ [m, n]; power: Σ dx dxᵀ [n, n] or Σ e² [m]; sum: Σ dx [n] or
    Σ e [m]."""

    moment: Tensor
    power: Tensor
    sum: Tensor

    def __add__(self: AnyDrift, other: AnyDrift) -> AnyDrift:
        return replace(
            self,
            moment=self.moment + other.moment,
            power=self.power + other.power,
            sum=self.sum + other.sum,
        )

    def add(self, x: BatchTokens, drift: BatchTokens, units: Units) -> None:
        """Take in a batch. x: [tokens, n]; drift: dx, [tokens, n], or e, [tokens, m]."""
        # Σ d xᵀ of this batch, rounded before it is added: the addition itself is exact.
        add_products_(self.moment, drift, x, units)
        self._add_power(drift, units)
        self.sum += units.round(drift.sum, units.drift)

    def centre_(self, input_sum: Tensor, tokens: float, varies: Tensor) -> None:
        """Take the means out of `moment` and `power`, in place; see ResidualStatistics.centre_.

        input_sum: Σ x, [n]; varies: [n], 1 for an input that varies, 0 for a constant."""
        # Σ (d - d̄)(x - x̄)ᵀ = Σ d xᵀ - (Σ d)(Σ x)ᵀ / k
        self.moment.addr_(self.sum, input_sum, alpha=-1 / tokens).mul_(varies)
        self._centre_power(tokens)

    @abstractmethod
    def _add_power(self, drift: BatchTokens, units: Units) -> None:
        """Take a batch [tokens, n or m] into `power`."""

    @abstractmethod
    def _centre_power(self, tokens: float) -> None:
        """Take the mean out of `power`, in place."""

    @property
    @abstractmethod
    def input_moment(self) -> Tensor:
        """D = Σ dx xᵀ, [n, n]. Raises MarrqError if these are sums of e."""

    @abstractmethod
    def of_rows(self: AnyDrift, rows: slice) -> AnyDrift:
        """The sums that belong to some rows of the weight; none is copied."""

    @abstractmethod
    def moment_of(self, weight: Tensor) -> Tensor:
        """G = Σ e xᵀ for a weight [m, n]: [m, n]."""

    @abstractmethod
    def sum_of(self, weight: Tensor) -> Tensor:
        """Σ e for a weight [m, n]: [m]."""

    @abstractmethod
    def of_outputs(self, weight: Tensor) -> "OutputDrift":
        """The sums of e for a weight [m, n]."""


@dataclass
class InputDrift(Drift):
    """Sums of dx: D = Σ dx xᵀ and S = Σ dx dxᵀ [n, n], Σ dx [n]. They serve every linear that reads
    this input."""

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> "InputDrift":
        """The empty sums."""
        square = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        return cls(square, square.clone(), square.new_zeros(in_features))

    def _add_power(self, drift: BatchTokens, units: Units) -> None:
        # S = Σ dx dxᵀ: all of it, since J of any weight W asks for W S Wᵀ.
        add_products_(self.power, drift, drift, units)

    def _centre_power(self, tokens: float) -> None:
        # Σ (dx - d̄)(dx - d̄)ᵀ = S - (Σ dx)(Σ dx)ᵀ / k
        self.power.addr_(self.sum, self.sum, alpha=-1 / tokens)

    @property
    def input_moment(self) -> Tensor:
        """D = Σ dx xᵀ, [n, n]."""
        return self.moment

    def of_rows(self, rows: slice) -> "InputDrift":
        """These sums: they belong to the inputs, and so to every row."""
        return self

    def moment_of(self, weight: Tensor) -> Tensor:
        """G = W D."""
        return weight.double() @ self.moment

    def sum_of(self, weight: Tensor) -> Tensor:
        """Σ e = W Σ dx."""
        return weight.double() @ self.sum

    def of_outputs(self, weight: Tensor) -> "OutputDrift":
        """The sums of e = W dx: G = W D, diag(W S Wᵀ) and W Σ dx."""
        # c of each output is the diagonal of W S Wᵀ; all outputs count alike.
        w = weight.double()
        return OutputDrift(
            self.moment_of(w), (w @ self.power).mul_(w).sum(1), self.sum_of(w), w.new_ones(len(w))
        )


@dataclass
class OutputDrift(Drift):
    """Sums of e, the wanted outputs minus the outputs of the original weight on the quantized path:
    G = Σ e xᵀ [m, n], Σ e² [m], Σ e [m]. They belong to one linear.

    importance: [m] float64, by which the square error of each output counts in J."""

    importance: Tensor

    @classmethod
    def zeros(cls, in_features: int, importance: Tensor) -> "OutputDrift":
        """The empty sums for outputs of that importance [m]."""
        importance = importance.double()
        moment = importance.new_zeros(len(importance), in_features)
        return cls(moment, torch.zeros_like(importance), torch.zeros_like(importance), importance)

    def _add_power(self, drift: BatchTokens, units: Units) -> None:
        # e belongs to one linear, so that Σ e² of each output is all that J asks for.
        self.power += units.round(drift.squares, units.drift.square())

    def _centre_power(self, tokens: float) -> None:
        # Σ (e - ē)² = Σ e² - (Σ e)² / k
        self.power.sub_(self.sum.square() / tokens)

    @property
    def input_moment(self) -> Tensor:
        """There is none: the shortfall of the stream does not follow from this linear's input."""
        raise MarrqError(
            "gptaq and rescomp need sums of the drift of the inputs: got sums of the shortfall of "
            "the residual stream; collect the statistics that marrq/methods/registry.py names"
        )

    def of_rows(self, rows: slice) -> "OutputDrift":
        """The sums for some outputs."""
        return OutputDrift(
            self.moment[rows], self.power[rows], self.sum[rows], self.importance[rows]
        )

    def moment_of(self, weight: Tensor) -> Tensor:
        """G: e was formed from the weight when the tokens were summed."""
        return self.moment

    def sum_of(self, weight: Tensor) -> Tensor:
        """Σ e."""
        return self.sum

    def of_outputs(self, weight: Tensor) -> "OutputDrift":
        """These sums."""
        return self


@dataclass
class ResidualStatistics:
    """H [n, n] and Σ x [n] in float64, the number of tokens or Σ w, and the sums of the drift.

    units: the multiples to which sums are rounded; None takes the units of the first batch. Sums
    with the same units add exactly."""

    hessian: Tensor
    input_sum: Tensor
    drift: Drift
    tokens: float = 0
    units: Units | None = None

    @classmethod
    def zeros(
        cls,
        in_features: int,
        device: torch.device,
        importance: Tensor | None = None,
        units: Units | None = None,
    ) -> "ResidualStatistics":
        """The empty sums.

        importance: None if dx is summed; the importance of the outputs, [m], if e is summed."""
        drift = (
            InputDrift.zeros(in_features, device)
            if importance is None
            else OutputDrift.zeros(in_features, importance)
        )
        hessian = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        return cls(hessian, hessian.new_zeros(in_features), drift, units=units)

    def __add__(self, other: "ResidualStatistics") -> "ResidualStatistics":
        return ResidualStatistics(
            self.hessian + other.hessian,
            self.input_sum + other.input_sum,
            self.drift + other.drift,
            self.tokens + other.tokens,
            self.units,
        )

    def add(self, x: Tensor, drift: Tensor, weights: TokenWeights | None = None) -> None:
        """Take in a batch.

        x: [tokens, n]; drift: dx = x̃ - x, [tokens, n], or e, [tokens, m]; weights: of the tokens.
        The caller forms the difference before any product: it is a small difference of large
        numbers."""
        # Processes and halves must round alike: the pipeline hands out the units of one batch.
        if self.units is None:
            self.units = Units.of(x, drift, len(x), weights)
        inputs = BatchTokens(x, self.units.inputs, weights)
        add_products_(self.hessian, inputs, inputs, self.units)
        self.input_sum += self.units.round(inputs.sum, inputs.sizes)
        self.drift.add(inputs, BatchTokens(drift, self.units.drift, weights), self.units)
        self.tokens += inputs.count

    def pooled_(self, processes: Processes) -> "ResidualStatistics":
        """The sums of all processes, in place. Returns itself."""
        # Exact additions: the sums are the same whatever the number of processes.
        # One process has them all, and need not wait for the device.
        if processes.size == 1:
            return self
        drift, tokens = self.drift, torch.tensor(self.tokens, dtype=torch.float64)
        sums = (self.hessian, self.input_sum, drift.moment, drift.power, drift.sum)
        processes.all_reduce(*sums, tokens)
        self.tokens = float(tokens)
        return self

    def of_rows(self, rows: slice) -> "ResidualStatistics":
        """The sums that belong to some rows of the weight; none is copied."""
        return replace(self, drift=self.drift.of_rows(rows))

    def centre_(self) -> "ResidualStatistics":
        """Take the means out: the sums become those of centred tokens. Returns itself.

        Σ x, Σ dx and Σ e stay, for the bias that makes up for the means. An input that does not
        vary is dead afterwards. The sums change in place: for a wide linear a copy would take as
        much memory as the weights of a whole block."""
        power = self.hessian.diagonal().clone()
        # Σ (x - x̄)(x - x̄)ᵀ = Σ x xᵀ - (Σ x)(Σ x)ᵀ / k
        self.hessian.addr_(self.input_sum, self.input_sum, alpha=-1 / self.tokens)
        # For a constant input this difference is noise, by which nothing may be weighed or divided.
        varies = (self.hessian.diagonal() > VARIATION * power).to(power)
        # A constant input becomes dead, its noise 0.
        self.hessian.mul_(varies).mul_(varies[:, None])
        self.drift.centre_(self.input_sum, self.tokens, varies)
        return self

    def output_shift(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """The change of the bias that makes the outputs of Q right in the mean: (Σ e - E Σ x) / k,
        [m]. weight, quantized: W and Q, [m, n]."""
        # The (weighted) mean over tokens of W x + e - Q x.
        error = quantized.double() - weight.double()
        return (self.drift.sum_of(weight) - error @ self.input_sum) / self.tokens
