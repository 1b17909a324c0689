"""The tensors of a quantized model as an artifact stores them, and the module from these tensors.

A quantized linear has packed codes, scales and what else it needs, under its path in the model.
README.md in this folder has the list of all parts. Every other tensor of the model keeps its name
and its type.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.files import write_file
from marrq.models.first_last import put_patches
from marrq.quantizers.activations import ActivationQuantizer, Smoothing
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import (
    LowRank,
    QuantizedWeight,
    QuantLinear,
    StoredFactor,
    quantized_linears,
)
from marrq.quantizers.packing import pack, unpack
from marrq.quantizers.salient import SECOND_BITS, join_codes, split_codes
from marrq.schemes import ActivationSpec, Scheme

PACKED = ".weight_packed"
"""Every quantized linear has this part: by it the linears of a file are found."""
OPTIONAL_PARTS = (
    "bias",
    "lowrank_left",
    "lowrank_right",
    "lowrank_left_scale",
    "lowrank_right_scale",
    "salient_columns",
)
"""Buffers of QuantLinear that are stored under their own names unless they are None."""


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a quantized model as the artifact stores them, on the CPU."""
    linears = quantized_linears(module)
    # The buffers of a QuantLinear are in the state dict too, unpacked. They are left out here and
    # come back below, packed.
    tensors = outside(module.state_dict(), linears)
    for path, linear in linears.items():
        tensors |= {f"{path}.{part}": tensor for part, tensor in _parts(linear).items()}
    # safetensors writes the bytes as they lie in memory, and refuses tensors that share it (CoaT's
    # position encoding, one for all blocks of a stage).
    shared = _sharing(tensors)
    return {
        name: tensor.cpu().clone() if name in shared else tensor.cpu().contiguous()
        for name, tensor in tensors.items()
    }


def _sharing(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of tensors whose memory a tensor before them has."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.untyped_storage()._cdata, name)
    return set(tensors) - set(first.values())


def outside(tensors: Mapping[str, Tensor], linears: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors that belong to none of the linears, which are given by path."""
    inside = tuple(f"{path}." for path in linears)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}


def _parts(linear: QuantLinear) -> dict[str, Tensor]:
    """The parts of one linear, by name."""
    weight, quantizer = linear.quantized_weight, linear.input
    # A scale of mxint is a power of two, and its exponent takes one byte.
    is_mxint = weight.spec.grid == "mxint"
    codes, num_bits, salient = weight.codes, weight.spec.num_bits, weight.salient_columns
    second = {}
    # The two codes of a salient column are packed like all codes, each in its own set.
    if salient is not None:
        codes, more = split_codes(codes, salient, num_bits)
        second["salient_packed"] = pack(more, SECOND_BITS[num_bits])
    parts = {
        "weight_packed": pack(codes, num_bits),
        **second,
        "weight_scale": weight.scale.to(torch.float8_e8m0fnu) if is_mxint else weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    # The zero points of the other grids are all 0.
    if weight.spec.grid == "asymmetric":
        parts["weight_zero_point"] = weight.zero_point
    # Presence tells a reader what the linear has: no flags are stored beside the tensors.
    for name in OPTIONAL_PARTS:
        tensor = getattr(linear, name)
        if tensor is not None:
            parts[name] = tensor
    if isinstance(quantizer, Smoothing):
        raise MarrqError(
            "a model without its quantized activations is made for an export and is no artifact: "
            "save the model that it was made from"
        )
    if quantizer is not None:
        parts |= _input_parts(quantizer)
    return parts


def _input_parts(quantizer: ActivationQuantizer) -> dict[str, Tensor]:
    """The parts of the input's quantizer."""
    # Linears that share an input share its quantizer, but safetensors refuses tensors that share
    # memory: hence clone.
    parts = {}
    if quantizer.spec.is_static:
        parts["input_scale"] = quantizer.scale.clone()
        # Activation codes are unsigned, and so is their zero point: it is an integer within 0 … 255
        # that the quantizer keeps in floating point.
        parts["input_zero_point"] = quantizer.zero_point.to(torch.uint8)
    else:
        parts["input_clip"] = quantizer.clip.clone()
    if quantizer.smoothing is not None:
        parts["input_smoothing"] = quantizer.smoothing.clone()
    return parts


def linears_in(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of each quantized linear by name, by the path of the linear."""
    # Sorted, so that the order does not depend on the order of the file.
    paths = {name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)}
    found: dict[str, dict[str, Tensor]] = {path: {} for path in sorted(paths)}
    for name, tensor in tensors.items():
        # A part has no dot in its name, so that the last dot separates path and part.
        path, _, part = name.rpartition(".")
        if path in paths:
            found[path][part] = tensor
    return found


def restore(
    module: nn.Module, tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme]
) -> nn.Module:
    """Put quantized linears and floating-point tensors into an architecture, in place.

    module: the architecture with float linears, whatever their weights.
    tensors: as `tensors_of` returns them.
    schemes: bits and grids of each linear, by path.
    Raises ValueError if the tensors are not those of the architecture.
    """
    linears = linears_in(tensors)
    for path, parts in linears.items():
        # A patch embedding was a convolution before it was quantized (marrq/models/first_last.py).
        parent, _, _ = path.rpartition(".")
        if isinstance(module.get_submodule(parent), nn.Conv2d):
            put_patches(module, parent)
        module.set_submodule(path, _restored_linear(parts, schemes[path]))
    # Not strict, since the quantized linears are missing in `tensors` here; what is missing or left
    # over otherwise is an error below.
    missing, unexpected = module.load_state_dict(outside(tensors, linears), strict=False)
    # The buffers of the quantized linears are in their places already.
    inside = tuple(f"{path}." for path in quantized_linears(module))
    wrong = [name for name in missing if not name.startswith(inside)] + unexpected
    if wrong:
        raise ValueError(f"tensor {wrong[0]!r} does not fit the model")
    return module.eval()


def _restored_linear(parts: Mapping[str, Tensor], scheme: Scheme) -> QuantLinear:
    """The inverse of `_parts`."""
    # The packed codes have no shape of their own: [out, in] is stored beside them.
    rows, columns = parts["weight_shape"].tolist()
    scale = parts["weight_scale"].float()
    codes = unpack(parts["weight_packed"], scheme.weight.num_bits, (rows, columns))
    # A symmetric grid stores no zero points: all of them are 0.
    zero_point = parts.get("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
    salient, num_bits = parts.get("salient_columns"), scheme.weight.num_bits
    if salient is not None:
        shape = (rows, len(salient))
        second = unpack(parts["salient_packed"], SECOND_BITS[num_bits], shape)
        codes = join_codes(codes, second, salient, num_bits)
    weight = QuantizedWeight(scheme.weight, codes, scale, zero_point, salient)
    quantizer = None
    if scheme.activation is not None:
        quantizer = _restored_quantizer(parts, scheme.activation)
    branch = None
    if "lowrank_left" in parts:
        branch = LowRank(_restored_factor(parts, "left"), _restored_factor(parts, "right"))
    return QuantLinear(weight, parts.get("bias"), quantizer, branch)


def _restored_factor(parts: Mapping[str, Tensor], side: str) -> StoredFactor:
    return StoredFactor(parts[f"lowrank_{side}"], parts.get(f"lowrank_{side}_scale"))


def _restored_quantizer(parts: Mapping[str, Tensor], spec: ActivationSpec) -> ActivationQuantizer:
    """The inverse of `_input_parts`."""
    grid: Grid | Tensor
    if spec.is_static:
        zero_point = parts["input_zero_point"].float()
        grid = Grid(parts["input_scale"], zero_point, *spec.code_range)
    else:
        grid = parts["input_clip"]
    return ActivationQuantizer(spec, grid, parts.get("input_smoothing"))


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Put a safetensors file in its place in one step. metadata: texts for the file's header."""

    def write(place: Path) -> None:
        # safetensors makes its file private, whatever the umask: take the mode of any new file.
        # The file is made first, with the mode that the umask gives.
        place.touch()
        mode = place.stat().st_mode
        save_file(tensors, place, metadata)
        place.chmod(mode)

    write_file(file, write)


@contextmanager
def errors_of_writing(what: str, advice: str) -> Iterator[None]:
    """Turn an error of the file system or of safetensors into one sentence.

    what: the thing that is written, for the message.
    advice: what the user can do.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        # `strerror` is the plain reason, such as `No space left on device`; the text of an OSError
        # has number and path too.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MarrqError(f"cannot write {what}: {reason}; {advice}") from error
