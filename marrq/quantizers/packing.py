"""Dense packing of signed 2-, 3-, 4- and 8-bit codes into bytes. The layout, stated once:

Codes are flattened row by row. A b-bit code goes in as its low b bits (two's complement), the first
code in the lowest bits of a byte. With 2, 4 and 8 bits this is the layout of ONNX INT2, INT4 and
INT8 tensors. With 3 bits the plane of all low 2-bit parts comes first, then the plane of all high
bits, eight to a byte: each plane can be unpacked by shifts and masks alone. Unused bits at an end
are 0."""

import math

import torch
from torch import Tensor

from marrq.errors import MarrqError

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of each plane, low bits first, by the bits of a code."""


def packed_planes(codes: Tensor, num_bits: int) -> list[Tensor]:
    """One tensor of bytes (uint8, 1-D) a plane. codes: any shape, integers that fit `num_bits`
    bits."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise MarrqError(
            f"codes must lie in {low} … {high} to be packed in {num_bits} bits: got "
            f"{int(codes.min())} … {int(codes.max())}"
        )
    remaining: Tensor = codes.reshape(-1).to(torch.int32) & (2**num_bits - 1)
    planes = []
    for bits in PLANES[num_bits]:
        planes.append(_pack_plane(remaining & (2**bits - 1), bits))
        remaining = remaining >> bits
    return planes


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """All planes of the codes, one after the other: uint8, 1-D."""
    return torch.cat(packed_planes(codes, num_bits))


def unpack(packed: Tensor, num_bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: int8 codes of the given shape. Raises MarrqError when the bytes do not
    fit the shape."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, num_bits):
        raise MarrqError(
            f"{count} codes of {num_bits} bits take {packed_size(count, num_bits)} bytes: got "
            f"{packed.numel()} of {packed.dtype}"
        )
    codes = torch.zeros(count, dtype=torch.int32, device=packed.device)
    start = filled = 0
    for bits in PLANES[num_bits]:
        end = start + _plane_size(count, bits)
        codes |= _unpack_plane(packed[start:end], bits)[:count] << filled
        start, filled = end, filled + bits
    sign = 2 ** (num_bits - 1)
    signed: Tensor = (codes ^ sign) - sign
    return signed.to(torch.int8).reshape(shape)


def packed_size(count: int, num_bits: int) -> int:
    """Bytes that `count` codes take."""
    return sum(_plane_size(count, bits) for bits in PLANES[num_bits])


def _plane_size(count: int, bits: int) -> int:
    return math.ceil(count * bits / 8)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int32, device=device)


def _pack_plane(parts: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(parts, (0, -len(parts) % per_byte))
    placed: Tensor = padded.reshape(-1, per_byte) << _shifts(bits, parts.device)
    return placed.sum(1).to(torch.uint8)


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    shifted: Tensor = packed.to(torch.int32).unsqueeze(1) >> _shifts(bits, packed.device)
    parts: Tensor = shifted & (2**bits - 1)
    return parts.reshape(-1)
