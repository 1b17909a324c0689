"""The tables of exporters/README.md say what the code says."""

import re
from pathlib import Path

import exporters.opsets
from exporters.choices import FLAGS, OPTIONS, objection
from exporters.flavors import FLAVORS, check_flavor
from exporters.flavors.matmulnbits import CONTAINER_BITS, LOWEST_ONNXRUNTIME
from exporters.opsets import FUSED_ONNXRUNTIME, IR_VERSIONS, WEIGHT_OPSETS, WIDENED_ONNXRUNTIME
from marrq.schemes import parse_scheme

README = (Path(exporters.__file__).parent / "README.md").read_text(encoding="utf-8")


def table(*columns: str) -> list[list[str]]:
    """The rows below the heading with these columns."""
    _, found, rest = README.partition(f"| {' | '.join(columns)} |\n")
    assert found, columns
    lines = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_row_names_a_flavour_that_there_is_and_every_option_is_named():
    rows = table("flavour", "schemes", "what runs under ONNX Runtime")
    named = [name for row in rows for name in re.findall(r"`(\w+)[^`]*`", row[0])]
    assert named
    assert set(named) <= set(OPTIONS)
    assert all(f"{flag}`" in README or f"{flag} " in README for flag in FLAGS.values())


def test_the_flavours_take_the_groups_of_their_row():
    taken = {"integer": ("W4A8", "W4A8-g64"), "matmulnbits": ("W4A16", "W4A16-g16")}
    refused = {"integer": "W4A8-g32", "matmulnbits": "W4A16-g24"}
    for flavor, schemes in taken.items():
        for scheme in schemes:
            check_flavor(parse_scheme(scheme), flavor)
        assert objection(flavor, parse_scheme(refused[flavor])) is not None


def test_the_opsets_and_versions_are_those_that_files_state():
    standard = table("bits of a weight", "codes in the file", "opset", "IR", "lowest ORT")
    assert [[int(row[0]), int(row[2]), int(row[3]), row[4]] for row in standard] == [
        [bits, opset, IR_VERSIONS[opset], WIDENED_ONNXRUNTIME[bits]]
        for bits, opset in WEIGHT_OPSETS.items()
    ]
    packed = table("bits of a weight", "codes in the file", "lowest ORT")
    assert packed == [
        [str(bits), f"{container} bits", LOWEST_ONNXRUNTIME[container]]
        for bits, container in CONTAINER_BITS.items()
    ]


def lowest(flavor: str, scheme: str, activations: str, **options: bool) -> str:
    """Of the linears."""
    parsed = parse_scheme(scheme, "per-token" if activations == "per-token" else "per-tensor")
    return FLAVORS[flavor](**options).lowest_onnxruntime(parsed, has_salient=False)


def test_of_two_cases_the_later_onnx_runtime_counts():
    cases = [row[3] for row in table("case", "opset", "IR", "lowest ORT")]
    widened = WIDENED_ONNXRUNTIME
    assert cases[0] == FUSED_ONNXRUNTIME
    for bits in widened:
        assert lowest("integer", f"W{bits}A8", "per-tensor") == widened[bits]
        assert lowest("integer", f"W{bits}A8", "per-token") == max(cases[1], widened[bits])
        for scheme, activations in ((f"W{bits}A8", "per-token"), (f"W{bits}A16", "float")):
            assert lowest("qdq", scheme, activations) == max(cases[2], widened[bits])
        assert (
            f"ONNX Runtime {lowest('qdq', f'W{bits}A16-sym', 'float', symmetric=True)}," in README
        )
