"""Trace a model to a float ONNX graph in which every quantized linear is one placeholder node
`marrq::QuantizedLinear` that carries its module path. A flavour is a lowering of that node; the
graph around it is the same for all.

Whatever does not depend on the images is a constant in it: relative positions that a model makes
anew in each forward, rotary tables."""

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from marrq.errors import MarrqError
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import QuantLinear, quantized_linears

PLACEHOLDER_DOMAIN = "marrq"
PLACEHOLDER = "QuantizedLinear"
INPUT = "pixels"

OPSET = 20
"""The opset of a trace: the lowest that has Gelu."""


class _Placeholder(nn.Module):
    """Stands for a quantized linear in the trace: knows its path and its output's width, nothing
    else."""

    def __init__(self, path: str, out_features: int) -> None:
        super().__init__()
        self.path, self.out_features = path, out_features

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        return torch.onnx.ops.symbolic(
            f"{PLACEHOLDER_DOMAIN}::{PLACEHOLDER}",
            (x,),
            attrs={"path": self.path},
            dtype=x.dtype,
            shape=shape,
            version=1,
        )


def with_placeholders(model: nn.Module) -> nn.Module:
    """A copy of the model in which every QuantLinear is a placeholder."""
    model = copy.deepcopy(model)
    for path, linear in quantized_linears(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _Placeholder(path, len(linear.codes)))
    return model


@dataclass(frozen=True)
class TracedModel:
    """A quantized model and its graph, traced once for all flavours.

    model: what was traced; artifact_hash: of the artifact that the model was read from; graph: the
    float graph with a placeholder for each quantized linear, which nothing changes.
    """

    model: QuantizedModel
    artifact_hash: str
    graph: ir.Model

    @property
    def linears(self) -> dict[str, QuantLinear]:
        """The quantized linears by their module paths, as the placeholders carry them."""
        return quantized_linears(self.model.module)

    def clone(self) -> ir.Model:
        """A copy of the graph that a flavour may rewrite; the constants are shared."""
        return self.graph.clone()


def trace_quantized(model: QuantizedModel, artifact_hash: str) -> TracedModel:
    """Trace a quantized model. Raises MarrqError if torch cannot export it."""
    module = with_placeholders(model.module)
    graph = trace(module, model.preprocessing.input_size, OPSET, model.output)
    return TracedModel(model, artifact_hash, graph)


def trace(
    model: nn.Module, input_size: Sequence[int], opset: int, output: str = "logits"
) -> ir.Model:
    """The graph of a model from float32 `pixels` [batch, channels, height, width] to `output`
    [batch, …], batch dynamic."""
    example = torch.zeros(2, *input_size)
    try:
        # With another kernel the exporter fails to find the strides again that a masked attention
        # gave (timm's BEiT).
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                model.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table={
                    torch.ops.aten.scaled_dot_product_attention.default: _attention
                },
                optimize=False,
                verbose=False,
            )
            if program is not None:
                optimize_ir(program.model, should_fold=lambda node: True)  # constants of any size
    except torch.onnx.OnnxExporterError as error:
        raise MarrqError(
            f"the model cannot be traced to ONNX: {str(error).strip().splitlines()[0]}"
        ) from error
    if program is None:
        raise MarrqError("the model cannot be traced to ONNX: the exporter returned nothing")
    return program.model


def _attention(  # the parameters are those of aten.scaled_dot_product_attention
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(s q kᵀ + mask) v as two products, which `fuse_attention` knows: torch's own
    translation at opsets below 23 moves shapes about at run time, and scales q and k separately."""
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL):
        raise NotImplementedError("causal, grouped or boolean-masked attention")
    op: Any = opset18  # its stubs type tensors by element, which a translation cannot know
    rank = len(query.shape)
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    constant = ir.tensor([factor], dtype=query.dtype)
    scores = op.Mul(op.MatMul(query, transposed), op.Constant(value=constant))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and deprecation messages concern its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
