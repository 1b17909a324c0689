"""A scheme: how many bits weights and activations get, and how their grids are laid.

A scheme is written `W4A8`: weight bits, activation bits. A16 leaves activations in floating point.
Weights are asymmetric and per-channel (one scale and zero point per output channel) unless a suffix
says otherwise:

    W4A16-g128      per-group: one scale and zero point for each 128 inputs of an output channel
    W8A8-sym        symmetric: all stored zero points are 0, those of static activations too, as
                    TensorRT wants it; also W4A8-sym, W4A16-g128-sym
    W4A16-mxint     microscaling integers: blocks of 32 inputs, symmetric, the scale a power of two
                    (OCP MX specification; the grid of SRR's paper, arXiv 2602.02001)
    W4A8-e8         first and last layers (patch embedding and head) in W8A8; without the suffix
                    they stay in floating point (marrq/models/first_last.py)
    WmixA8          each linear of the blocks has weight bits of its own, as a budget of bits gives
                    them (marrq/sensitivity.py); all suffixes may follow

Activations are per-tensor with a scale found in calibration (`per-tensor`, static), or per-token
with a scale found at run time (`per-token`, dynamic). `--activations` says which, or the scheme:
`W4A4:per-token`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from marrq.errors import MarrqError

ActivationStrategy = Literal["per-tensor", "per-token"]
WeightGrid = Literal["asymmetric", "symmetric", "mxint"]

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (3, 4, 8)
FLOAT_BITS = 16
MXINT_BLOCK = 32
OUTER_BITS = 8
"""Bits of weights and activations of the first and last layers with the suffix -e8."""
COARSE_BITS = 4
"""Activations of 4 bits or fewer are coarse: to round them costs about as much accuracy as to round
the weights, or more."""

MIXED = "mix"
"""What stands in place of the weight bits if linears have bits of their own."""

# The five parts: W bits, A bits, -gSIZE, -sym or -mxint, -e8.
SCHEME = re.compile(rf"W(\d+|{MIXED})A(\d+)(?:-g([1-9]\d*))?(?:-(sym|mxint))?(-e{OUTER_BITS})?")
GRID_SUFFIXES: dict[str | None, WeightGrid] = {
    None: "asymmetric",
    "sym": "symmetric",
    "mxint": "mxint",
}


def _listed(choices: Iterable[object]) -> str:
    return ", ".join(map(str, choices))


def _check_strategy(strategy: str) -> None:
    if strategy not in get_args(ActivationStrategy):
        raise MarrqError(
            f"activations must be one of {_listed(get_args(ActivationStrategy))}: got {strategy!r}"
        )


@dataclass(frozen=True)
class WeightSpec:
    """Weights as signed codes of `num_bits` bits.

    group_size: inputs of an output channel that share a scale and zero point; None for all inputs
    grid: asymmetric, symmetric or mxint
    reduce_range: 8-bit codes lie in -64 … 63, half their range (the name is ONNX Runtime's)

    Kernels on x86 processors without VNNI add two products of a uint8 activation and an int8 weight
    in 16 bits, and saturate: 2 · 255 · 127 is more than 2¹⁵ - 1, but 2 · 255 · 64 is not. Codes of
    fewer bits cannot saturate."""

    num_bits: int
    group_size: int | None = None
    grid: WeightGrid = "asymmetric"
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if self.num_bits not in WEIGHT_BITS:
            raise MarrqError(
                f"weight bits must be one of {_listed(WEIGHT_BITS)}: got {self.num_bits}"
            )
        if self.grid not in get_args(WeightGrid):
            raise MarrqError(
                f"a weight grid must be one of {_listed(get_args(WeightGrid))}: got {self.grid!r}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise MarrqError(
                f"a group has 1 input or more: got group size {self.group_size}; leave it out for "
                "one group"
            )
        # The OCP specification has blocks of 32, no others.
        if self.grid == "mxint" and self.group_size != MXINT_BLOCK:
            raise MarrqError(
                f"mxint has blocks of {MXINT_BLOCK} inputs: got group size {self.group_size}"
            )
        if self.reduce_range and self.num_bits != 8:
            raise MarrqError(
                f"only 8-bit codes have a range to reduce: got {self.num_bits} bits; leave "
                "reduce_range off"
            )

    @property
    def suffix(self) -> str:
        """What a scheme's name says about the grid: `-g64-sym`."""
        # mxint has one group size only, which its name implies.
        group = f"-g{self.group_size}" if self.group_size and self.grid != "mxint" else ""
        return group + {"asymmetric": "", "symmetric": "-sym", "mxint": "-mxint"}[self.grid]

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code. Codes are signed because integer kernels run signed weights
        twice as fast."""
        # [-2^(b-1), 2^(b-1) - 1], or half of that with a reduced range.
        half = 2 ** (self.num_bits - 1 - self.reduce_range)
        return -half, half - 1


@dataclass(frozen=True)
class ActivationSpec:
    """Activations as codes of `num_bits` bits.

    symmetric: signed codes with the zero point 0, else unsigned codes with any zero point

    3- and 4-bit codes run in 8 bits, clipped to their range. The symmetric range is -128 … 127, as
    TensorRT clamps (documentation of IQuantizeLayer) and as Model Optimizer quantizes activations;
    the largest magnitude gets the code 127."""

    num_bits: int
    strategy: ActivationStrategy = "per-tensor"
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.num_bits not in ACTIVATION_BITS:
            raise MarrqError(
                f"activation bits must be one of {_listed(ACTIVATION_BITS)}, or {FLOAT_BITS} for "
                f"float: got {self.num_bits}"
            )
        _check_strategy(self.strategy)
        if self.symmetric and not self.is_static:
            raise MarrqError(
                f"{self.strategy} activations find their zero point at run time: leave symmetric "
                "off, or take per-tensor"
            )

    @property
    def is_static(self) -> bool:
        """Whether calibration finds the scale and zero point; if not, it finds the clip factor
        alone."""
        return self.strategy == "per-tensor"

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.symmetric:
            return -(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1
        # Unsigned, as ONNX Runtime's fastest integer kernels take them: uint8 times int8.
        return 0, 2**self.num_bits - 1


@dataclass(frozen=True)
class Scheme:
    """Bits and grids of a model's blocks.

    activation: None if activations stay in floating point
    outer_layers: whether first and last layers are quantized too, as `of_outer_layers` says
    mixed: whether each linear has weight bits of its own; `weight` then has the most bits that one
    may have"""

    weight: WeightSpec
    activation: ActivationSpec | None
    outer_layers: bool = False
    mixed: bool = False

    def __post_init__(self) -> None:
        widest = WEIGHT_BITS[-1]
        if self.mixed and self.weight.num_bits != widest:
            raise MarrqError(
                f"a mixed scheme has weights of up to {widest} bits: got {self.weight.num_bits}"
            )

    def __str__(self) -> str:
        bits = self.activation.num_bits if self.activation else FLOAT_BITS
        outer = f"-e{OUTER_BITS}" if self.outer_layers else ""
        width = MIXED if self.mixed else self.weight.num_bits
        return f"W{width}A{bits}{self.weight.suffix}{outer}"

    def of_width(self, num_bits: int) -> "Scheme":
        """The scheme of a linear with weights of `num_bits` bits: all else is as it is here."""
        # As `parse_scheme` reads it: only 8-bit weights beside quantized activations can saturate.
        reduce_range = num_bits == WEIGHT_BITS[-1] and self.activation is not None
        weight = replace(self.weight, num_bits=num_bits, reduce_range=reduce_range)
        return replace(self, weight=weight, mixed=False)

    @property
    def of_outer_layers(self) -> "Scheme":
        """The scheme of patch embedding and head: 8 bits, per-channel weights, static activations.

        Zero points are 0, and activations stay in floating point, if they do in the blocks: a
        flavour that can express the blocks can then express these layers."""
        # Per-channel always: these layers are small, and groups would save nothing.
        symmetric = self.weight.grid != "asymmetric"
        grid: WeightGrid = "symmetric" if symmetric else "asymmetric"
        activation = ActivationSpec(OUTER_BITS, symmetric=symmetric) if self.activation else None
        return Scheme(
            WeightSpec(OUTER_BITS, grid=grid, reduce_range=activation is not None), activation
        )

    @property
    def has_coarse_activations(self) -> bool:
        """Whether activations have so few bits that better rounding pays, even at run-time cost."""
        # Beyond 4 bits, the weights are what costs accuracy.
        return self.activation is not None and self.activation.num_bits <= COARSE_BITS

    @property
    def description(self) -> str:
        """The scheme with its activation strategy, for people: `W4A8 per-tensor`."""
        return f"{self} {self.activation.strategy}" if self.activation else str(self)


def parse_scheme(text: str, strategy: ActivationStrategy = "per-tensor") -> Scheme:
    """Text such as `W4A8`, `W4A16-g128-sym` or `W4A4:per-token` to a Scheme. Raises MarrqError for
    anything that is not offered.

    strategy: of the activations, if the text names none."""
    name, _, named = text.partition(":")
    # The default strategy may not have been chosen by anybody.
    if named and strategy not in ("per-tensor", named):
        raise MarrqError(
            f"the scheme {text} and --activations {strategy} differ: leave one of them out"
        )
    strategy = cast(ActivationStrategy, named or strategy)
    # Text that does not match gets 0 bits, which no scheme has, and ends in the same error.
    match = SCHEME.fullmatch(name)
    bits, activation_bits, group, suffix, outer = (
        match.groups() if match else ("0", "0", None, None, None)
    )
    mixed = bits == MIXED
    width = WEIGHT_BITS[-1] if mixed else int(bits)
    if (
        width not in WEIGHT_BITS
        or int(activation_bits) not in (*ACTIVATION_BITS, FLOAT_BITS)
        or (group and suffix == "mxint")
    ):
        raise MarrqError(
            f"unknown scheme {text!r}: write W{{2,3,4,8,mix}}A{{3,4,8,16}}, then -gSIZE and/or "
            "-sym, or -mxint alone, then -e8, then :per-token; all suffixes may be left out"
        )
    _check_strategy(strategy)
    if int(activation_bits) == FLOAT_BITS and strategy != "per-tensor":
        raise MarrqError(
            f"activations of {text} stay in float, so nothing can be {strategy}: leave it out, or "
            "choose a scheme such as W4A8"
        )
    group_size = MXINT_BLOCK if suffix == "mxint" else int(group) if group else None
    # Zero points that are found at run time are not stored: -sym says nothing about them.
    symmetric = suffix == "sym" and strategy == "per-tensor"
    activation = (
        ActivationSpec(int(activation_bits), strategy, symmetric)
        if int(activation_bits) != FLOAT_BITS
        else None
    )
    # Only 8-bit weights beside quantized activations could saturate a sum of two products.
    reduce_range = width == WEIGHT_BITS[-1] and activation is not None
    weight = WeightSpec(width, group_size, GRID_SUFFIXES[suffix], reduce_range)
    return Scheme(weight, activation, outer is not None, mixed)
