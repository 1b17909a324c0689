"""Checks of the numbers of a linear of an artifact, behind those of shapes and types (validate.py):
codes and zero points within their grids, floating-point numbers that are finite, and no part that
the scheme of the linear has no use for. Each raises ValueError, as the checks of validate.py do.
"""

from collections.abc import Mapping

from torch import Tensor

from marrq.artifact.tensors import OPTIONAL_PARTS
from marrq.quantizers.packing import unpack
from marrq.quantizers.salient import stride
from marrq.schemes import Scheme, WeightSpec

ALWAYS = {"weight_packed", "weight_scale", "weight_shape", *OPTIONAL_PARTS, "salient_packed"}
"""Parts that a linear of any scheme may have."""


def check_ranges(parts: Mapping[str, Tensor], scheme: Scheme) -> None:
    """Raise ValueError for a part that the scheme does not have, and for numbers beyond what they
    can be. parts: of one linear, by name, whose shapes and types are right."""
    unknown = sorted(parts.keys() - _parts_of(scheme))
    if unknown:
        raise ValueError(f"{unknown[0]} is no part of a linear of {scheme}")
    for name, tensor in parts.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{name} has NaN or infinity")
    _check_weight(parts, scheme.weight)
    if "input_zero_point" in parts and scheme.activation is not None:
        _check_within("input_zero_point", parts["input_zero_point"], scheme.activation.code_range)


def _parts_of(scheme: Scheme) -> set[str]:
    """The names of all parts that a linear of the scheme may have."""
    found = set(ALWAYS)
    if scheme.weight.grid == "asymmetric":
        found.add("weight_zero_point")
    if scheme.activation is not None:
        static = {"input_scale", "input_zero_point"}
        found |= {"input_smoothing", *(static if scheme.activation.is_static else {"input_clip"})}
    return found


def _check_weight(parts: Mapping[str, Tensor], weight: WeightSpec) -> None:
    low, high = weight.code_range
    # Beside salient columns, zero points count joint codes.
    unit = stride(weight.num_bits) if "salient_packed" in parts else 1
    if "weight_zero_point" in parts:
        _check_within("weight_zero_point", parts["weight_zero_point"], (unit * low, unit * high))
    # Codes of b bits cannot leave the range of b bits, but they can leave a reduced one, within
    # which no kernel saturates.
    if weight.reduce_range:
        rows, columns = parts["weight_shape"].tolist()
        codes = unpack(parts["weight_packed"], weight.num_bits, (rows, columns))
        _check_within("weight_packed", codes, (low, high))


def _check_within(name: str, numbers: Tensor, ends: tuple[int, int]) -> None:
    low, high = ends
    if int(numbers.min()) < low or int(numbers.max()) > high:
        raise ValueError(f"{name} has numbers beyond {low} … {high}")
