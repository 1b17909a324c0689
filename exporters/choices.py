"""What can be chosen about an export, without torch: the flavours and their options by name, a
sentence of help for each, and the schemes that each flavour can express.

The command line makes its help from these tables, and refuses a wrong name or scheme before it
loads torch. What a flavour is stands in exporters/flavors.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from marrq.errors import MarrqError, choices
from marrq.schemes import OUTER_BITS, Scheme

Options = Mapping[str, bool | int]
"""Options of a flavour by name; an option that is absent has its default."""

# A default argument must not be changed by a caller, so it is read-only.
NO_OPTIONS: Options = MappingProxyType({})

DEVICES = ("cpu", "gpu")
"""What a file is made for: ONNX Runtime's CPU provider, or its CUDA provider."""

BASELINES = ("fp32", "fp16")
"""Flavours of the float model that an artifact was made from."""

OPTIONS = {
    "integer": ("fuse",),
    "matmulnbits": ("accuracy_level", "fuse"),
    "qdq": ("symmetric",),
    "folded": ("float32", "weights_only"),
    "fp32": ("fuse",),
    "fp16": ("fuse",),
}
"""The options of each flavour: the fields of its class in exporters/flavors."""

FLAVOR_HELP = {
    "integer": "integer kernels of ONNX Runtime, for quantized activations.",
    "matmulnbits": "MatMulNBits of ONNX Runtime, for float activations.",
    "qdq": "standard operators, for any runtime and every scheme.",
    "folded": "codes that become float16 weights when the file is loaded, for GPUs.",
    "fp32": "the float model that the artifact was made from.",
    "fp16": "the same model in float16.",
}
"""What each flavour is for."""

FLAGS = {
    "symmetric": "--symmetric",
    "accuracy_level": "--accuracy-level",
    "fuse": "--no-fuse",
    "float32": "--float32",
    "weights_only": "--weights-only",
}
"""The options as the command line spells them."""

OPTION_HELP = {
    "symmetric": "float16 and only what TensorRT takes; for W8A8-sym and A16 schemes with -sym.",
    "accuracy_level": "1 computes in float32 (default), 4 in int8.",
    "fuse": "attention as one operator (default).",
    "float32": "weights and activations in float32.",
    "weights_only": "do not quantize the activations: W4A8 becomes W4A16.",
}
"""What each option does."""

LEAST_GROUP = 64
"""Smallest group of `integer` that is faster than the float product (flavors/integer.py)."""

LEAST_BLOCK = 16
"""Smallest block of inputs that MatMulNBits has a scale for."""


def _integer_objection(scheme: Scheme, options: Options) -> str | None:
    # An integer kernel multiplies codes by codes.
    if scheme.activation is None:
        return "needs quantized activations"
    # INT2 is of opset 25, whose Attention has no kernel.
    if options.get("fuse") and scheme.weight.num_bits == 2:
        return "has attention as two products beside 2-bit weights (leave out --fuse)"
    # Smaller groups would work, but lose the point of the flavour.
    if scheme.weight.group_size is not None and scheme.weight.group_size < LEAST_GROUP:
        return (
            f"needs groups of {LEAST_GROUP} inputs or more, because smaller groups run slower "
            "than the float model"
        )
    return None


def _matmulnbits_objection(scheme: Scheme, options: Options) -> str | None:
    # The operator quantizes activations itself, if at all, and on its own grid.
    if scheme.activation is not None:
        return "needs float activations"
    # A group is written as whole blocks.
    size = scheme.weight.group_size
    if size is not None and size % LEAST_BLOCK:
        return f"needs groups in multiples of {LEAST_BLOCK} inputs"
    return None


def _qdq_objection(scheme: Scheme, options: Options) -> str | None:
    if not options.get("symmetric"):
        return None
    # TensorRT documents zero points of 0 only.
    activation = scheme.activation
    if activation and not activation.is_static:
        return "with --symmetric needs static activations (quantize with --activations per-tensor)"
    if scheme.weight.grid == "asymmetric" or (activation and not activation.symmetric):
        return (
            "with --symmetric needs zero points of 0 (quantize with --scheme W8A8-sym, or "
            "W4A16-g128-sym)"
        )
    # Codes of fewer bits would need a Clip between QuantizeLinear and DequantizeLinear.
    if activation and activation.num_bits != OUTER_BITS:
        return "with --symmetric needs activations of 8 bits (quantize with --scheme W8A8-sym)"
    # Blocks are documented for INT4 only, and INT4 for float activations only.
    is_wide = scheme.weight.num_bits == OUTER_BITS or activation
    if is_wide and scheme.weight.group_size is not None:
        return (
            "with --symmetric takes no group scales for 8-bit weights and beside quantized "
            "activations (quantize with --scheme W8A8-sym, or W8A16-sym)"
        )
    return None


def _folded_objection(scheme: Scheme, options: Options) -> str | None:
    # The product is a float MatMul: no activation is rounded.
    if scheme.activation is not None and not options.get("weights_only"):
        return "runs activations in float"
    return None


OBJECTIONS: dict[str, Callable[[Scheme, Options], str | None]] = {
    "integer": _integer_objection,
    "matmulnbits": _matmulnbits_objection,
    "qdq": _qdq_objection,
    "folded": _folded_objection,
}
"""Why a flavour with these options cannot express a scheme, or None. `qdq` can express every
scheme."""

PREFERRED = {
    "cpu": ("integer", "matmulnbits", "qdq", "folded"),
    "gpu": ("folded", "matmulnbits", "qdq"),
}
"""The flavours that a device has kernels for, the fastest first."""

WITHOUT_KERNELS = {
    "integer": "its kernels are of ONNX Runtime's CPU provider: on an H100 the linears ran on the "
    "CPU, and the model took 8 to 55 times as long as in float16"
}
"""Why a flavour is not for a GPU."""


def objection(flavor: str, scheme: Scheme, options: Options = NO_OPTIONS) -> str | None:
    """Why a flavour of a quantized model cannot express a scheme, or None."""
    return OBJECTIONS[flavor](scheme, options)


def flavors_for(scheme: Scheme, device: str = "cpu") -> list[str]:
    """The flavours that can express a scheme with their default options and have kernels on a
    device, the best one first."""
    return [flavor for flavor in PREFERRED[device] if objection(flavor, scheme) is None]


def suitable_flavor(scheme: Scheme, device: str = "cpu") -> str:
    """The flavour that suits a scheme best on a device under ONNX Runtime.

    On a GPU that is `folded` even if the scheme quantizes activations, which `check_scheme` refuses
    without --weights-only: the flavours that keep such a scheme are slower than the float model.
    """
    return PREFERRED["gpu"][0] if device == "gpu" else flavors_for(scheme, device)[0]


def check_device(device: str) -> None:
    """Raise MarrqError for an unknown device."""
    if device not in DEVICES:
        raise MarrqError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")


def check_flavor_on(flavor: str, device: str) -> None:
    """Raise MarrqError for an unknown device, and for a flavour that has no kernels there."""
    check_device(device)
    if device == "gpu" and flavor in WITHOUT_KERNELS:
        raise MarrqError(
            f"the flavour {flavor} is not for a GPU, because {WITHOUT_KERNELS[flavor]}: use "
            f"--device cpu, or --flavor {PREFERRED['gpu'][0]}"
        )


def check_scheme(
    scheme: Scheme, flavor: str, options: Options = NO_OPTIONS, device: str = "cpu"
) -> None:
    """Raise MarrqError as `check_choice` and `check_flavor_on`, and for a scheme that the flavour
    cannot express."""
    # Names first: only a known flavour has an opinion of a scheme.
    check_choice(flavor, options)
    check_flavor_on(flavor, device)
    # The float model has no scheme.
    reason = None if flavor in BASELINES else objection(flavor, scheme, options)
    if reason is not None:
        # Always name a way out; qdq expresses every scheme.
        flavors = flavors_for(scheme, device)
        ways = f"--flavor {' or '.join(flavors)}"
        # The other flavours dequantize at every run there (README.md).
        if device == "gpu" and PREFERRED["gpu"][0] not in flavors:
            ways += ", which takes about twice the time of float16 on a GPU"
        if "weights_only" in OPTIONS[flavor]:
            ways = f"--weights-only, which leaves the activations unquantized, or {ways}"
        raise MarrqError(
            f"the flavour {flavor} {reason}: the artifact has {scheme.description}; use {ways}"
        )


def written_scheme(scheme: Scheme, options: Options) -> Scheme:
    """The scheme of a file: the artifact's, without its activations if `weights_only` says so."""
    return replace(scheme, activation=None) if options.get("weights_only") else scheme


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
    """Raise MarrqError for an unknown flavour or option, for an option that the flavour does not
    have, and for a value of another kind."""
    # The keys are all flavours, those of float models too.
    if flavor not in OPTIONS:
        raise MarrqError(f"unknown flavour {flavor!r}: choose one of {', '.join(OPTIONS)}")
    for option, value in options.items():
        if option not in FLAGS:
            raise MarrqError(f"unknown option {option!r} of a flavour: {choices(option, FLAGS)}")
        if option not in OPTIONS[flavor]:
            raise MarrqError(
                f"{FLAGS[option]} is no option of {flavor!r}: use it with --flavor "
                f"{' or '.join(flavors_with(option))}"
            )
        is_number = option == "accuracy_level"
        # True is an integer in Python.
        if isinstance(value, bool) == is_number or not isinstance(value, int):
            kind = "a number" if is_number else "True or False"
            raise MarrqError(f"option {option!r} is {kind}: got {value!r}")


def check_baseline(flavor: str) -> None:
    """Raise MarrqError for a name that is no flavour of a float model."""
    if flavor not in BASELINES:
        raise MarrqError(f"unknown baseline {flavor!r}: choose one of {', '.join(BASELINES)}")
