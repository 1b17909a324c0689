"""The flavours: ways to write a quantized linear in ONNX. One file is one flavour.

    integer        low-bit codes in the file, ONNX Runtime's integer kernels at run time
    matmulnbits    weight-only schemes on ONNX Runtime's MatMulNBits
    qdq            standard operators, for any runtime; with `symmetric`, for TensorRT
    folded         codes that ONNX Runtime folds to float weights when it loads the file, for GPUs
    floating.py    fp32 and fp16: the float model that the artifact was made from

A new flavour is a class with the three methods of `Flavor`, an entry of FLAVORS and of VARIANTS,
and in exporters/choices.py its name, options and help, and the schemes that it can express.
"""

from collections.abc import Callable
from typing import Protocol

from exporters.choices import NO_OPTIONS, PREFERRED, Options, check_scheme, objection
from exporters.flavors.folded import Folded
from exporters.flavors.integer import Integer
from exporters.flavors.matmulnbits import MatMulNBits
from exporters.flavors.qdq import Qdq
from exporters.lowering.linear import LoweredModel
from exporters.trace import TracedModel
from marrq.schemes import Scheme


class Flavor(Protocol):
    """A way to lower the placeholders of a traced graph. Its options are its fields."""

    def container_bits(self, scheme: Scheme, device: str) -> int:
        """Bits that one weight code takes in a file for the device."""

    def lowest_onnxruntime(self, scheme: Scheme, has_salient: bool) -> str:
        """First ONNX Runtime that was seen to run such linears (exporters/opsets.py).

        has_salient: whether some columns have two codes for each weight."""

    def lower(self, traced: TracedModel, device: str) -> LoweredModel:
        """The graph for a device with every placeholder replaced. The trace stays as it is."""


FLAVORS: dict[str, Callable[..., Flavor]] = {
    "integer": Integer,
    "matmulnbits": MatMulNBits,
    "qdq": Qdq,
    "folded": Folded,
}
"""Flavours of a quantized model."""

VARIANTS: dict[str, tuple[str, Options]] = {
    "integer": ("integer", NO_OPTIONS),
    "matmulnbits": ("matmulnbits", NO_OPTIONS),
    "matmulnbits level 4": ("matmulnbits", {"accuracy_level": 4}),
    "qdq": ("qdq", NO_OPTIONS),
    "qdq symmetric": ("qdq", {"symmetric": True}),
    "folded": ("folded", NO_OPTIONS),
    "folded float32": ("folded", {"float32": True}),
}
"""Flavours with the options that are worth measuring beside each other."""

ONLY_ON = {"folded": "gpu"}
"""The device of a variant that is worth measuring on one alone: float16 is a graph of casts on
ONNX Runtime's CPU provider."""


def variants(scheme: Scheme, device: str = "cpu") -> list[str]:
    """The names of VARIANTS that can express a scheme and have kernels on a device."""
    return [
        name
        for name, (flavor, options) in VARIANTS.items()
        if flavor in PREFERRED[device]
        and ONLY_ON.get(name, device) == device
        # A variant is a flavour with options, and its options may limit the schemes.
        and objection(flavor, scheme, options) is None
    ]


def check_flavor(
    scheme: Scheme, flavor: str, options: Options = NO_OPTIONS, device: str = "cpu"
) -> None:
    """Raise MarrqError for an unknown flavour or device, a flavour without kernels on the device,
    an option that the flavour does not have, a value that the option cannot have, and a scheme that
    the flavour cannot express."""
    check_scheme(scheme, flavor, options, device)
    # The class checks the values of its options; a float flavour has none.
    if flavor in FLAVORS:
        FLAVORS[flavor](**options)
