"""What the user chooses about numbers: how many bits weights and activations get, and how their grids are laid.

A scheme is written `W4A8`: weight bits, activation bits. A16 leaves activations in floating point.
Weights lie on one asymmetric grid per output channel, activations on one grid per tensor, found in calibration (static), or on one
grid per token, found at run time (dynamic).
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from marrq.errors import MarrqError

ActivationStrategy = Literal["per-tensor", "per-token"]

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8)
FLOAT_BITS = 16


@dataclass(frozen=True)
class WeightSpec:
    """Signed codes of `num_bits` bits, asymmetric, one scale and zero point per output channel."""

    num_bits: int

    def __post_init__(self) -> None:
        if self.num_bits not in WEIGHT_BITS:
            raise MarrqError(f"weight bits must be one of {WEIGHT_BITS}: got {self.num_bits}")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code; codes are signed since integer kernels run signed weights twice as fast."""
        return -(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1


@dataclass(frozen=True)
class ActivationSpec:
    """Unsigned codes of `num_bits` bits, asymmetric; 4-bit codes live in 8-bit containers clipped to 0 … 15."""

    num_bits: int
    strategy: ActivationStrategy = "per-tensor"

    def __post_init__(self) -> None:
        if self.num_bits not in ACTIVATION_BITS:
            raise MarrqError(f"activation bits must be one of {ACTIVATION_BITS}, or {FLOAT_BITS} for float: got {self.num_bits}")
        if self.strategy not in get_args(ActivationStrategy):
            raise MarrqError(f"activations must be one of {get_args(ActivationStrategy)}: got {self.strategy!r}")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return 0, 2**self.num_bits - 1


@dataclass(frozen=True)
class Scheme:
    """Weight numbers and activation numbers; `activation` is None where activations stay in floating point."""

    weight: WeightSpec
    activation: ActivationSpec | None

    def __str__(self) -> str:
        bits = self.activation.num_bits if self.activation else FLOAT_BITS
        return f"W{self.weight.num_bits}A{bits}"

    @property
    def description(self) -> str:
        """`W4A8` with the activation strategy, for people."""
        return f"{self} {self.activation.strategy}" if self.activation else str(self)


def parse_scheme(text: str, strategy: ActivationStrategy = "per-tensor") -> Scheme:
    """`W4A8` to a Scheme. Raises MarrqError for anything that is not one of the offered combinations."""
    match = re.fullmatch(r"W(\d+)A(\d+)", text)
    weight_bits, activation_bits = map(int, match.groups()) if match else (0, 0)
    if weight_bits not in WEIGHT_BITS or activation_bits not in (*ACTIVATION_BITS, FLOAT_BITS):
        raise MarrqError(f"unknown scheme {text!r}: write W{{2,3,4,8}}A{{4,8,16}}, for example W4A8")
    activation = ActivationSpec(activation_bits, strategy) if activation_bits != FLOAT_BITS else None
    return Scheme(WeightSpec(weight_bits), activation)
