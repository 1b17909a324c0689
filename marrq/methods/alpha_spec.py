"""What the user chooses about the residual strength α: how it is found, and the controller of the
search by PID (methods/marr.py).

Each choice is a field that carries its key, its meaning and the form of its values, as in
methods/spec.py. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from marrq.errors import MarrqError
from marrq.methods.setting import (
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    SHARE,
    check_settings,
    choice,
    setting,
)

AlphaStrategy = Literal["pid", "grid", "closed", "global"]
Feedback = Literal["held-out", "calibration"]


@dataclass(frozen=True)
class PID:
    """Settings of MARR's controller; methods/marr.py has its law. The paper publishes `tolerance`
    alone."""

    # The three gains of the law, and how fast its memory fades.
    proportional: float = field(
        default=0.6, metadata=setting("proportional", "gain of the error", NOT_NEGATIVE)
    )
    integral: float = field(
        default=0.1, metadata=setting("integral", "gain of the sum of errors", NOT_NEGATIVE)
    )
    derivative: float = field(
        default=0.1, metadata=setting("derivative", "gain of the change of the error", NOT_NEGATIVE)
    )
    leak: float = field(
        default=0.5, metadata=setting("leak", "share of the sum that is kept at each step", SHARE)
    )
    # α = 0 is no correction and α = 1 all of it; a search may go somewhat beyond.
    initial: float = field(default=0.25, metadata=setting("initial", "first α", NUMBER))
    lower: float = field(
        default=0.0, metadata=setting("lower", "least α that a search tries", NUMBER)
    )
    upper: float = field(
        default=1.5, metadata=setting("upper", "largest α that a search tries", NUMBER)
    )
    # Three ends of a search. A step costs a whole sweep.
    steps: int = field(default=8, metadata=setting("steps", "most steps of a search", COUNT))
    tolerance: float = field(
        default=1e-5,
        metadata=setting(
            "tolerance",
            "the search ends if J changes by less, as a share of the first J",
            NOT_NEGATIVE,
        ),
    )
    # Rounding makes J jitter, which hides the gain of a smaller move of α.
    settled: float = field(
        default=0.02,
        metadata=setting("settled", "the search ends if α moves by less", NOT_NEGATIVE),
    )

    def __post_init__(self) -> None:
        check_settings(self, "pid.")
        if not self.lower <= self.initial <= self.upper:
            raise MarrqError(
                "the first α must lie between the bounds: got "
                f"pid.lower={self.lower:g}, pid.initial={self.initial:g}, pid.upper={self.upper:g}"
            )


@dataclass(frozen=True)
class AlphaSpec:
    """How the residual strength α of a linear is found.

    strategy: `pid` and `grid` search α for each linear, `closed` computes it from the sums of both
        halves, `global` takes `value` for all linears
    value: None stands for the method's own constant
    grid: the values that `grid` tries"""

    # `global=0.5` is one setting in two fields: the number goes to `value`.
    strategy: AlphaStrategy = field(
        default="pid",
        metadata=setting(
            "alpha",
            "how α is found: by pid, grid or closed form for each linear, or one value for all",
            choice(AlphaStrategy, "pid, grid, closed, or global=VALUE for a fixed α"),
            argument="value",
        ),
    )
    value: float | None = None
    # J on the data that produced the codes cannot tell fit from noise; J on other data can.
    feedback: Feedback = field(
        default="held-out",
        metadata=setting(
            "feedback",
            "images that judge an α: the half that its sweep has not seen, or the images it has",
            choice(Feedback),
        ),
    )
    # 0 to 1.5, the bounds of the PID.
    grid: tuple[float, ...] = tuple(i / 8 for i in range(13))
    pid: PID = field(default_factory=PID)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.strategy == "global" and self.value is None:
            raise MarrqError("alpha=global needs a value: write global=0.5")
        if self.strategy != "global" and self.value is not None:
            raise MarrqError(
                f"alpha={self.strategy} takes no value: got {self.value}; for a fixed α write "
                f"global={self.value}"
            )
        # Neither has a form of its own: the value is read with alpha, and no text has the grid.
        values = self.grid if self.value is None else (*self.grid, self.value)
        if not self.grid or not all(map(NUMBER.allows, values)):
            raise MarrqError(f"alpha must have finite values, at least one: got {values}")
