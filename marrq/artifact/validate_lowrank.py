"""Checks of what a linear of an artifact has beside its codes: the factors L and R, or the second
codes of salient columns. Each raises ValueError, as the checks of validate.py do; a half of a pair
raises KeyError.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from marrq.quantizers.packing import packed_size
from marrq.quantizers.salient import SECOND_BITS


def check_branch(parts: Mapping[str, Tensor], rows: int, columns: int) -> None:
    """Raise ValueError if L [rows, rank], R [rank, columns] or their scales do not fit."""
    if "lowrank_left" not in parts and "lowrank_right" not in parts:
        return
    # A half of a branch raises KeyError here: L without R is no branch.
    left, right = parts["lowrank_left"], parts["lowrank_right"]
    # L decides on the rank; R and the scales must agree.
    rank = left.shape[-1]
    expected = {"lowrank_left": (rows, rank), "lowrank_right": (rank, columns)}
    if left.dtype == torch.int8:
        expected |= {"lowrank_left_scale": (1, rank), "lowrank_right_scale": (rank, 1)}
    if right.dtype != left.dtype or left.dtype not in (torch.int8, torch.float16):
        raise ValueError("lowrank_right is of another type than its linear wants")
    for name, wanted in expected.items():
        if tuple(parts[name].shape) != wanted or math.prod(wanted) == 0:
            raise ValueError(f"{name} does not fit its linear")


def check_salient(parts: Mapping[str, Tensor], num_bits: int, rows: int, columns: int) -> None:
    """Raise ValueError if salient columns do not fit a linear [rows, columns] of b-bit codes."""
    if "salient_columns" not in parts and "salient_packed" not in parts:
        return
    salient, packed = parts["salient_columns"], parts["salient_packed"]
    if num_bits not in SECOND_BITS:
        raise ValueError(f"codes of {num_bits} bits have no second set")
    if salient.dim() != 1 or not 1 <= len(salient) <= columns:
        raise ValueError(f"salient_columns are not 1 to {columns} columns")
    # Ascending, so that no column comes twice; the ends then bound all of them.
    indices = salient.long()
    ascending = bool((indices.diff() > 0).all())
    if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= columns:
        raise ValueError(f"salient_columns do not ascend within 0 … {columns - 1}")
    # The bytes in the file must hold the codes, as of weight_packed.
    second_bits = SECOND_BITS[num_bits]
    size = packed_size(rows * len(salient), second_bits)
    if packed.dim() != 1 or packed.numel() != size:
        raise ValueError(
            f"{rows} × {len(salient)} second codes of {second_bits} bits do not take "
            f"{packed.numel()} bytes"
        )
