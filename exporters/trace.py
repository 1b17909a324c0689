"""From a torch model to a float ONNX graph in which every quantized linear is one placeholder.

A placeholder is a node `marrq::QuantizedLinear` that carries its module path. A flavour lowers each
placeholder to operators that ONNX Runtime knows (exporters/flavors); the graph around the
placeholders is the same for all flavours, so a model is traced once.

Whatever does not depend on the images becomes a constant: relative positions that a model computes
in each forward, rotary tables.
"""

import ast
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

from exporters.opsets import OPSET
from marrq.errors import MarrqError
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import quantized_linears

PLACEHOLDER_DOMAIN = "marrq"
PLACEHOLDER = "QuantizedLinear"

PATH, PART, OUTPUT_SCALE = "path", "part", "output_scale"
"""Attributes of a placeholder.

path: the linear's module path.
part: q, k or v for a third of a fused linear's rows (exporters/passes/qkv.py); else absent.
output_scale: [out], multiplies the output (exporters/passes/layer_scale.py); else absent.
"""

PARTS = "qkv"
"""Parts of a fused linear in the order of its rows."""

INPUT = "pixels"

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node in torch's trace: the modules around the node, outermost first, then the node
itself, as a Python list in text form."""


@dataclass(frozen=True)
class TracedModel:
    """A quantized model and its graph, traced once for all flavours.

    model: the model that was traced.
    artifact_hash: of the artifact that holds the model.
    graph: the float graph with a placeholder for each quantized linear. Nothing changes it.
    """

    model: QuantizedModel
    artifact_hash: str
    graph: ir.Model

    def clone(self) -> ir.Model:
        """A copy of the graph that a flavour may rewrite. Constants are shared, not copied."""
        return self.graph.clone()


def trace_quantized(model: QuantizedModel, artifact_hash: str) -> TracedModel:
    """Trace a quantized model. Raises MarrqError if torch cannot export it."""
    # Without placeholders the trace would dequantize every weight and lose its codes.
    module = with_placeholders(model.module)
    graph = trace(module, model.preprocessing.input_size, OPSET, model.outputs)
    return TracedModel(model, artifact_hash, graph)


def modules_of(node: ir.Node) -> list[str]:
    """Paths of the modules that a node was traced in, outermost first; none if the trace does not
    say."""
    # The last item is the node itself.
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return scopes[:-1]


def placeholders(graph: ir.Graph) -> list[ir.Node]:
    """The quantized linears of a traced graph, in its order."""
    return [
        node for node in graph if node.op_type == PLACEHOLDER and node.domain == PLACEHOLDER_DOMAIN
    ]


def placeholder(whole: ir.Node, part: str, name: str) -> ir.Node:
    """A placeholder for a part of the rows of another one, on the same input."""
    attributes = {PATH: whole.attributes[PATH].as_string(), PART: part}
    node = ir.node(
        PLACEHOLDER, whole.inputs, domain=PLACEHOLDER_DOMAIN, attributes=attributes, name=name
    )
    node.outputs[0].name, node.outputs[0].type = name, whole.outputs[0].type
    return node


class _Placeholder(nn.Module):
    """Stands for a quantized linear in the trace; knows its path and the width of its output."""

    weight: Tensor

    def __init__(self, path: str, out_features: int) -> None:
        super().__init__()
        self.path, self.out_features = path, out_features
        # Models ask a linear for the type and the device of its weight.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # A node that torch does not know: its output is described, never computed.
        return torch.onnx.ops.symbolic(
            f"{PLACEHOLDER_DOMAIN}::{PLACEHOLDER}",
            (x,),
            attrs={PATH: self.path},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


def with_placeholders(model: nn.Module) -> nn.Module:
    """A copy of the model in which every QuantLinear is a placeholder."""
    # The model of the caller keeps its quantized linears.
    model = copy.deepcopy(model)
    for path, linear in quantized_linears(model).items():
        model.set_submodule(path, _Placeholder(path, len(linear.codes)))
    return model


def trace(
    model: nn.Module, input_size: Sequence[int], opset: int, outputs: Sequence[str] = ("logits",)
) -> ir.Model:
    """The graph of a model, from `pixels` to its outputs.

    pixels: float32 [batch, channels, height, width]; the batch is dynamic.
    outputs: names in order; each is [batch, …].
    input_size: channels, height, width.
    Raises MarrqError if torch cannot export the model.
    """
    # A batch of 1 would be traced as a constant.
    example = torch.zeros(2, *input_size)
    try:
        # With another kernel the exporter cannot reproduce the strides of a masked attention's
        # output (timm's BEiT).
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                model.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table={
                    torch.ops.aten.scaled_dot_product_attention.default: _attention
                },
                optimize=False,
                verbose=False,
            )
            if program is not None:
                # Fold constants of any size: relative positions and rotary tables are large.
                optimize_ir(program.model, should_fold=lambda node: True)
    except torch.onnx.OnnxExporterError as error:
        raise MarrqError(f"the model cannot be traced to ONNX: {_reason(error)}") from error
    if program is None:
        raise MarrqError("the model cannot be traced to ONNX: the exporter returned nothing")
    _drop_notes(program.model)
    return program.model


def _drop_notes(model: ir.Model) -> None:
    """Drop what the exporter notes of its own work, such as stack traces, which hold paths of this
    machine. The modules of a node stay: a message about the node names them."""
    owners: list[ir.Model | ir.Graph | ir.Value] = [model, model.graph, *model.graph.inputs]
    owners += model.graph.initializers.values()
    for node in model.graph.all_nodes():
        kept = {key: text for key, text in node.metadata_props.items() if key == SCOPES}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        owners += node.outputs
    for owner in owners:
        owner.metadata_props.clear()
        owner.doc_string = None


RANDOM = ("rand", "rand_like", "randn", "randn_like", "randint", "randperm", "bernoulli", "normal")
"""Operators of aten that draw random numbers."""


def check_traceable(module: nn.Module, input_size: Sequence[int]) -> None:
    """Raise MarrqError if torch cannot trace a float model: then no flavour could be written.

    It is the first of the exporter's three steps, and the one that a model can fail at.
    """
    # A forward may change what the module keeps, so it runs on a copy that shares the weights.
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, shared)
    device = next(module.parameters()).device
    example = torch.zeros(2, *input_size, device=device)
    try:
        with _quiet(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            batch = torch.export.Dim("batch")
            # What the exporter tries first, without its other attempts.
            dynamic = ({0: batch},)
            traced = torch.export.export(copied, (example,), dynamic_shapes=dynamic, strict=False)
    # Whatever a forward raises if its tensors have no values.
    except Exception as error:
        raise MarrqError(
            f"the model cannot be traced to ONNX, so it is not quantized: {_reason(error)}"
        ) from error
    # Random numbers inside a forward, as for the masks of ViT-MAE: no two runs are alike.
    for node in traced.graph.nodes:
        # The target of an operator is written as "aten.rand.default".
        if str(node.target).startswith(tuple(f"aten.{name}." for name in RANDOM)):
            raise MarrqError(
                f"the model draws random numbers in its forward ({node.target}), so it is not "
                "quantized: give a model without them, such as the encoder of a masked "
                "auto-encoder (marrq/models/README.md)"
            )


def _reason(error: BaseException) -> str:
    """The first line of the error that caused all others."""
    # torch's own messages tell how torch is to be debugged.
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
    """softmax(s q kᵀ + mask) v as two products, the pattern that `fuse_attention` knows.

    torch's own translation for opsets below 23 computes shapes at run time, and scales q and k
    separately.
    """
    # A wrong graph would be worse than none.
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL):
        raise NotImplementedError("causal, grouped or boolean-masked attention")
    op: Any = opset18  # its stubs type tensors by element, which a translation cannot know
    # [b, h, n, d] → [b, h, d, n]
    rank = len(query.shape)
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    # torch scales by 1 / √d unless it is told otherwise.
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    constant = ir.tensor([factor], dtype=query.dtype)
    scores = op.Mul(op.MatMul(query, transposed), op.Constant(value=constant))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and deprecation messages, which concern its developers."""
    # Levels are restored: they are global to the process.
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
