"""exporters/metadata.py writes what runtime/metadata.py reads; neither imports the other."""

import dataclasses

import pytest

import exporters.metadata
import exporters.opsets
import runtime.doctor.file
import runtime.metadata
from exporters.choices import OPTIONS
from exporters.metadata import KEYS, FileMetadata, LinearPart
from marrq.models.load import ModelSource
from marrq.models.named_outputs import output_kind
from marrq.models.preprocessing import Preprocessing
from marrq.quantized_model import RefinementRecord
from runtime.metadata import Metadata

SOURCE = ModelSource("demo", "timm", {"model_name": "vit"}, "abc", ("logits",))
PREPROCESSING = Preprocessing((3, 32, 32), "bicubic", (35, 35), "center", (0.5,) * 3, (0.25,) * 3)

FLOAT = FileMetadata("fp32", "fp32", "none", 32.0, "1.17.0", SOURCE, PREPROCESSING, ("cat", "dog"))
QUANTIZED = dataclasses.replace(
    FLOAT,
    flavor="integer",
    device="gpu",
    scheme="W4A8-e8",
    method="marr-stream refined",
    bits_per_weight=4.1875,
    artifact="0123",
    classes="4567",
    refinement=RefinementRecord(1200, 120, "abc", 100, 1.0625, 0.9921875),
    schemes={"W4A8": ["fc1", "qkv"], "W8A8": ["head"]},
    container_bits=4,
    linears={
        "fc1": (LinearPart("x", "y", "gamma", "w"),),
        "qkv": (LinearPart("x", "q"), LinearPart("x", "k"), LinearPart("x", "v")),
    },
    options={"fuse": "True"},
)


@pytest.mark.parametrize("metadata", [FLOAT, QUANTIZED], ids=["float", "quantized"])
def test_what_is_written_is_read_again(metadata: FileMetadata):
    assert FileMetadata.from_metadata_props(metadata.to_metadata_props()) == metadata


def test_the_runtime_reads_what_the_exporters_write():
    read = Metadata(QUANTIZED.to_metadata_props())
    assert read.is_marrqs
    keys = ("flavor", "device", "scheme", "method", "artifact", "labels", "classes")
    for key in (*keys, "bits_per_weight"):
        assert getattr(read, key) == getattr(QUANTIZED, key)
    assert read.lowest_onnxruntime == QUANTIZED.lowest_onnxruntime
    assert read.source_name == SOURCE.name
    assert read.source_outputs == SOURCE.outputs
    assert read.scheme_by_linear == {"fc1": "W4A8", "qkv": "W4A8", "head": "W8A8"}
    assert read.linears is not None
    assert QUANTIZED.linears is not None
    for path, parts in QUANTIZED.linears.items():
        assert [vars(part) for part in read.linears[path]] == [vars(part) for part in parts]


def test_a_float_model_has_no_artifact_and_no_quantized_linears():
    read = Metadata(FLOAT.to_metadata_props())
    assert (read.artifact, read.linears, read.scheme_by_linear) == (None, None, {})


@pytest.mark.parametrize("labels", [(), ("cat", "dog")])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["logits", "features", "pred_boxes"])
def test_both_sides_say_the_same_of_an_output(name: str, rank: int, labels: tuple[str, ...]):
    kind = runtime.metadata.output_kind(name, rank, labels)
    assert kind == output_kind(name, rank, labels)
    assert (kind == "classes") == (name == "logits" and rank == 2 and labels != ())
    assert (kind == "dense") == (rank != 2)


def test_both_sides_know_the_same_keys():
    assert runtime.metadata.PREFIX == exporters.metadata.PREFIX
    table = [
        line.split("|")[1].strip()
        for line in (runtime.metadata.__doc__ or "").splitlines()
        if line.startswith("| ") and not line.startswith("| key")
    ]
    known = {key.strip() for keys in table for key in keys.split(",")}
    options = {option for names in OPTIONS.values() for option in names}
    assert known == {*KEYS, *options}
    written = {key.removeprefix("marrq.") for key in QUANTIZED.to_metadata_props()}
    assert written == {*KEYS, "fuse"}


def test_both_sides_know_attention_by_one_opset():
    assert runtime.doctor.file.ATTENTION_OPSET == exporters.opsets.ATTENTION_OPSET
