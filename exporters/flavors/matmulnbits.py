"""The matmulnbits flavour: weight-only schemes on ONNX Runtime's own MatMulNBits, which unpacks
low-bit weights while it multiplies.

    x, codes, scales, zero points, bias → MatMulNBits(bits, block_size, accuracy_level)

What the operator wants:

    unsigned codes       codes and zero points are shifted by 2^(bits-1), which keeps q - z
    blocks of 16 to 128  inputs, each with a scale and a zero point: those of a channel or of a
                         larger group are repeated. 256 exists too, but not on all kernels.
                         If a row ends within its last block, the block is filled up.
    2, 4 or 8 bits       codes of 3 bits go in 4-bit containers, and so do those of 2 bits for a
                         GPU, whose kernel for 2 bits gave wrong numbers until September 2026

Salient columns (`lowrank=serq`) have codes of 4 to 7 bits, which do not fit the blocks of the
others. A Gather takes their inputs, and a second node multiplies them.

`accuracy_level` is written into the node, so that servers that pass no session options find it too.
Level 1 computes in float32, as a scheme that ends in A16 says. Level 4 quantizes the activations to
int8 on the way: it is faster, and another model than the one that was quantized.

The file is small, but the time is hardly less than the float model's, since a ViT has about 200
rows to multiply. Measured on a ViT-S of four blocks, batch 1, one thread, as a ratio to float32
(ONNX Runtime 1.31.1, AVX-512 VNNI): level 1 takes 0.92 with 4 bits in groups of 128, 1.44 with 8
bits, 1.80 with 2 bits; level 4 takes 0.79 with 4 bits.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.choices import LEAST_BLOCK
from exporters.lowering.linear import LinearLowering, LoweredModel, Target, lower
from exporters.lowering.lowrank import with_lowrank
from exporters.opsets import ONNXRUNTIME_DOMAIN, OPSET
from exporters.trace import TracedModel
from marrq.errors import MarrqError
from marrq.quantizers.packing import pack
from marrq.quantizers.salient import stride
from marrq.schemes import OUTER_BITS, Scheme

OPERATOR = "MatMulNBits"
BLOCK_SIZES = (128, 64, 32, LEAST_BLOCK)

ACCURACY_LEVELS = {1: "float32", 4: "int8"}
"""What the operator computes with, for each level that the CPU has kernels for."""

CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
"""Bits that a code takes in a file for a CPU, by the bits of the code."""

LEAST_BITS = {"cpu": 2, "gpu": 4}
"""Bits of the smallest containers that a device multiplies right."""

LOWEST_ONNXRUNTIME = {2: "1.24.1", 4: "1.19.0", 8: "1.23.0"}
"""First ONNX Runtime that runs such containers at accuracy level 1 with torch's logits."""


@dataclass(frozen=True)
class MatMulNBits:
    """The flavour. accuracy_level: a key of ACCURACY_LEVELS. fuse: attention as one operator."""

    accuracy_level: int = 1
    fuse: bool = True

    def __post_init__(self) -> None:
        if self.accuracy_level not in ACCURACY_LEVELS:
            known = (f"{level} ({numbers})" for level, numbers in ACCURACY_LEVELS.items())
            raise MarrqError(
                f"the accuracy level must be {' or '.join(known)}: got {self.accuracy_level}"
            )

    def container_bits(self, scheme: Scheme, device: str) -> int:
        """Bits that one weight code takes in the file."""
        return _container_bits(scheme.weight.num_bits, device)

    def lowest_onnxruntime(self, scheme: Scheme, has_salient: bool) -> str:
        """First ONNX Runtime that was seen to run such linears."""
        # Patch embedding and head may be wider than the blocks of the model, and so are the joint
        # codes of salient columns.
        is_wide = scheme.outer_layers or (has_salient and scheme.weight.num_bits > 2)
        widths = {self.container_bits(scheme, "cpu"), *([OUTER_BITS] if is_wide else [])}
        return max(LOWEST_ONNXRUNTIME[bits] for bits in widths)

    def lower(self, traced: TracedModel, device: str) -> LoweredModel:
        """The graph on MatMulNBits."""
        # Containers are plain uint8 tensors, which ask for no later opset.
        target = Target(OPSET, device, self.fuse)
        return lower(traced, target, partial(self._linear, device))

    def _linear(self, device: str, linear: LinearLowering) -> ir.Value:
        rows = linear.slice
        bias = None if rows.bias is None else linear.constant("bias", rows.bias.numpy())
        if rows.salient is not None:
            return self._with_salient(linear, rows.salient, bias, device)
        bits = _container_bits(rows.num_bits, device)
        weight = _Codes("weight", rows.codes, rows.scale, rows.zero_point, bits)
        return with_lowrank(linear, linear.x, self._product(linear, linear.x, weight, bias))

    def _with_salient(
        self, linear: LinearLowering, salient: Tensor, bias: ir.Value | None, device: str
    ) -> ir.Value:
        """Two products: of all inputs, in which the salient ones have weights of 0, and of the
        salient inputs with their joint codes."""
        rows = linear.slice
        # One scale serves columns from all over the weight, so it must be that of the row.
        if rows.groups > 1:
            raise MarrqError(
                f"{linear.path!r} has salient columns and group scales, which MatMulNBits cannot "
                "hold together: use --flavor qdq"
            )
        others, step = rows.codes.clone(), stride(rows.num_bits)
        # The weight of a zero point is 0. Both are multiples of the stride then.
        others[:, salient] = rows.zero_point
        first = _Codes(
            "weight",
            others.int() // step,
            rows.scale * step,
            rows.zero_point.int() // step,
            _container_bits(rows.num_bits, device),
        )
        second = _Codes(
            "salient",
            rows.codes[:, salient],
            rows.scale,
            rows.zero_point,
            4 if rows.code_bits <= 4 else 8,
        )
        columns = linear.weight_constant("salient_columns", salient.numpy())
        chosen = linear.add("Gather", [linear.x, columns], axis=-1)
        products = [
            self._product(linear, linear.x, first, bias),
            self._product(linear, chosen, second, None),
        ]
        return linear.add("Add", products)

    def _product(
        self, linear: LinearLowering, x: ir.Value, weight: "_Codes", bias: ir.Value | None
    ) -> ir.Value:
        """The node, and the constants of its weight."""
        # The grid of the artifact in the terms of the operator.
        (out_features, in_features), groups = weight.codes.shape, weight.scale.shape[1]
        bits, size = weight.bits, block_size(in_features // groups)
        blocks = -(-in_features // size)
        offset, repeats = 2 ** (bits - 1), blocks // groups
        # Unsigned codes; zeros fill up the last block, and their inputs do not exist.
        padding = (0, blocks * size - in_features)
        codes = torch.nn.functional.pad(weight.codes.int() + offset, padding)
        # Scale and zero point of a group or channel, once for each of its blocks: [rows, blocks]
        scale = weight.scale.repeat_interleave(repeats, 1)
        zero_point = weight.zero_point.int().repeat_interleave(repeats, 1) + offset
        # [rows, blocks, bytes of a block]
        packed = _packed(codes, bits).reshape(out_features, blocks, -1)
        inputs: list[ir.Value | None] = [
            x,
            linear.weight_constant(f"{weight.name}_codes", packed),
            linear.weight_constant(f"{weight.name}_scale", scale.numpy()),
            linear.weight_constant(f"{weight.name}_zero_point", _packed(zero_point, bits)),
        ]
        if bias is not None:
            # None: the index of groups in act order, which the codes do not need.
            inputs += [None, bias]
        # K, N: depth and width of the product, as the operator calls them.
        return linear.add(
            OPERATOR,
            inputs,
            domain=ONNXRUNTIME_DOMAIN,
            K=in_features,
            N=out_features,
            bits=bits,
            block_size=size,
            accuracy_level=self.accuracy_level,
        )


@dataclass(frozen=True)
class _Codes:
    """A weight [rows, n] of one node.

    name: its constants' names begin with it. codes: [rows, n]; scale, zero_point: [rows, groups].
    bits: of a code in the file.
    """

    name: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int


def _container_bits(num_bits: int, device: str) -> int:
    return max(CONTAINER_BITS[num_bits], LEAST_BITS[device])


def block_size(group_size: int) -> int:
    """The largest block that divides a group; else the smallest, whose last block is filled up."""
    # Larger blocks have fewer scales to store and to multiply by.
    return next((size for size in BLOCK_SIZES if group_size % size == 0), BLOCK_SIZES[-1])


def _packed(codes: Tensor, bits: int) -> np.ndarray:
    """Unsigned codes [rows, n] as bytes [rows, …]; each row begins with a byte of its own."""
    # Fill up the last byte of each row.
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (8 // bits)))
    # `pack` takes signed codes: the same bits, read as two's complement.
    sign = 2 ** (bits - 1)
    return pack((padded ^ sign) - sign, bits).reshape(len(codes), -1).numpy()
