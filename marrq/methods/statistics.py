"""The sums over calibration tokens that every method works from, and what is computed from them
alone.

For one linear with input x on the quantized path (earlier modules quantized) and x̃ on the
full-precision path, dx = x̃ - x:

    H = Σ x xᵀ        D = Σ dx xᵀ (not symmetric)        S = Σ dx dxᵀ        Σ x        Σ dx

They add over batches, over halves of the calibration set, and over processes, and exactly so: what
a batch adds is rounded to a multiple that leaves all sums to come within the 53 bits of float64
(`Units`), far below what float32 products resolve. So no sum is rounded, and its order and the
number of processes leave no trace [ours, after the pre-rounded sums of Demmel and Nguyen,
10.1109/ARITH.2013.9]. A channel that becomes 16 times as strong, in the mean, as in the first batch
is summed as float64 does; nothing else is lost.

From them comes the module reconstruction error

    J(Q) = ‖Q X - W X̃‖² = ⟨E, E H⟩ - 2 ⟨E, G⟩ + c,        E = Q - W,   G = W D,   c = ⟨W S, W⟩

exactly and without any stored activation (our derivation; MARR, arXiv 2605.17997, uses J as its
feedback), and the upper factor U of the damped inverse, (H + λI)⁻¹ = Uᵀ U (GPTQ, arXiv 2210.17323),
here without ever forming an inverse.

G and c are all that J knows of the wanted output. In general e is what the output of the original
weight on x falls short of it, and G = Σ e xᵀ, c = Σ ‖e‖²: e = W dx where the linear is to repeat
its full-precision output; methods/exact.py has another.

A bias that takes up the mean error of the outputs (`output_shift`) leaves the error of centred
tokens: the same sums with the means taken out, H - k x̄ x̄ᵀ and so on (`centre_`). Then a method
need not spend codes on what a bias does for nothing."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marrq.distributed import Processes, one_thread
from marrq.errors import MarrqError

MAX_DAMPING_STEPS = 12
UNIT_FLOOR = 1 / 128
"""Smallest unit, in shares of the rms over all channels: a channel that is dead in the first batch
may come alive."""
HEADROOM = 2**8
"""By how much sums may exceed what the first batch promises: channels 16 times as strong, both of
them."""
VARIATION = 1e-12
"""Variance, in shares of the mean square, below which an input is a constant: float32 tokens
resolve no less."""


@dataclass(frozen=True)
class Units:
    """What sums are rounded by before they are added: with t the number of tokens rounded up to a
    power of two,

        (c + R) - R,    R = ¾ · HEADROOM · t · uᵢ uⱼ        rounds c in float64 to a multiple of 2⁻⁵³ · HEADROOM · t · uᵢ uⱼ

    inputs, drift: u, the size of the channels of x [n] and of dx or e, as powers of two, in
    float64; tokens: t."""

    inputs: Tensor
    drift: Tensor
    tokens: int

    @classmethod
    def of(cls, x: Tensor, drift: Tensor, tokens: int) -> "Units":
        """The units that a batch gives. x: [batch tokens, n]; drift: [batch tokens, n or m];
        tokens: how many there will be in all."""
        return cls(_sizes(x), _sizes(drift), 1 << (tokens - 1).bit_length())

    @property
    def shift(self) -> float:
        """R / uᵢ uⱼ."""
        return 0.75 * HEADROOM * self.tokens

    def round_outer_(self, sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Sums of products [p, q], in place; left, right: the sizes of their factors."""
        return sums.addr_(left, right, alpha=self.shift).addr_(left, right, alpha=-self.shift)

    def round(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """Sums [p] of tokens, or of their squares."""
        return sums.add(sizes, alpha=self.shift).sub_(sizes, alpha=self.shift)


def _sizes(tokens: Tensor) -> Tensor:
    """The rms of each channel, rounded up to a power of two; 1 where there is none."""
    squares = tokens.double().square().mean(0)
    rms = torch.maximum(squares, UNIT_FLOOR**2 * squares.mean()).sqrt()
    _, exponent = torch.frexp(rms)
    return torch.where((rms > 0) & rms.isfinite(), torch.ldexp(torch.ones_like(rms), exponent), 1)


@dataclass
class InputDrift:
    """dx in sums over tokens: D = Σ dx xᵀ and S = Σ dx dxᵀ [n, n], Σ dx [n]. All float64."""

    moment: Tensor
    power: Tensor
    sum: Tensor

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> "InputDrift":
        """The empty sums."""
        square, vector = (in_features, in_features), (in_features,)
        return cls(
            *(
                torch.zeros(shape, dtype=torch.float64, device=device)
                for shape in (square, square, vector)
            )
        )

    def __add__(self, other: "InputDrift") -> "InputDrift":
        return InputDrift(
            self.moment + other.moment, self.power + other.power, self.sum + other.sum
        )

    def add(self, x: Tensor, drift: Tensor, units: Units) -> None:
        """Take in a batch. x: [tokens, n]; drift: dx, [tokens, n]."""
        self.moment += units.round_outer_(_products(drift, x), units.drift, units.inputs)
        self.power += units.round_outer_(_products(drift, drift), units.drift, units.drift)
        self.sum += units.round(drift.sum(0, dtype=torch.float64), units.drift)

    def centre_(self, input_sum: Tensor, tokens: int, varies: Tensor) -> None:
        """See ResidualStatistics.centre_."""
        self.moment.addr_(self.sum, input_sum, alpha=-1 / tokens).mul_(varies)
        self.power.addr_(self.sum, self.sum, alpha=-1 / tokens)

    def of_rows(self, rows: slice) -> "InputDrift":
        """These sums, whatever the rows."""
        return self

    def of_outputs(self, weight: Tensor) -> "OutputDrift":
        """The sums of e = W dx for a weight [m, n]."""
        w = weight.double()
        return OutputDrift(
            w @ self.moment, ((w @ self.power) * w).sum(1), w @ self.sum, w.new_ones(len(w))
        )


@dataclass
class OutputDrift:
    """What the outputs of the original weight on the quantized path fall short of the wanted ones,
    e, in sums over tokens.

    moment: G = Σ e xᵀ [m, n]; power: Σ e² [m]; sum: Σ e [m]; importance: what the square error of
    an output counts in J, [m]. All float64."""

    moment: Tensor
    power: Tensor
    sum: Tensor
    importance: Tensor

    @classmethod
    def zeros(cls, in_features: int, importance: Tensor) -> "OutputDrift":
        """The empty sums."""
        importance = importance.double()
        moment, vector = (
            importance.new_zeros(len(importance), in_features),
            torch.zeros_like(importance),
        )
        return cls(moment, vector, vector.clone(), importance)

    def __add__(self, other: "OutputDrift") -> "OutputDrift":
        return OutputDrift(
            self.moment + other.moment,
            self.power + other.power,
            self.sum + other.sum,
            self.importance,
        )

    def add(self, x: Tensor, drift: Tensor, units: Units) -> None:
        """Take in a batch. x: [tokens, n]; drift: e, [tokens, m]."""
        self.moment += units.round_outer_(_products(drift, x), units.drift, units.inputs)
        self.power += units.round(drift.double().square().sum(0), units.drift.square())
        self.sum += units.round(drift.sum(0, dtype=torch.float64), units.drift)

    def centre_(self, input_sum: Tensor, tokens: int, varies: Tensor) -> None:
        """See ResidualStatistics.centre_."""
        self.moment.addr_(self.sum, input_sum, alpha=-1 / tokens).mul_(varies)
        self.power.sub_(self.sum.square() / tokens)

    def of_rows(self, rows: slice) -> "OutputDrift":
        """The sums for some outputs."""
        return OutputDrift(
            self.moment[rows], self.power[rows], self.sum[rows], self.importance[rows]
        )

    def of_outputs(self, weight: Tensor) -> "OutputDrift":
        """These sums, whatever the weight."""
        return self


@dataclass
class ResidualStatistics:
    """H [n, n] and Σ x [n], as float64, the number of tokens summed, and the sums of the drift: dx,
    or e where it is not W dx.

    units: those of the first batch, unless others are given. Sums add exactly where they have the
    same."""

    hessian: Tensor
    input_sum: Tensor
    drift: InputDrift | OutputDrift
    tokens: int = 0
    units: Units | None = None

    @classmethod
    def zeros(
        cls,
        in_features: int,
        device: torch.device,
        importance: Tensor | None = None,
        units: Units | None = None,
    ) -> "ResidualStatistics":
        """The empty sums; importance: of the outputs, [m], where e is summed and not dx."""
        drift = (
            InputDrift.zeros(in_features, device)
            if importance is None
            else OutputDrift.zeros(in_features, importance)
        )
        hessian = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        return cls(hessian, hessian.new_zeros(in_features), drift, units=units)

    def __add__(self, other: "ResidualStatistics") -> "ResidualStatistics":
        drift = self.drift + other.drift  # type: ignore[operator]  # of one kind, as the importance is given to both or to none
        hessian, input_sum = self.hessian + other.hessian, self.input_sum + other.input_sum
        return ResidualStatistics(hessian, input_sum, drift, self.tokens + other.tokens, self.units)

    def add(self, x: Tensor, drift: Tensor) -> None:
        """Take in a batch. x: [tokens, n]; drift: dx = x̃ - x, [tokens, n], or e, [tokens, m].

        The caller forms the difference before any product: it is a small one of large numbers.
        """
        if self.units is None:
            self.units = Units.of(x, drift, len(x))
        self.hessian += self.units.round_outer_(
            _products(x, x), self.units.inputs, self.units.inputs
        )
        self.input_sum += self.units.round(x.sum(0, dtype=torch.float64), self.units.inputs)
        self.drift.add(x, drift, self.units)
        self.tokens += len(x)

    def pooled_(self, processes: Processes) -> "ResidualStatistics":
        """The sums of all processes, in place. Returns itself."""
        tokens = torch.tensor(self.tokens)
        processes.all_reduce(
            self.hessian,
            self.input_sum,
            self.drift.moment,
            self.drift.power,
            self.drift.sum,
            tokens,
        )
        self.tokens = int(tokens)
        return self

    def of_rows(self, rows: slice) -> "ResidualStatistics":
        """The sums that belong to some rows of the weight; none is copied."""
        return replace(self, drift=self.drift.of_rows(rows))

    def centre_(self) -> "ResidualStatistics":
        """Take the means out, in place: the sums become those of centred tokens. Only Σ x, Σ dx and
        Σ e stay, for the bias that makes up for the means. In place, since for a wide layer a copy
        of the sums is what a whole block's weights take. Returns itself.

        An input that does not vary is dead in it.
        """
        power = self.hessian.diagonal().clone()
        self.hessian.addr_(self.input_sum, self.input_sum, alpha=-1 / self.tokens)
        # Of a constant input this difference leaves noise, by which nothing is to be weighed or
        # divided.
        varies = (self.hessian.diagonal() > VARIATION * power).to(power)
        self.hessian.mul_(varies).mul_(varies[:, None])
        self.drift.centre_(self.input_sum, self.tokens, varies)
        return self

    def output_shift(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """What has to be added to the bias so that outputs are right in the mean: (Σ e - E Σ x) /
        k, [m]."""
        error = quantized.double() - weight.double()
        return (self.drift.of_outputs(weight).sum - error @ self.input_sum) / self.tokens


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Σ left rightᵀ over the tokens of a batch: float64 [p, q]. left: [tokens, p]; right: [tokens,
    q].

    Products are taken in the type of the tokens, without their means; what the means add is put
    back in float64. In float32 the products of an input whose mean is a thousand times its
    deviation would lose the deviation, all that `centre_` is after."""
    left_mean, right_mean = left.mean(0), right.mean(0)
    sums = ((left - left_mean).T @ (right - right_mean)).double()
    # Σ (l - a) (r - b)ᵀ = Σ l rᵀ - a (Σ r - k b)ᵀ - (Σ l) bᵀ
    left_sum, right_sum = (tokens.sum(0, dtype=torch.float64) for tokens in (left, right))
    left_mean, right_mean = left_mean.double(), right_mean.double()
    return sums.addmm_(
        torch.stack([left_mean, left_sum], 1),
        torch.stack([right_sum - len(right) * right_mean, right_mean]),
    )


@dataclass(frozen=True)
class Factor:
    """U of the damped inverse Hessian, its columns in sweep order.

    order: [n], the input that each position of the sweep works on; upper: [n, n] float64; damping:
    the λ / mean(diag H) that was used."""

    order: Tensor
    upper: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float, act_order: bool) -> Factor:
    """Factor H + λI, λ = damping · mean(diag H), in descending order of diag H (`act_order`) or as
    it stands.

    A dead input (H_ii = 0) gets H_ii = 1 and so is simply rounded. When the factorization fails the
    damping is raised tenfold until it succeeds, and the damping used is returned. Raises MarrqError
    when H is not finite."""
    if not torch.isfinite(hessian).all():
        raise MarrqError(
            "the inputs of the layer are not finite: look for NaN or infinity in the model's "
            "weights or the images"
        )
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    mean = diagonal.mean() if alive.any() else torch.ones_like(diagonal[0])
    order = (
        diagonal.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=hessian.device)
    )
    filled = hessian + torch.diag((~alive).to(hessian.dtype))
    filled = filled[order][:, order]
    for _ in range(MAX_DAMPING_STEPS):
        damped = filled + damping * mean * torch.eye(
            len(order), dtype=hessian.dtype, device=hessian.device
        )
        # H = R Rᵀ with R upper is the Cholesky factorization of H with rows and columns reversed;
        # then U = R⁻¹.
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                identity = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
                return Factor(
                    order,
                    torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1),
                    damping,
                )
        damping = max(damping * 10, 1e-8)
    raise MarrqError(
        f"the layer's Hessian cannot be factored even with damping {damping:g}: use other "
        "calibration images"
    )
