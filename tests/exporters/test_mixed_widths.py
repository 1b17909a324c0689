"""Every flavour writes a model whose linears have bits of their own, with torch's logits; the file
says which linear has which, and so does the audit."""

from pathlib import Path

import numpy as np
import pytest
from flavor_files import agree, cosines, metadata, slow, traced
from tiny_models import WIDTHS

from exporters.choices import Options, flavors_for
from exporters.flavors import check_flavor
from exporters.onnx_file import write
from marrq.errors import MarrqError
from marrq.quantizers.linear import bits_per_weight, quantized_linears
from marrq.schemes import ActivationStrategy, parse_scheme
from runtime.audit.inspect import inspect_file
from runtime.session import SessionSettings

CASES: list[object] = [
    ("integer", "WmixA8", "per-tensor", {}),
    slow("integer", "WmixA8-e8", "per-tensor", {"fuse": False}),
    slow("integer", "WmixA4-g64", "per-token", {}),
    ("qdq", "WmixA8", "per-tensor", {}),
    slow("qdq", "WmixA16-g16", "per-tensor", {}),
    ("qdq", "WmixA16-sym", "per-tensor", {"symmetric": True}),
    slow("qdq", "WmixA8-sym", "per-tensor", {"symmetric": True}),
    ("folded", "WmixA16-g16-sym", "per-tensor", {"float32": True}),
    ("matmulnbits", "WmixA16-g16", "per-tensor", {}),
]


@pytest.mark.parametrize(("flavor", "scheme", "strategy", "options"), CASES)
def test_a_flavour_gives_torchs_logits_and_names_the_bits_of_each_linear(
    flavor: str, scheme: str, strategy: ActivationStrategy, options: Options, tmp_path: Path
):
    trace, file = traced("vit", scheme, strategy=strategy), tmp_path / "m.onnx"
    made = trace.model
    write(trace, flavor, file, options)
    if options.get("symmetric"):
        # In float16 an activation near a tie between two codes may go to either side.
        near = cosines(made, file, level="1")
        assert np.median(near) >= 0.999
        assert near[2] >= 0.99
    else:
        assert agree(made, file)
    assert metadata(file)["scheme"] == scheme
    rows = inspect_file(file, SessionSettings()).audit
    found = {row.linear.removesuffix(".q").removesuffix(".k"): row.nominal for row in rows}
    own = parse_scheme(scheme, strategy)
    for path, bits in WIDTHS.items():
        assert found[path].startswith(f"W{bits}A{str(own).partition('A')[2][:1]}")
    # What counts as 3 bits takes 4 in MatMulNBits and beside TensorRT's INT4.
    stored = float(metadata(file)["bits_per_weight"])
    assert stored >= bits_per_weight(made.module) - 0.05
    if flavor in ("integer", "folded"):
        assert stored == pytest.approx(bits_per_weight(made.module), abs=0.06)
    assert {linear.spec.num_bits for linear in quantized_linears(made.module).values()} == {
        2,
        3,
        4,
        8,
    }


def test_a_mixed_scheme_goes_to_the_flavours_of_its_activations():
    assert flavors_for(parse_scheme("WmixA8")) == flavors_for(parse_scheme("W4A8"))
    assert flavors_for(parse_scheme("WmixA16")) == flavors_for(parse_scheme("W4A16"))
    with pytest.raises(MarrqError, match="the artifact has WmixA8 per-tensor; use --flavor"):
        check_flavor(parse_scheme("WmixA8"), "matmulnbits")
