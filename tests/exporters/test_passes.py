"""Rewrites of the float remainder change no logits, and take away what they say they do."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
import torch
from flavor_files import slow
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tiny_models import dinov2, distilled, noise, quantized, randomized, swin, transformers_vit, vit
from torch import nn

from exporters.graph import add_constant
from exporters.lowering.linear import LinearLowering, SharedInputs
from exporters.opsets import ATTENTION_OPSET
from exporters.passes.attention import attend_on_tokens, fuse_attention
from exporters.passes.copies import drop_copies, drop_open_masks
from exporters.passes.layer_scale import absorb_scales
from exporters.passes.patches import flatten_patches
from exporters.passes.qkv import split_qkv
from exporters.passes.unread_tokens import drop_unread_tokens
from exporters.trace import (
    INPUT,
    OUTPUT_SCALE,
    PART,
    PATH,
    PLACEHOLDER_DOMAIN,
    TracedModel,
    placeholders,
    trace,
    trace_quantized,
)
from marrq.models.first_last import put_patches
from marrq.quantizers.linear import quantized_linears


def averaged() -> nn.Module:
    return vit(global_pool="avg")


Passes = tuple[Callable[[ir.Graph], None], ...]
FUSED: Passes = (drop_open_masks, fuse_attention, attend_on_tokens)


def rewritten(model: nn.Module, *passes: Callable[[ir.Graph], None], size: int = 32) -> ir.Model:
    traced = trace(model, (3, size, size), ATTENTION_OPSET)
    for rewrite in passes:
        rewrite(traced.graph)
    RemoveUnusedNodesPass()(traced)
    return traced


def assert_the_logits_stay(model: nn.Module, traced: ir.Model, size: int = 32) -> None:
    pixels = noise(3)[..., :size, :size]
    session = ort.InferenceSession(
        ir.to_proto(traced).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        np.testing.assert_allclose(
            session.run(None, {INPUT: pixels.numpy()})[0],
            model(pixels).numpy(),
            rtol=1e-4,
            atol=1e-4,
        )


def tokens_of(traced: ir.Model, op_type: str) -> list[object]:
    """Length of the token axis at each operator of a kind, in order."""
    return [
        node.outputs[0].shape[1]
        for node in traced.graph
        if node.op_type == op_type and node.outputs[0].shape is not None
    ]


@pytest.mark.slow
def test_attention_takes_and_gives_tokens_without_a_transpose():
    model = transformers_vit()
    traced = rewritten(model, *FUSED)
    assert [
        node.attributes["perm"].as_ints() for node in traced.graph if node.op_type == "Transpose"
    ] == [(0, 2, 1)]  # of the patches
    assert_the_logits_stay(model, traced)


@pytest.mark.parametrize(("make", "name"), [slow(transformers_vit, "vit"), (dinov2, "dinov2")])
def test_patches_that_a_linear_reads_are_moved_once(make: Callable[[], nn.Module], name: str):
    model = make()
    put_patches(model, f"model.{name}.embeddings.patch_embeddings.projection")
    traced = rewritten(model, *FUSED, flatten_patches)
    assert [
        node.attributes["perm"].as_ints() for node in traced.graph if node.op_type == "Transpose"
    ] == [(0, 2, 4, 1, 3, 5)]
    assert_the_logits_stay(model, traced)


@pytest.mark.parametrize(
    ("make", "read", "fused"),
    [
        (distilled, 2, FUSED),
        slow(distilled, 2, ()),
        slow(vit, 1, ()),
        slow(vit, 1, FUSED),
        slow(transformers_vit, 1, ()),
        slow(transformers_vit, 1, FUSED),
    ],
)
def test_behind_the_last_attention_only_tokens_that_are_read_are_computed(
    make: Callable[[], nn.Module], read: int, fused: tuple[Callable[[ir.Graph], None], ...]
):
    model = make()
    traced = rewritten(model, *fused, drop_unread_tokens)
    assert tokens_of(traced, "Gelu") == [16 + read, read]
    assert_the_logits_stay(model, traced)


@pytest.mark.slow
def test_queries_of_tokens_that_are_not_read_are_not_made():
    traced = rewritten(transformers_vit(), *FUSED, drop_unread_tokens)
    last = [node for node in traced.graph if node.op_type == "Attention"][-1]
    assert [
        value.shape[1] for value in last.inputs if value is not None and value.shape is not None
    ] == [1, 17, 17]


@pytest.mark.slow
def test_where_the_head_reads_the_mean_of_all_tokens_nothing_is_dropped():
    model = averaged()
    assert tokens_of(rewritten(model, *FUSED, drop_unread_tokens), "Gelu") == [17, 17]


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (vit, 0),
        slow(distilled, 0),
        slow(transformers_vit, 0),
        slow(dinov2, 0),
        slow(swin, 2),
    ],
)
def test_attention_becomes_one_operator_unless_its_mask_differs_from_window_to_window(
    make: Callable[[], nn.Module], plain: int
):
    model = make()
    traced = rewritten(model, *FUSED)
    kinds = [node.op_type for node in traced.graph]
    assert (kinds.count("Attention"), kinds.count("Softmax")) == (2, plain)
    assert_the_logits_stay(model, traced)


def test_a_mask_that_hides_a_token_stays():
    for condition, left in (
        (np.array([[True, False], [True, True]]), 1),
        (np.ones((2, 2), bool), 0),
    ):
        graph = ir.Graph([], [], nodes=[], opset_imports={"": ATTENTION_OPSET})
        given = [condition, np.float32(0), np.float32(-1e38), np.zeros((1, 1, 2, 2), np.float32)]
        seen, zero, hidden, scores = (
            add_constant(graph, f"given_{index}", np.asarray(array))
            for index, array in enumerate(given)
        )
        mask = ir.node("Where", [seen, zero, hidden])
        masked = ir.node("Add", [scores, mask.outputs[0]])
        graph.extend([mask, masked, ir.node("Softmax", masked.outputs)])
        drop_open_masks(graph)
        assert sum(node.op_type == "Add" for node in graph) == left


def test_a_mask_whose_value_for_visible_tokens_is_computed_stays():
    bias = ir.val("bias")
    graph = ir.Graph([bias], [], nodes=[], opset_imports={"": ATTENTION_OPSET})
    given = [np.ones((2, 2), bool), np.float32(-1e38), np.zeros((1, 1, 2, 2), np.float32)]
    seen, hidden, scores = (
        add_constant(graph, f"given_{index}", np.asarray(array))
        for index, array in enumerate(given)
    )
    mask = ir.node("Where", [seen, bias, hidden])
    masked = ir.node("Add", [scores, mask.outputs[0]])
    graph.extend([mask, masked])
    drop_open_masks(graph)
    assert masked in graph


def path_of(node: ir.Node) -> str:
    return node.attributes[PATH].as_string()


def with_float_linears(traced: TracedModel, graph: ir.Model) -> ir.Model:
    """The graph with a float product of LinearSlice's tensors in the place of each placeholder."""
    linears = quantized_linears(traced.model.module)
    for node in placeholders(graph.graph):
        linear = LinearLowering(graph.graph, node, linears[path_of(node)], SharedInputs())
        rows = linear.slice
        weight = (rows.codes - rows.zero_point.float()) * rows.scale
        product = linear.add(
            "MatMul", [linear.x, linear.constant("w", weight.T.contiguous().numpy())]
        )
        assert rows.bias is not None
        y = linear.add("Add", [product, linear.constant("b", rows.bias.numpy())])
        y.shape, y.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(
            graph.graph, node, [node], linear.nodes, node.outputs, [y]
        )
    del graph.opset_imports[PLACEHOLDER_DOMAIN]
    return graph


@pytest.fixture(scope="module")
def layer_scaled() -> TracedModel:
    module = vit(init_values=1e-5, depth=1)
    return trace_quantized(quantized(module, noise(8), "W8A16", "rtn"), "hash")


@pytest.mark.parametrize("rewrite", [split_qkv, absorb_scales])
def test_a_pass_on_linears_changes_no_logits(
    rewrite: Callable[[ir.Graph], None], layer_scaled: TracedModel
):
    graph = layer_scaled.clone()
    rewrite(graph.graph)
    assert_the_logits_stay(layer_scaled.model.module, with_float_linears(layer_scaled, graph))


def test_a_fused_projection_becomes_three_and_needs_no_slices(layer_scaled: TracedModel):
    graph = layer_scaled.clone().graph
    before = len(placeholders(graph))
    split_qkv(graph)
    after = placeholders(graph)
    assert len(after) == before + 2
    parts = [node.attributes[PART].as_string() for node in after if PART in node.attributes]
    assert parts == [*"qkv"]

    assert not {"Slice", "Squeeze"}.intersection(node.op_type for node in graph)


def test_layer_scale_leaves_the_graph(layer_scaled: TracedModel):
    graph = layer_scaled.clone().graph
    absorb_scales(graph)
    scaled = [path_of(node) for node in placeholders(graph) if OUTPUT_SCALE in node.attributes]
    assert scaled == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]


def swin_v2() -> nn.Module:
    arguments = {
        "img_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (2,),
        "num_heads": (2,),
        "window_size": 4,
    }
    return randomized(timm.create_model("swinv2_tiny_window8_256", num_classes=5, **arguments))


@pytest.mark.slow
def test_operators_that_only_copy_go():
    model = swin_v2()
    before, after = (
        [node.op_type for node in rewritten(model, *passes, size=16).graph]
        for passes in ((), (drop_copies,))
    )
    assert (before.count("Pad"), before.count("Expand")) == (2, 4)
    assert (after.count("Pad"), after.count("Expand")) == (0, 0)
    assert_the_logits_stay(model, rewritten(model, drop_copies, size=16), size=16)


def test_a_pad_that_adds_something_stays_and_so_does_an_expand_that_gives_the_shape():
    graph = ir.Graph([], [], nodes=[], opset_imports={"": ATTENTION_OPSET})
    row, column, shape = (
        add_constant(graph, f"given_{index}", array)
        for index, array in enumerate(
            (np.ones((1, 3), np.float32), np.ones((2, 1), np.float32), np.array([2, 3]))
        )
    )
    padded = ir.node("Pad", [row, add_constant(graph, "pads", np.array([0, 0, 1, 0]))])
    expanded = ir.node("Expand", [row, shape])
    expanded.outputs[0].shape = ir.Shape([2, 3])
    graph.extend([padded, expanded, ir.node("Add", [expanded.outputs[0], column])])
    drop_copies(graph)
    assert [node.op_type for node in graph] == ["Pad", "Expand", "Add"]


@pytest.mark.slow
def test_what_does_not_depend_on_the_images_is_a_constant_in_the_graph():
    """Swin v2 makes relative positions by an MLP in every forward: no Relu of it, no gathering, no
    sigmoid is left."""
    model = swin_v2()
    traced = rewritten(model, size=16)
    assert not {"Relu", "GatherND", "Gather", "Sigmoid"}.intersection(
        node.op_type for node in traced.graph
    )
    assert_the_logits_stay(model, traced, size=16)
