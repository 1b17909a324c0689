"""The bench's terminal output from a literal report: it fits, and it says below the table what the
table cannot."""

from typing import Any

from rich.console import Console

from runtime.report.tables import sentences, table


def measured(
    name: str, against: dict[str, Any] | None, executed_on: dict[str, int]
) -> dict[str, Any]:
    """What the terminal output reads of a model."""
    accuracy = {
        "top1": 0.554,
        "top1_low": 0.532,
        "top1_high": 0.577,
        "agreement": 0.834,
        "against": against,
    }
    latency = [{"batch": batch, "p50_ms": 17.7 * batch, "ratio_fp32": 1.11} for batch in (1, 8)]
    return {
        "name": name,
        "size_bytes": 87_020_000,
        "bits_per_weight": 32.0,
        "accuracy": accuracy,
        "latency": latency,
        "executed_on": executed_on,
        "parity": None,
    }


LOSS = {"baseline": "fp32", "drop": 0.251, "drop_low": 0.226, "drop_high": 0.279}
REPORT = {
    "data": {"images": 1860, "path": "OUT/emoji"},
    "environment": {"onnxruntime": "1.32.0"},
    "models": [
        measured("fp32", None, {"CPUExecutionProvider": 200}),
        measured(
            "W4A8-g128 marr-stream integer",
            LOSS,
            {"CUDAExecutionProvider": 180, "CPUExecutionProvider": 20},
        ),
    ],
    "gate": None,
    "recommendation": None,
}


def test_a_table_with_two_batch_sizes_and_a_great_loss_fits_80_columns_uncut():
    console = Console(width=80)
    with console.capture() as printed:
        console.print(table(REPORT))
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed.get().replace("(22.6…27.9)", ""), "nothing is cut off"
    assert sum("25.1 (22.6…27.9)" in line for line in lines) == 1
    assert "141.60 (1.11)" in printed.get()


def test_nodes_that_ran_on_another_provider_are_counted_below_the_table():
    name = "W4A8-g128 marr-stream integer"
    assert sentences(REPORT) == [
        f"{name}: 180 of 200 nodes ran on CUDAExecutionProvider",
        f"{name}: 20 of 200 nodes ran on CPUExecutionProvider",
    ]
