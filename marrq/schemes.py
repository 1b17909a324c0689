"""What the user chooses about numbers: how many bits weights and activations get, and how their
grids are laid.

A scheme is written `W4A8`: weight bits, activation bits. A16 leaves activations in floating point.
Weights lie on one asymmetric grid per output channel unless a suffix says otherwise:

    W4A16-g128      one grid for each 128 inputs of an output channel
    W4A8-sym        zero point 0, as TensorRT wants it; goes with -g128 too: W4A16-g128-sym
    W4A16-mxint     microscaling integers: blocks of 32 inputs, symmetric, the scale a power of two that the block shares
                    (OCP MX specification; the grid of SRR's paper, arXiv 2602.02001)
    W4A8-e8         patch embedding and head, the edges of the model, in W8A8 (marrq/models/first_last.py); without it they stay in floating point

Activations lie on one grid per tensor, found in calibration (`per-tensor`, static), or on one grid
per token, found at run time (`per-token`, dynamic)."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from marrq.errors import MarrqError

ActivationStrategy = Literal["per-tensor", "per-token"]
WeightGrid = Literal["asymmetric", "symmetric", "mxint"]

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (3, 4, 8)
FLOAT_BITS = 16
MXINT_BLOCK = 32
EDGE_BITS = 8
COARSE_BITS = 4
"""Activations of as many bits or fewer are coarse: rounding them costs more than rounding weights,
or nearly as much."""

SCHEME = re.compile(rf"W(\d+)A(\d+)(?:-g([1-9]\d*))?(?:-(sym|mxint))?(-e{EDGE_BITS})?")
SUFFIXES: dict[str | None, WeightGrid] = {None: "asymmetric", "sym": "symmetric", "mxint": "mxint"}


@dataclass(frozen=True)
class WeightSpec:
    """Signed codes of `num_bits` bits.

    group_size: inputs of an output channel that share a scale and zero point; None: all of them.
    grid: how they are laid. reduce_range: 8-bit codes lie in -64 … 63, half their range (the name
    is ONNX Runtime's). Kernels on x86 processors without VNNI add two products of a uint8
    activation and an int8 weight in 16 bits, and saturate: 2 · 255 · 127 is more than 2¹⁵ - 1, 2 ·
    255 · 64 is not. Codes of fewer bits cannot saturate."""

    num_bits: int
    group_size: int | None = None
    grid: WeightGrid = "asymmetric"
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if self.num_bits not in WEIGHT_BITS:
            raise MarrqError(f"weight bits must be one of {WEIGHT_BITS}: got {self.num_bits}")
        if self.grid not in get_args(WeightGrid):
            raise MarrqError(
                f"a weight grid must be one of {get_args(WeightGrid)}: got {self.grid!r}"
            )
        if self.grid == "mxint" and self.group_size != MXINT_BLOCK:
            raise MarrqError(
                f"mxint has blocks of {MXINT_BLOCK} inputs: got group size {self.group_size}"
            )
        if self.reduce_range and self.num_bits != 8:
            raise MarrqError(f"only 8-bit codes have a range to reduce: got {self.num_bits} bits")

    @property
    def suffix(self) -> str:
        """What a scheme's name says about the grid."""
        group = f"-g{self.group_size}" if self.group_size and self.grid != "mxint" else ""
        return group + {"asymmetric": "", "symmetric": "-sym", "mxint": "-mxint"}[self.grid]

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code; codes are signed since integer kernels run signed weights
        twice as fast."""
        half = 2 ** (self.num_bits - 1 - self.reduce_range)
        return -half, half - 1


@dataclass(frozen=True)
class ActivationSpec:
    """Unsigned codes of `num_bits` bits, asymmetric; 3- and 4-bit codes live in 8-bit containers,
    clipped to 0 … 7 or 15."""

    num_bits: int
    strategy: ActivationStrategy = "per-tensor"

    def __post_init__(self) -> None:
        if self.num_bits not in ACTIVATION_BITS:
            raise MarrqError(
                f"activation bits must be one of {ACTIVATION_BITS}, or {FLOAT_BITS} for float: got "
                f"{self.num_bits}"
            )
        if self.strategy not in get_args(ActivationStrategy):
            raise MarrqError(
                f"activations must be one of {get_args(ActivationStrategy)}: got {self.strategy!r}"
            )

    @property
    def is_static(self) -> bool:
        """Whether the grid is found in calibration; if not, only how much of its range is
        clipped."""
        return self.strategy == "per-tensor"

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return 0, 2**self.num_bits - 1


@dataclass(frozen=True)
class Scheme:
    """Weight numbers and activation numbers of the blocks; `activation` is None where activations
    stay in floating point.

    edges: whether patch embedding and head are quantized too, as `of_edges` says.
    """

    weight: WeightSpec
    activation: ActivationSpec | None
    edges: bool = False

    def __str__(self) -> str:
        bits = self.activation.num_bits if self.activation else FLOAT_BITS
        return f"W{self.weight.num_bits}A{bits}{self.weight.suffix}{f'-e{EDGE_BITS}' if self.edges else ''}"

    @property
    def of_edges(self) -> "Scheme":
        """The numbers of patch embedding and head: a grid per output channel, static activations.
        Zero points are 0, and activations in floating point, where they are so in the blocks: a
        flavour that can express the one can express the other."""
        grid: WeightGrid = "asymmetric" if self.weight.grid == "asymmetric" else "symmetric"
        activation = ActivationSpec(EDGE_BITS) if self.activation else None
        return Scheme(
            WeightSpec(EDGE_BITS, grid=grid, reduce_range=activation is not None), activation
        )

    @property
    def has_coarse_activations(self) -> bool:
        """Whether it is worth some effort, even at run time, to round activations better."""
        return self.activation is not None and self.activation.num_bits <= COARSE_BITS

    @property
    def description(self) -> str:
        """`W4A8` with the activation strategy, for people."""
        return f"{self} {self.activation.strategy}" if self.activation else str(self)


def parse_scheme(text: str, strategy: ActivationStrategy = "per-tensor") -> Scheme:
    """`W4A8` or `W4A16-g128-sym` to a Scheme. Raises MarrqError for anything that is not one of the
    offered combinations."""
    match = SCHEME.fullmatch(text)
    bits, activation_bits, group, suffix, edges = (
        match.groups() if match else ("0", "0", None, None, None)
    )
    if (
        int(bits) not in WEIGHT_BITS
        or int(activation_bits) not in (*ACTIVATION_BITS, FLOAT_BITS)
        or (group and suffix == "mxint")
    ):
        raise MarrqError(
            f"unknown scheme {text!r}: write W{{2,3,4,8}}A{{3,4,8,16}}[-gSIZE][-sym] or …-mxint, "
            "[-e8] behind"
        )
    group_size = MXINT_BLOCK if suffix == "mxint" else int(group) if group else None
    activation = (
        ActivationSpec(int(activation_bits), strategy)
        if int(activation_bits) != FLOAT_BITS
        else None
    )
    weight = WeightSpec(
        int(bits),
        group_size,
        SUFFIXES[suffix],
        reduce_range=int(bits) == 8 and activation is not None,
    )
    return Scheme(weight, activation, edges is not None)
