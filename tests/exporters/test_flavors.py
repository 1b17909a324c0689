"""A flavour refuses what it cannot express, and a file asks of a runtime no more than it needs."""

from pathlib import Path

import onnx
import pytest
from flavor_files import agree, metadata, slow, traced
from timm.models.mlp_mixer import MlpMixer
from tiny_models import noise, quantized, randomized

from exporters.choices import (
    BASELINES,
    FLAGS,
    FLAVOR_HELP,
    OBJECTIONS,
    OPTION_HELP,
    OPTIONS,
    check_choice,
    check_scheme,
    flavors_for,
    objection,
    suitable_flavor,
    written_scheme,
)
from exporters.flavors import FLAVORS, check_flavor, variants
from exporters.flavors.floating import FLOAT_FLAVORS
from exporters.flavors.matmulnbits import LOWEST_ONNXRUNTIME
from exporters.onnx_file import write
from exporters.opsets import ATTENTION_OPSET, FUSED_ONNXRUNTIME, IR_VERSIONS
from exporters.trace import trace_quantized
from marrq.errors import MarrqError
from marrq.quantizers.linear import bits_per_weight
from marrq.schemes import ActivationStrategy, parse_scheme
from runtime.audit.nodes import attribute

SYMMETRIC = {"symmetric": True}


@pytest.mark.parametrize(
    ("flavor", "scheme", "strategy", "opset"),
    [
        slow("integer", "W3A8", "per-tensor", 23),
        ("integer", "W2A8", "per-token", 25),
        ("qdq", "W3A8", "per-tensor", 20),
        slow("qdq", "W8A8", "per-tensor", 20),
        slow("qdq", "W8A16", "per-tensor", 21),
        ("qdq", "W2A8", "per-token", 25),
        slow("matmulnbits", "W4A16", "per-tensor", 23),
    ],
)
def test_a_file_asks_for_no_more_than_it_needs_and_counts_its_own_bits(
    flavor: str, scheme: str, strategy: ActivationStrategy, opset: int, tmp_path: Path
):
    trace = traced("vit", scheme, strategy=strategy)
    made = trace.model
    write(trace, flavor, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == opset
    assert graph.ir_version == IR_VERSIONS[opset]
    # Attention, and INT2, are of that release.
    lowest = metadata(tmp_path / "m.onnx")["lowest_onnxruntime"]
    assert (lowest == FUSED_ONNXRUNTIME) == (opset >= ATTENTION_OPSET)
    assert metadata(tmp_path / "m.onnx")["flavor"] == flavor
    assert float(metadata(tmp_path / "m.onnx")["bits_per_weight"]) == pytest.approx(
        bits_per_weight(made.module), abs=0.05
    )


@pytest.mark.parametrize(
    ("flavor", "scheme", "strategy", "opset", "lowest"),
    [
        ("integer", "W3A8", "per-tensor", 20, "1.21.0"),
        slow("integer", "W4A8", "per-token", 21, "1.23.0"),
        slow("matmulnbits", "W4A16", "per-tensor", 20, "1.19.0"),
        slow("matmulnbits", "W4A16-e8", "per-tensor", 20, "1.23.0"),
    ],
)
def test_without_fusion_a_file_asks_for_an_older_onnx_runtime_and_gives_the_same_logits(
    flavor: str, scheme: str, strategy: ActivationStrategy, opset: int, lowest: str, tmp_path: Path
):
    trace = traced("vit", scheme, strategy=strategy)
    made = trace.model
    write(trace, flavor, tmp_path / "m.onnx", {"fuse": False})
    graph = onnx.load(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == opset
    assert metadata(tmp_path / "m.onnx")["lowest_onnxruntime"] == lowest
    assert agree(made, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("flavor", "scheme", "lowest"),
    [("integer", "W3A8", "1.21.0"), ("matmulnbits", "W4A16", "1.19.0")],
)
def test_a_model_without_attention_asks_for_no_onnx_runtime_that_has_it(
    flavor: str, scheme: str, lowest: str, tmp_path: Path
):
    mixer = MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    made = quantized(randomized(mixer), noise(4), scheme, "rtn")
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 20
    assert metadata(tmp_path / "m.onnx")["lowest_onnxruntime"] == lowest
    assert agree(made, tmp_path / "m.onnx")


REFUSALS = [
    (
        "integer",
        {},
        "W4A16",
        "per-tensor",
        "integer needs quantized activations: the artifact has W4A16; use --flavor matmulnbits or "
        "qdq",
    ),
    (
        "integer",
        {},
        "W4A8-g8",
        "per-token",
        "than the float model: the artifact has W4A8-g8 per-token; use --flavor qdq",
    ),
    (
        "matmulnbits",
        {},
        "W4A8",
        "per-tensor",
        "matmulnbits needs float activations: the artifact has W4A8 per-tensor; use --flavor "
        "integer",
    ),
    (
        "matmulnbits",
        {},
        "W4A16-g8",
        "per-tensor",
        "needs groups in multiples of 16 inputs: the artifact has W4A16-g8; use --flavor qdq",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W4A16",
        "per-tensor",
        "needs zero points of 0 (quantize with --scheme W8A8-sym, or W4A16-g128-sym): the artifact",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W4A8-sym",
        "per-token",
        "needs static activations (quantize with --activations per-tensor): the artifact has",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W8A4-sym",
        "per-tensor",
        "needs activations of 8 bits (quantize with --scheme W8A8-sym): the artifact has W8A4-sym ",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W4A8-g8-sym",
        "per-tensor",
        "takes no group scales for 8-bit weights and beside quantized activations (quantize with ",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W8A16-g8-sym",
        "per-tensor",
        "takes no group scales for 8-bit weights and beside quantized activations (quantize with ",
    ),
    (
        "integer",
        SYMMETRIC,
        "W4A8",
        "per-tensor",
        "--symmetric is no option of 'integer': use it with --flavor qdq",
    ),
    (
        "folded",
        {},
        "W4A8",
        "per-token",
        "runs activations in float: the artifact has W4A8 per-token; use --weights-only, which "
        "leaves the activations unquantized, or --flavor integer or qdq",
    ),
    (
        "integer",
        {"weights_only": True},
        "W4A8",
        "per-tensor",
        "--weights-only is no option of 'integer': use it with --flavor folded",
    ),
    (
        "fp32",
        {"accuracy_level": 1},
        "W4A8",
        "per-tensor",
        "--accuracy-level is no option of 'fp32': use it with --flavor matmulnbits",
    ),
    (
        "qdq",
        {"fuse": False},
        "W4A8",
        "per-tensor",
        "--no-fuse is no option of 'qdq': use it with --flavor integer or matmulnbits or "
        "fp32 or fp16",
    ),
    (
        "int4",
        {},
        "W4A8",
        "per-tensor",
        "unknown flavour 'int4': choose one of integer, matmulnbits, qdq, folded, fp32, fp16",
    ),
]


@pytest.mark.parametrize(("flavor", "options", "scheme", "strategy", "message"), REFUSALS)
def test_what_a_flavour_cannot_express_is_refused_with_the_flavour_that_can(
    flavor: str,
    options: dict[str, bool | int],
    scheme: str,
    strategy: ActivationStrategy,
    message: str,
):
    with pytest.raises(MarrqError) as refused:
        check_flavor(parse_scheme(scheme, strategy), flavor, options)
    assert message in str(refused.value)


def test_a_file_that_is_refused_leaves_nothing(tmp_path: Path):
    with pytest.raises(MarrqError, match="needs float activations"):
        write(traced("vit", "W3A8"), "matmulnbits", tmp_path / "folder" / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheme", "flavor"),
    [
        ("W4A8", "integer"),
        ("W3A16", "matmulnbits"),
        ("W4A16-g8", "qdq"),
        ("W4A8-g8", "qdq"),
        ("W2A16-mxint", "matmulnbits"),
    ],
)
def test_the_flavour_that_suits_a_scheme_is_found(scheme: str, flavor: str):
    assert suitable_flavor(parse_scheme(scheme)) == flavor


@pytest.mark.parametrize("scheme", ["W4A8", "W3A16-g64", "W2A4"])
def test_a_gpu_gets_folded_weights_and_no_kernel_of_the_cpu(scheme: str):
    parsed = parse_scheme(scheme)
    assert suitable_flavor(parsed, "gpu") == "folded"
    assert "integer" not in flavors_for(parsed, "gpu")
    assert set(flavors_for(parsed, "gpu")) <= set(variants(parsed, "gpu"))
    assert "folded" not in variants(parsed)
    with pytest.raises(MarrqError, match="its kernels are of ONNX Runtime's CPU provider"):
        check_flavor(parsed, "integer", device="gpu")
    check_flavor(parsed, "folded", {"weights_only": True}, "gpu")
    assert str(written_scheme(parsed, {"weights_only": True})) == f"W{scheme[1]}A16{scheme[5:]}"


def test_the_qdq_flavour_can_express_every_scheme():
    for scheme in ("W2A3:per-token", "W3A8-g24-sym:per-token", "W4A16-mxint", "W8A16-g7"):
        assert objection("qdq", parse_scheme(scheme)) is None


def test_the_names_of_flavours_and_options_are_those_of_their_classes():
    """exporters/choices.py has the names without torch; the classes are in exporters/flavors."""
    assert list(OPTIONS) == [*FLAVORS, *FLOAT_FLAVORS]
    assert set(FLAVOR_HELP) == set(OPTIONS)
    assert list(OBJECTIONS) == [*FLAVORS]
    assert set(BASELINES) == set(FLOAT_FLAVORS)
    for flavor, make in FLAVORS.items():
        assert set(OPTIONS[flavor]) == set(vars(make()))
    used = {option for options in OPTIONS.values() for option in options}
    assert used == set(FLAGS) == set(OPTION_HELP)


def test_an_option_that_no_flavour_has_is_refused_with_the_one_that_was_meant():
    with pytest.raises(MarrqError, match=r"unknown option 'fused' .*: did you mean fuse\?"):
        check_choice("integer", {"fused": False})
    for wrong in ({"fuse": "no"}, {"accuracy_level": True}):
        with pytest.raises(MarrqError, match=r"option '\w+' is (True or False|a number): got"):
            check_choice("matmulnbits", wrong)


def test_dynamic_activations_are_what_the_symmetric_form_refuses_first():
    scheme = parse_scheme("W8A8-sym", "per-token")
    with pytest.raises(MarrqError, match=r"needs static activations .*--activations per-tensor"):
        check_scheme(scheme, "qdq", SYMMETRIC)


@pytest.mark.parametrize(("device", "bits"), [("cpu", 2), ("gpu", 4)])
def test_two_bits_lie_in_four_where_a_kernel_may_not_have_them(
    device: str, bits: int, tmp_path: Path
):
    trace, file = traced("vit", "W2A16"), tmp_path / "m.onnx"
    write(trace, "matmulnbits", file, device=device)
    products = [node for node in onnx.load(file).graph.node if node.op_type == "MatMulNBits"]
    assert {attribute(node, "bits") for node in products} == {bits}
    assert metadata(file)["container_bits"] == str(bits)
    assert device == "gpu" or agree(trace.model, file)


def test_a_file_states_one_container_only_if_patch_embedding_and_head_have_it_too(tmp_path: Path):
    write(traced("vit", "W4A8-e8"), "integer", tmp_path / "m.onnx")
    assert "container_bits" not in metadata(tmp_path / "m.onnx")


def test_two_bits_have_attention_as_two_products_and_say_so(tmp_path: Path):
    trace = traced("vit", "W2A8", strategy="per-token")
    write(trace, "integer", tmp_path / "m.onnx")
    assert metadata(tmp_path / "m.onnx")["fuse"] == "False"
    with pytest.raises(MarrqError, match=r"beside 2-bit weights \(leave out --fuse\)"):
        write(trace, "integer", tmp_path / "m.onnx", {"fuse": True})


def test_joint_codes_of_salient_columns_ask_for_the_release_of_their_container(tmp_path: Path):
    trace, file = traced("vit", "W4A16", "serq:8"), tmp_path / "m.onnx"
    write(trace, "matmulnbits", file, {"fuse": False})
    assert metadata(file)["lowest_onnxruntime"] == LOWEST_ONNXRUNTIME[8]
