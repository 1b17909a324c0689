"""The names of flavours and of their options, without torch.

The command line refuses a wrong name before it loads torch. What a flavour is stands in
exporters/flavors.
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

FLAGS = {"symmetric": "--symmetric", "accuracy_level": "--accuracy-level", "fuse": "--no-fuse"}
"""The options as the command line spells them."""


def check_choice(flavor: str, options: Options) -> None:
    """Raise MarrqError for an unknown flavour, and for an option that the flavour does not have."""
    # The keys are all flavours, those of float models too.
    if flavor not in OPTIONS:
        raise MarrqError(f"unknown flavor {flavor!r}: choose one of {', '.join(OPTIONS)}")
    for option in options:
        if option not in OPTIONS[flavor]:
            # Name the flavours that do have the option.
            others = [name for name, known in OPTIONS.items() if option in known]
            raise MarrqError(
                f"{FLAGS[option]} is no option of {flavor!r}: use it with --flavor "
                f"{' or '.join(others)}"
            )
