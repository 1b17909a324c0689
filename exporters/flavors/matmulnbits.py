"""The matmulnbits flavour: weight-only schemes on ONNX Runtime's own MatMulNBits, which unpacks
low-bit weights as it multiplies.

    x, codes, scales, zero points, bias → MatMulNBits(bits, block_size, accuracy_level)

The operator wants unsigned codes, so codes and zero points are shifted by 2^(bits-1), which leaves
their difference as it is; and a scale and a zero point for each block of 16 to 128 inputs (256 it
has too, but not on all its kernels), so those of a channel or of a larger group are repeated. The
last block is filled up where a row ends within it. Codes of 3 bits go in 4-bit containers.

`accuracy_level` is written into the node, where servers that pass no session options find it too: 1
computes in float32, as a scheme that ends in A16 says; 4 quantizes the activations to int8 on the
way, which is faster and another model than the one that was quantized.

The file is small, the time hardly less than the float model's, a ViT having about 200 rows to
multiply. Measured on a ViT-S of four blocks, batch 1, one thread (ONNX Runtime 1.31.1, AVX-512
VNNI), as a ratio to float32: level 1 takes 0.92 with 4 bits in groups of 128, 1.44 with 8 bits,
1.80 with 2; level 4 0.79 with 4 bits."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.flavors.lowering import (
    ATTENTION_OPSET,
    FUSED_ONNXRUNTIME,
    ONNXRUNTIME_DOMAIN,
    LinearLowering,
    lower,
    with_lowrank,
)
from exporters.trace import OPSET, TracedModel
from marrq.errors import MarrqError
from marrq.quantizers.packing import pack
from marrq.schemes import EDGE_BITS, Scheme

OPERATOR = "MatMulNBits"
BLOCK_SIZES = (128, 64, 32, 16)
ACCURACY_LEVELS = {1: "float32", 4: "int8"}
"""What the operator computes with at each level that the CPU has kernels for."""

CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
LOWEST_ONNXRUNTIME = {2: "1.24.1", 4: "1.19.0", 8: "1.23.0"}
"""First ONNX Runtime that was seen to load a file with such containers, and to give torch's logits
at accuracy level 1."""


@dataclass(frozen=True)
class MatMulNBits:
    """The flavour. accuracy_level: a key of ACCURACY_LEVELS; fuse: as in `Integer`."""

    accuracy_level: int = 1
    fuse: bool = True

    def __post_init__(self) -> None:
        if self.accuracy_level not in ACCURACY_LEVELS:
            levels = " or ".join(
                f"{level} ({numbers})" for level, numbers in ACCURACY_LEVELS.items()
            )
            raise MarrqError(f"the accuracy level must be {levels}: got {self.accuracy_level}")

    def objection(self, scheme: Scheme) -> str | None:
        """Why the flavour cannot express a scheme, or None."""
        if scheme.activation is not None:
            return "needs float activations"
        size = scheme.weight.group_size
        return (
            f"has no group size that is no multiple of {BLOCK_SIZES[-1]}"
            if size is not None and size % BLOCK_SIZES[-1]
            else None
        )

    def container_bits(self, scheme: Scheme) -> int:
        """Bits that a weight code takes in the file."""
        return CONTAINER_BITS[scheme.weight.num_bits]

    def lowest_onnxruntime(self, scheme: Scheme) -> str:
        """First ONNX Runtime that was seen to load such a file and to give the same logits."""
        widths = {self.container_bits(scheme), *([EDGE_BITS] if scheme.edges else [])}
        return FUSED_ONNXRUNTIME if self.fuse else max(LOWEST_ONNXRUNTIME[bits] for bits in widths)

    def lower(self, traced: TracedModel) -> ir.Model:
        """The graph of a quantized model on MatMulNBits."""
        return lower(traced, ATTENTION_OPSET if self.fuse else OPSET, self._product)

    def _product(self, site: LinearLowering) -> ir.Value:
        rows = site.rows
        out_features, in_features = rows.codes.shape
        bits, size = CONTAINER_BITS[rows.num_bits], block_size(in_features // rows.scale.shape[1])
        blocks = -(-in_features // size)
        repeats = blocks // rows.scale.shape[1]
        offset = 2 ** (bits - 1)
        codes = torch.nn.functional.pad(rows.codes.int() + offset, (0, blocks * size - in_features))
        inputs: list[ir.Value | None] = [
            site.x,
            site.constant("weight_codes", _packed(codes, bits).reshape(out_features, blocks, -1)),
            site.constant("weight_scale", rows.scale.repeat_interleave(repeats, 1).numpy()),
            site.constant(
                "weight_zero_point",
                _packed(rows.zero_point.int().repeat_interleave(repeats, 1) + offset, bits),
            ),
        ]
        if rows.bias is not None:  # behind the group index, which is not used
            inputs += [None, site.constant("bias", rows.bias.numpy())]
        attributes = {
            "K": in_features,
            "N": out_features,
            "bits": bits,
            "block_size": size,
            "accuracy_level": self.accuracy_level,
        }
        return with_lowrank(
            site, site.add(OPERATOR, inputs, domain=ONNXRUNTIME_DOMAIN, **attributes)
        )


def block_size(group_size: int) -> int:
    """Inputs in a block: as many as the operator takes and divide a group, the least where none
    does and the last is to be filled up."""
    return next((size for size in BLOCK_SIZES if group_size % size == 0), BLOCK_SIZES[-1])


def _packed(codes: Tensor, bits: int) -> np.ndarray:
    """Unsigned codes [rows, n] to bytes [rows, …], each row from a byte of its own."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (8 // bits)))
    sign = 2 ** (bits - 1)
    return (
        pack((padded ^ sign) - sign, bits).reshape(len(codes), -1).numpy()
    )  # the same bits, read as two's complement
