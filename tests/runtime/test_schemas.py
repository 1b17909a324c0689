"""The JSON that users read: the keys of each schema, in their order, and what kind of value each
has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sample_report import (
    BARE_REPORT,
    DENSE,
    EMBEDDER_REPORT,
    QUANTIZATION,
    REPORT,
    W4A8,
    without_accuracy,
)

from runtime.audit.inspect import Inspection
from runtime.doctor.diagnose import Diagnosis, RepositoryModel, ServedFile
from runtime.doctor.machine import ExaminedMachine, ImportedRuntime, TorchBuild
from runtime.errors import BenchError
from runtime.quantization import read_quantization
from runtime.records import Json, Record

MACHINE = "processor processor_flags cores system python"
ACCURACY = (
    "top1 top1_low top1_high top5 top5_low top5_high agreement divergence images against hits"
)
BENCH = {
    "": "schema environment data gallery models gate recommendation warnings",
    "environment": f"{MACHINE} onnxruntime packages provider providers_available threads "
    "allow_spinning graph_optimization rounds seconds cuda_graph gpu",
    "environment.gpu": "name driver memory_mb performance_state sm_mhz max_sm_mhz memory_mhz "
    "throttled",
    "data": "path images hash",
    "models": "name path role flavor device scheme method size_bytes bits_per_weight quantization "
    "refinement parity accuracy agreement embedding outputs not_finite latency load_ms "
    "peak_memory_mb peak_gpu_memory_mb throughput executed executed_on audit precision",
    "models.accuracy": ACCURACY,
    "models.accuracy.against": "baseline drop drop_low drop_high only_baseline only_model p_value",
    "models.latency": "batch p50_ms p90_ms p99_ms images_per_s rounds_ms ratio_fp16 ratio_fp32",
    "models.throughput": "batch threads images_per_s",
    "models.audit": "linear nominal operator operators weight activation integer reason saturates",
    "models.precision": "nominal weight_bits activation_bits kernel_weight_bits "
    "kernel_activation_bits container_bits bits_per_weight float_remainder",
    "models.precision.float_remainder": "what operator count why",
    "models.parity": "images stages first_loss nudged pixel_difference linears",
    "models.parity.stages": "stage source target least_cosine median_cosine agreement top1_source "
    "top1_target loss output",
    "models.parity.nudged": "least_cosine median_cosine agreement",
    "models.parity.linears": "linear relative_error",
    "gate": "max_drop min_cosine baseline models",
    "gate.models": "name demand verdict reason sentence images_needed",
    "recommendation": "size latency accuracy",
    "recommendation.size": "name flavor value sentence",
}
COSINES = "cosine cosine_low cosine_high least_cosine images"
EMBEDDINGS = {
    "models.embedding": "likeness retrieval",
    "models.embedding.likeness": f"{COSINES} cosine_p1 overlap overlap_low overlap_high divergence",
    "models.embedding.retrieval": "gallery leave_one_out classes knn1 knn20 recall1 "
    "mean_average_precision",
    "models.embedding.retrieval.knn20": "share low high queries against hits",
    "models.embedding.retrieval.knn20.against": BENCH["models.accuracy.against"],
    "models.embedding.retrieval.mean_average_precision": "mean low high queries against",
    "models.embedding.retrieval.mean_average_precision.against": "baseline drop drop_low drop_high",
    "gallery": "path images hash",
}
OUTPUTS = {"models.outputs": f"{COSINES} output relative_error agreement"}
INSPECT = {
    "": "schema path size_bytes onnxruntime provider graph_optimization refinement audit precision",
    "audit": BENCH["models.audit"],
    "precision": BENCH["models.precision"],
}
DOCTOR = {
    "": "schema machine files models server problems warnings",
    "machine": f"{MACHINE} int8_dot_products packages onnxruntime torch gpu",
    "machine.onnxruntime": "version providers error",
    "machine.torch": "cuda cuda_found",
    "files": "path producer opsets ir_version operators other_domains lowest_onnxruntime stated "
    "external_data load_error device without_cuda_kernel tensorrt loads_on_server",
    "models": "name backend versions",
}


def inspection() -> Inspection:
    assert W4A8.precision is not None
    return Inspection("m.onnx", 1, "1.32.0", "cpu", "all", None, W4A8.audit, W4A8.precision)


def diagnosis() -> Diagnosis:
    machine = ExaminedMachine(
        "p", ("avx",), 2, "s", "3", (), {}, ImportedRuntime("1", (), None), TorchBuild(None, False),
        None,
    )  # fmt: skip
    file = ServedFile(
        "m.onnx", "t 1", {"ai.onnx": 20}, 9, {}, ("x",), None, False, {}, None, "cpu", {}, (), True
    )
    return Diagnosis(machine, (file,), (RepositoryModel("m", "python", (1,)),), "1.18", (), ())


def at(document: Json, place: str) -> Json:
    """The object at a place; of a list the last, which in the sample has every section."""
    found = document
    for key in filter(None, place.split(".")):
        found = found[key]
        if isinstance(found, list):
            found = found[-1]
    return found


@pytest.mark.parametrize(
    ("report", "schema", "keys"),
    [
        (REPORT, "marrq.bench/2", BENCH),
        (EMBEDDER_REPORT, "marrq.bench/2", EMBEDDINGS),
        (replace(REPORT, models=(DENSE,)), "marrq.bench/2", OUTPUTS),
        (inspection(), "marrq.inspect/1", INSPECT),
        (diagnosis(), "marrq.doctor/1", DOCTOR),
    ],
)
def test_a_report_has_the_keys_of_its_schema_in_their_order(
    report: Record, schema: str, keys: dict[str, str]
):
    document = report.to_json()
    assert document["schema"] == schema
    assert {place: " ".join(at(document, place)) for place in keys} == keys


@pytest.mark.parametrize(
    "report", [REPORT, BARE_REPORT, EMBEDDER_REPORT, inspection(), diagnosis()]
)
def test_json_gives_back_what_it_was_given(report: Record):
    """Tuples are lists, so that a report read from a file equals the report that was written."""
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


def test_how_an_artifact_was_quantized_is_repeated_as_its_file_has_it():
    entries = [module.source for module in QUANTIZATION]
    document = REPORT.to_json()["models"][-1]["quantization"]
    assert document == entries
    assert "lowrank_damping" in document[0]  # a key that no report shows


def test_what_was_not_asked_for_is_null_or_empty():
    document = BARE_REPORT.to_json()
    [model] = document["models"]
    assert document["gate"] is document["recommendation"] is None
    assert model["parity"] is model["quantization"] is model["accuracy"]["against"] is None
    assert model["throughput"] == []


def test_a_model_without_finite_logits_has_no_accuracy_and_says_why():
    document = without_accuracy(W4A8).to_json()
    assert document["accuracy"] is None
    assert document["not_finite"] == {
        "images": 17,
        "first": {
            "where": "blocks.0.mlp.fc2",
            "operator": "MatMul",
            "largest": 9.1e7,
            "limit": 65504.0,
        },
    }


def test_a_number_that_json_does_not_have_is_null():
    parity = replace(W4A8.parity, pixel_difference=float("nan"))
    document = json.dumps(replace(W4A8, parity=parity, load_ms=float("inf")).to_json())
    read = json.loads(document, parse_constant=lambda name: pytest.fail(name))
    assert read["load_ms"] is read["parity"]["pixel_difference"] is None


def test_hits_tell_which_images_were_right():
    accuracy = replace(W4A8.accuracy, images=10, hits="a0c0")
    assert accuracy.right.tolist() == [True, False, True, *[False] * 5, True, True]


@pytest.mark.parametrize("text", ["", "[{", '[{"path": "fc1"}]', "[1]", "3"])
def test_a_damaged_quantization_is_one_sentence(text: str, tmp_path: Path):
    file = tmp_path / "quantization.json"
    file.write_text(text)
    with pytest.raises(BenchError, match=r"is damaged .*: quantize again"):
        read_quantization(file)
