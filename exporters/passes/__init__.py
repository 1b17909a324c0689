"""Rewrites of a traced graph, made on its placeholders before a flavour lowers them.

A pass changes no integer code, and no result beyond the rounding of floating-point sums. Each pass
takes away work that ONNX Runtime would otherwise do for every token. One file is one pass, or a few
passes of one subject; `prepare` runs them in the order that they need:

    drop_copies            removes nodes that stand between the patterns below
    split_qkv              needs the linear's Reshape and Transpose as the model wrote them
    absorb_scales          after split_qkv: a Mul behind a third of qkv is no pattern of a model
    flatten_patches        independent of the others
    drop_open_masks        before fuse_attention, which would take the mask as an input
    fuse_attention         before attend_on_tokens, which rewrites Attention nodes
    attend_on_tokens       after split_qkv: q, k and v must have Transposes of their own
    drop_unread_tokens     last: it narrows the queries of an Attention on tokens
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.passes.attention import attend_on_tokens, fuse_attention
from exporters.passes.copies import drop_copies, drop_open_masks
from exporters.passes.layer_scale import absorb_scales
from exporters.passes.patches import flatten_patches
from exporters.passes.qkv import split_qkv
from exporters.passes.unread_tokens import drop_unread_tokens


def prepare(model: ir.Model, fuse: bool, device: str = "cpu") -> None:
    """Run all passes on a clone of a traced graph.

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
    drop_unread_tokens(graph)
    # drop_unread_tokens leaves the whole linear beside the narrowed one, with no reader.
    RemoveUnusedNodesPass()(model)
