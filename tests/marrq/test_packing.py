"""Packing is dense, reversible, and laid out as its module says."""

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import numpy_helper

from marrq.errors import MarrqError
from marrq.quantizers.packing import pack, packed_size, unpack


def random_codes(num_bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    low = -(2 ** (num_bits - 1))
    return torch.randint(low, -low, shape, generator=torch.Generator().manual_seed(sum(shape))).to(
        torch.int8
    )


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 7), (5, 8), (48, 33), (2, 3, 5), (0, 4)])
def test_unpacking_gives_the_codes_back(num_bits: int, shape: tuple[int, ...]):
    codes = random_codes(num_bits, shape)
    packed = pack(codes, num_bits)
    assert (
        packed.numel()
        == packed_size(codes.numel(), num_bits)
        <= -(-codes.numel() * num_bits // 8) + 1
    )
    assert torch.equal(unpack(packed, num_bits, shape), codes)


@pytest.mark.parametrize(
    ("num_bits", "codes", "expected"),
    [
        (2, [1, 0, -1, -2, 1], [0b10_11_00_01, 0b01]),
        (3, [3, -4, -1, 0, 1], [0b00_11_00_11, 0b01, 0b00110]),
        (4, [7, -8, -1], [0x87, 0x0F]),
        (8, [127, -128, -1], [127, 128, 255]),
    ],
)
def test_the_bytes_are_those_of_the_stated_layout(
    num_bits: int, codes: list[int], expected: list[int]
):
    assert pack(torch.tensor(codes), num_bits).tolist() == expected


@pytest.mark.parametrize(("num_bits", "dtype"), [(2, ml_dtypes.int2), (4, ml_dtypes.int4)])
def test_two_and_four_bits_are_packed_as_onnx_packs_them(num_bits: int, dtype: type):
    codes = random_codes(num_bits, (7, 9))
    assert (
        numpy_helper.from_array(codes.numpy().astype(dtype)).raw_data
        == pack(codes, num_bits).numpy().astype(np.uint8).tobytes()
    )


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(MarrqError, match="got -2 … 4"):
        pack(torch.tensor([-2, 4]), 3)


def test_bytes_that_do_not_fit_the_shape_are_refused():
    with pytest.raises(MarrqError, match="12 codes of 4 bits take 6 bytes: got 5"):
        unpack(torch.zeros(5, dtype=torch.uint8), 4, (3, 4))
