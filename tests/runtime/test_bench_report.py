"""The bench's terminal output from a report: it fits, and it says below the tables what the tables
cannot."""

import re
from dataclasses import replace

import pytest
from rich.console import Console
from sample_report import (
    BARE_REPORT,
    DENSE,
    EMBEDDER_REPORT,
    FP16,
    FP32,
    REPORT,
    TRANSPOSED,
    W4A8,
    without_accuracy,
)

from marrq.cli import common
from runtime.measure.accuracy import BaselineDrop
from runtime.measure.measured import MeasuredModel
from runtime.report.answers import accuracy_table
from runtime.report.tables import models_table, sentences, tables

NAME = "W4A8-g128 marr-stream integer"
LOSS = BaselineDrop(0.251, 0.226, 0.279, 500, 20, 1e-9, "fp32")


def test_a_table_with_two_batch_sizes_and_a_great_loss_fits_80_columns_uncut():
    candidate = replace(W4A8, name=NAME, accuracy=replace(W4A8.accuracy, against=LOSS))
    report = replace(REPORT, models=(FP32, candidate))
    console = Console(width=80)
    with console.capture() as printed:
        console.print(models_table(report))
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed.get().replace("(22.6…27.9)", ""), "nothing is cut off"
    assert sum("25.1 (22.6…27.9)" in line for line in lines) == 1
    assert "41.72 (0.42)" in printed.get()


def test_a_path_with_square_brackets_stands_as_it_is(capsys: pytest.CaptureFixture[str]):
    report = replace(REPORT, data=replace(REPORT.data, path="/data[/a]"))
    common.stdout.print(*tables(report))
    assert "images of /data[/a]" in capsys.readouterr().out


def printed_table(*models: MeasuredModel) -> str:
    console = Console(width=100)
    with console.capture() as printed:
        console.print(models_table(replace(REPORT, models=models)))
    return printed.get()


def test_times_are_multiples_of_the_baseline_that_is_there():
    assert "ms (× fp32)" in printed_table(FP16, FP32, W4A8)
    only_fp16 = tuple(replace(row, ratio_fp32=None) for row in W4A8.latency)
    table = printed_table(FP16, replace(W4A8, latency=only_fp16))
    assert "ms (× fp16)" in table
    assert "fp32" not in table
    first = only_fp16[0]
    assert f"{first.p50_ms:.2f} ({first.ratio_fp16:.2f})" in table


def test_without_a_baseline_no_column_is_about_one():
    table = printed_table(*BARE_REPORT.models)
    assert f"{W4A8.latency[0].p50_ms:.2f} " in table
    assert not any(word in table for word in ("×", "agree", "drop", "–\n"))


def test_the_first_model_of_an_evaluation_is_not_compared_with_itself():
    console = Console(width=80)
    accuracies = {"float": FP32.accuracy, "W4A8 per-token marr-stream": W4A8.accuracy}
    with console.capture() as printed:
        console.print(accuracy_table(accuracies, "pictures"))
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 80
    [first] = [line.split() for line in lines if line.startswith("float")]
    [second] = [line.split() for line in lines if line.startswith("W4A8")]
    assert first[-2:] == ["–", "–"]
    assert second[-1] == f"{W4A8.accuracy.divergence:.4f}"
    assert any("images of pictures" in line for line in lines)


def test_nodes_that_ran_on_another_provider_are_counted_below_the_table():
    executed_on = {"CUDAExecutionProvider": 180, "CPUExecutionProvider": 20}
    model = replace(W4A8, name=NAME, audit=(), parity=None, executed_on=executed_on)
    report = replace(REPORT, models=(FP32, model), gate=None, recommendation=None, warnings=())
    assert sentences(report) == [
        f"{NAME}: 180 of 200 nodes ran on CUDAExecutionProvider",
        f"{NAME}: 20 of 200 nodes ran on CPUExecutionProvider",
    ]


def test_sentences_name_shortfalls_losses_verdicts_and_recommendations_in_this_order():
    warning, *found = sentences(REPORT)
    assert warning == REPORT.warnings[0]
    assert found[0] == f"W4A8 marr-stream: blocks.1.mlp.fc1, of 8: {TRANSPOSED}"
    assert found[1] == "W4A8 marr-stream: the first stage that loses is quantization"
    assert found[2] == "quantization loses: 87 images are right in float only"
    assert found[3].endswith("9.0e-06, at blocks.1.mlp.fc2")
    assert [text.split(":")[0] for text in found[5:]] == [
        "undecided",
        "smallest",
        "fastest",
        "most accurate",
    ]


def test_a_model_without_finite_logits_is_a_row_and_a_sentence():
    report = replace(BARE_REPORT, models=(without_accuracy(FP32), W4A8))
    console = Console(width=100)
    with console.capture() as printed:
        console.print(models_table(report))
    [row] = [line for line in printed.get().splitlines() if line.startswith("fp32")]
    assert "NaN or infinite" in row
    assert "15.90" in row, "it is timed all the same"
    assert sentences(report)[0] == f"fp32 {without_accuracy(FP32).not_finite.sentence}"


def test_embeddings_and_dense_outputs_have_tables_that_fit_80_columns_uncut():
    console = Console(width=80)
    with console.capture() as printed:
        console.print(*tables(EMBEDDER_REPORT))
        console.print(*tables(replace(REPORT, models=(FP32, DENSE), gate=None)))
    text = printed.get()
    assert not re.search(r"…(?!\d)", text), "nothing is cut off"
    assert "k-NN among 3,720 images of train" in " ".join(text.split())
    [alike] = [line for line in text.splitlines() if "0.9872" in line]
    assert alike.split()[1:] == ["0.9876", "(0.9872–0.9880)", "0.9676", "0.8876", "83.0", "0.0371"]
    assert "52.2…56.2 52.2…56.2 52.2…56.2 53.2…55.2 lost 1.3" in " ".join(text.split())
    [masks] = [line for line in text.splitlines() if "masks" in line]
    assert masks.split()[-3:] == ["0.9113", "0.2312", "93.4"]


def test_there_is_a_table_for_what_was_measured_and_no_other():
    assert len(tables(REPORT)) == 3  # models, throughput, parity
    assert len(tables(BARE_REPORT)) == 1


def test_what_quantization_loses_is_told_by_the_logits_whatever_stands_beside_them():
    assert W4A8.parity is not None
    untold = "what quantization loses cannot be told without classes"
    tokens = [
        replace(stage, output="tokens", top1_source=None, top1_target=None)
        for stage in W4A8.parity.stages
    ]
    for stages, is_untold in (((*W4A8.parity.stages, *tokens), False), (tokens, True)):
        parity = replace(W4A8.parity, stages=tuple(stages))
        report = replace(REPORT, models=(FP32, replace(W4A8, parity=parity)))
        assert any(untold in sentence for sentence in sentences(report)) == is_untold
