"""Rewrites of a graph, before and behind the lowering of its placeholders.

A pass changes no integer code, and no result beyond the rounding of floating-point sums. Each pass
takes away work that ONNX Runtime would otherwise do for every token. One file is one pass, or a few
passes of one subject. `prepare` runs on the placeholders of a trace, in the order that the passes
need:

    drop_copies            removes nodes that stand between the patterns below
    split_qkv              needs the linear's Reshape and Transpose as the model wrote them
    absorb_scales          after split_qkv: a Mul behind a third of qkv is no pattern of a model
    flatten_patches        independent of the others
    drop_open_masks        before fuse_attention, which would take the mask as an input
    fuse_attention         before attend_on_tokens, which rewrites Attention nodes
    attend_on_tokens       after split_qkv: q, k and v must have Transposes of their own
    name_multi_head        GPU: after attend_on_tokens, whose Attention nodes it renames
    drop_unread_tokens     last: it narrows the queries of an attention on tokens

`finish` runs when every placeholder is a product, and for GPUs alone: it puts products and biases
into operators of ONNX Runtime's own. The CPU has these operators too, but not in less time.

    project_in_attention   the products of q, k and v
    norm_with_residual     the sum with the residual stream, and the bias before it
    gelu_with_bias         the bias before a GELU
"""

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from exporters.passes.attention import attend_on_tokens, fuse_attention
from exporters.passes.bias_gelu import gelu_with_bias
from exporters.passes.copies import drop_copies, drop_open_masks
from exporters.passes.layer_scale import absorb_scales
from exporters.passes.multi_head import name_multi_head, project_in_attention
from exporters.passes.patches import flatten_patches
from exporters.passes.qkv import split_qkv
from exporters.passes.skip_norm import norm_with_residual
from exporters.passes.unread_tokens import drop_unread_tokens


def prepare(model: ir.Model, fuse: bool, device: str = "cpu") -> None:
    """Run the passes on the placeholders of a clone of a traced graph.

    fuse: write attention as one operator. device: of exporters/choices.py.
    """
    graph = model.graph
    # Copies would hide the patterns that the next passes look for.
    drop_copies(graph)
    split_qkv(graph)
    absorb_scales(graph)
    flatten_patches(graph)
    drop_open_masks(graph)
    # Attention needs opset 23, so a flavour must ask for it.
    if fuse:
        fuse_attention(graph)
        attend_on_tokens(graph)
    # Where MultiHeadAttention can do the same, opset 23 is not needed.
    if device == "gpu":
        name_multi_head(graph)
    drop_unread_tokens(graph)
    # The trace of PVT v2 has Identities, of which the CUDA provider has no kernel at opset 21.
    IdentityEliminationPass()(model)
    # drop_unread_tokens leaves the whole linear beside the narrowed one, with no reader.
    RemoveUnusedNodesPass()(model)


def finish(model: ir.Model, device: str) -> None:
    """Run the passes on a lowered graph."""
    if device == "gpu":
        # Each takes a bias that no other pass looks for, so their order is free.
        project_in_attention(model.graph)
        norm_with_residual(model.graph)
        gelu_with_bias(model.graph)
        # What an operator took in has no reader any more.
        RemoveUnusedNodesPass()(model)
