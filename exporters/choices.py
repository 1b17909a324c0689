"""The flavours and their options by name, with a sentence of help for each, without torch.

The command line makes its help from these tables, and refuses a wrong name before it loads torch.
What a flavour is stands in exporters/flavors.
"""

from collections.abc import Mapping
from types import MappingProxyType

from marrq.errors import MarrqError

Options = Mapping[str, bool | int]
"""Options of a flavour by name; an option that is absent has its default."""

# A default argument must not be changed by a caller, so it is read-only.
NO_OPTIONS: Options = MappingProxyType({})

BASELINES = ("fp32", "fp16")
"""Flavours of the float model that an artifact was made from."""

OPTIONS = {
    "integer": ("fuse",),
    "matmulnbits": ("accuracy_level", "fuse"),
    "qdq": ("symmetric",),
    "fp32": (),
    "fp16": (),
}
"""The options of each flavour: the fields of its class in exporters/flavors."""

FLAVOR_HELP = {
    "integer": "integer kernels of ONNX Runtime, for quantized activations.",
    "matmulnbits": "MatMulNBits of ONNX Runtime, for float activations.",
    "qdq": "standard operators, for any runtime and every scheme.",
    "fp32": "the float model that the artifact was made from.",
    "fp16": "the same model in float16.",
}
"""What each flavour is for."""

FLAGS = {"symmetric": "--symmetric", "accuracy_level": "--accuracy-level", "fuse": "--no-fuse"}
"""The options as the command line spells them."""

OPTION_HELP = {
    "symmetric": "only what TensorRT takes; for A16 schemes with -sym or -mxint.",
    "accuracy_level": "1 computes in float32 (default), 4 in int8.",
    "fuse": "attention as one operator (default).",
}
"""What each option does."""


def quantized_flavors() -> list[str]:
    """The flavours of a quantized model."""
    return [flavor for flavor in OPTIONS if flavor not in BASELINES]


def flavors_with(option: str) -> list[str]:
    """The flavours that have an option."""
    return [flavor for flavor, options in OPTIONS.items() if option in options]


def flavor_help() -> str:
    """Each flavour, and what the flavour is for."""
    return " ".join(f"{flavor}: {sentence}" for flavor, sentence in FLAVOR_HELP.items())


def option_help(option: str) -> str:
    """The flavours that have an option, and what the option does."""
    return f"{', '.join(flavors_with(option))}: {OPTION_HELP[option]}"


def check_choice(flavor: str, options: Options) -> None:
    """Raise MarrqError for an unknown flavour, and for an option that the flavour does not have."""
    # The keys are all flavours, those of float models too.
    if flavor not in OPTIONS:
        raise MarrqError(f"unknown flavor {flavor!r}: choose one of {', '.join(OPTIONS)}")
    for option in options:
        if option not in OPTIONS[flavor]:
            raise MarrqError(
                f"{FLAGS[option]} is no option of {flavor!r}: use it with --flavor "
                f"{' or '.join(flavors_with(option))}"
            )


def check_baseline(flavor: str) -> None:
    """Raise MarrqError for a name that is no flavour of a float model."""
    if flavor not in BASELINES:
        raise MarrqError(f"unknown baseline {flavor!r}: choose one of {', '.join(BASELINES)}")
