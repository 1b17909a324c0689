"""What the user chooses about the method."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from marrq.errors import MarrqError
from marrq.methods.lowrank import LowRankSpec
from marrq.schemes import Scheme

AlphaStrategy = Literal["pid", "grid", "global"]


Feedback = Literal["held-out", "calibration"]


Clip = Literal["weights", "outputs"]


Balance = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class PID:
    """Settings of MARR's controller; see methods/marr.py for the law. The paper publishes none of
    them but `tolerance`.

    proportional, integral, derivative: the gains; leak: of the integral; initial: the first α;
    lower, upper: its bounds; steps: at most so many; settled: the smallest move of α worth another
    step, since the jitter that rounding gives J hides smaller ones."""

    proportional: float = 0.6
    integral: float = 0.1
    derivative: float = 0.1
    leak: float = 0.5
    initial: float = 0.25
    lower: float = 0.0
    upper: float = 1.5
    steps: int = 8
    tolerance: float = 1e-5
    settled: float = 0.02

    def __post_init__(self) -> None:
        if not self.lower <= self.initial <= self.upper or self.steps < 1:
            raise MarrqError(
                f"a PID needs lower <= initial <= upper and at least one step: got {self}"
            )


@dataclass(frozen=True)
class AlphaSpec:
    """How the residual strength α of a module is found.

    strategy: `pid` and `grid` search it for each module, `global` takes `value` for all; value:
    None is the constant of the method itself; feedback: what judges a search, the half of the
    calibration images that its sweep has not seen, or the images it has; grid: the values that
    `grid` tries."""

    strategy: AlphaStrategy = "pid"
    value: float | None = None
    feedback: Feedback = "held-out"
    grid: tuple[float, ...] = tuple(i / 8 for i in range(13))
    pid: PID = field(default_factory=PID)

    def __post_init__(self) -> None:
        if self.strategy not in get_args(AlphaStrategy) or self.feedback not in get_args(Feedback):
            raise MarrqError(
                "alpha is found by pid, grid or global, judged held-out or calibration: got "
                f"{self.strategy}, {self.feedback}"
            )
        if (self.value is not None) != (self.strategy == "global"):
            raise MarrqError(
                f"a value of alpha goes with the strategy global alone: got {self.strategy}, "
                f"{self.value}"
            )


@dataclass(frozen=True)
class MethodSpec:
    """The method and its settings.

    name: one of METHODS; damping: λ / mean(diag H) of the sweep; target_damping: the same of the
    solve for the exact target; act_order: sweep columns by descending diag H; clip: what the range
    of a row's grid is searched by, the rounding error of its weights (the papers') or the error of
    its output after a sweep (methods/gptq.py); correct_bias: let the bias take up the mean error of
    the outputs; lowrank: a branch in floating point beside the codes, or None; rotation: seed of
    the rotation of the residual stream, or None; equalize: a scale per channel between linears and
    what they read (marrq/transforms/equalization.py); balance: the values of the heads in another basis
    (marrq/transforms/value_basis.py), see `balances`."""

    name: str = "marr-stream"
    damping: float = 0.01
    target_damping: float = 0.1
    act_order: bool = True
    clip: Clip = "outputs"
    alpha: AlphaSpec = field(default_factory=AlphaSpec)
    correct_bias: bool = True
    lowrank: LowRankSpec | None = None
    rotation: int | None = None
    equalize: bool = True
    balance: Balance = "auto"

    def balances(self, scheme: Scheme) -> bool:
        """Whether the values of the heads get another basis: left to `auto`, where activations are
        coarse.

        On a DINOv2-S, not equalized, it gained 4 points of top-1 at W4A4, and lost 1 at W3A8 and 3
        at W2A8: there the weights alone are coarse, and a sweep that compensates makes more of
        inputs that are correlated."""
        return scheme.has_coarse_activations if self.balance == "auto" else self.balance == "on"
