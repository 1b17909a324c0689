"""Dense packing of signed 2-, 3-, 4- and 8-bit codes into bytes.

The layout: codes are flattened row by row. Of a b-bit code the low b bits of its two's complement
are stored, the first code in the lowest bits of a byte.

    2, 4, 8 bits    the layout of ONNX tensors of type INT2, INT4 and INT8
    3 bits          two planes one after the other: the low two bits of every code, four to a byte;
                    then the high bit of every code, eight to a byte

Three bits do not divide a byte, but each plane can be unpacked by shifts and masks alone. Unused
bits at the end of a plane are 0.
"""

import math

import torch
from torch import Tensor

from marrq.errors import MarrqError

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of each plane, low bits first, by the bits of a code."""


def packed_planes(codes: Tensor, num_bits: int) -> list[Tensor]:
    """The planes of the codes, each uint8 [bytes]. codes: integers of any shape.

    Raises MarrqError if a code does not fit in `num_bits` bits.
    """
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise MarrqError(
            f"codes must lie in {low} … {high} to be packed in {num_bits} bits: got "
            f"{int(codes.min())} … {int(codes.max())}"
        )
    # The mask keeps the low bits of the two's complement: -1 becomes 0b11…1.
    remaining: Tensor = codes.reshape(-1).to(torch.int32) & (2**num_bits - 1)
    # Every plane takes the lowest bits that are left of each code.
    planes = []
    for bits in PLANES[num_bits]:
        planes.append(_pack_plane(remaining & (2**bits - 1), bits))
        remaining = remaining >> bits
    return planes


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """All planes of the codes, one after the other: uint8 [bytes].

    Raises MarrqError if a code does not fit in `num_bits` bits.
    """
    return torch.cat(packed_planes(codes, num_bits))


def unpack(packed: Tensor, num_bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: int8 codes of the given shape.

    Raises MarrqError if the number of bytes does not fit the shape.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, num_bits):
        raise MarrqError(
            f"{count} codes of {num_bits} bits take {packed_size(count, num_bits)} bytes: got "
            f"{packed.numel()} of {packed.dtype}"
        )
    # Every plane adds its bits above those that the planes before it have filled.
    codes = torch.zeros(count, dtype=torch.int32, device=packed.device)
    start = filled = 0  # bytes read so far; bits of each code filled so far
    for bits in PLANES[num_bits]:
        end = start + _plane_size(count, bits)
        # [:count] drops the padding of the last byte.
        codes |= _unpack_plane(packed[start:end], bits)[:count] << filled
        start, filled = end, filled + bits
    # Sign extension: flipping the sign bit and subtracting its value maps 2^b - 1 back to -1.
    sign = 2 ** (num_bits - 1)
    signed: Tensor = (codes ^ sign) - sign
    return signed.to(torch.int8).reshape(shape)


def packed_size(count: int, num_bits: int) -> int:
    """Bytes that `count` codes take."""
    return sum(_plane_size(count, bits) for bits in PLANES[num_bits])


def _plane_size(count: int, bits: int) -> int:
    # Planes start at whole bytes, so the last byte of a plane may be padded.
    return math.ceil(count * bits / 8)


def _shifts(bits: int, device: torch.device) -> Tensor:
    # Where the parts of a byte start: 0, 2, 4, 6 for parts of two bits.
    return torch.arange(0, 8, bits, dtype=torch.int32, device=device)


def _pack_plane(parts: Tensor, bits: int) -> Tensor:
    # [parts] becomes [bytes, parts per byte], filled up with zeros.
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(parts, (0, -len(parts) % per_byte))
    # The shifted parts of a byte do not overlap, so their sum is their union.
    placed: Tensor = padded.reshape(-1, per_byte) << _shifts(bits, parts.device)
    return placed.sum(1).to(torch.uint8)


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    # [bytes, 1] shifted by [parts per byte]; the mask removes the parts above.
    shifted: Tensor = packed.to(torch.int32).unsqueeze(1) >> _shifts(bits, packed.device)
    parts: Tensor = shifted & (2**bits - 1)
    return parts.reshape(-1)
