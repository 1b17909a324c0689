"""The report of the costs: its keys, its tables, and its picture."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from runtime.records import Json
from runtime.report.sensitivity import costs_table, plot_sensitivity, sizes_table
from runtime.sensitivity import SensitivityReport


def plan(bits: float, divergence: float, widths: dict[str, int]) -> Json:
    return {
        "widths": widths,
        "bits_per_weight": bits,
        "size_bytes": int(bits * 1e6),
        "divergence": divergence,
    }


def group(paths: list[str], scale: float) -> Json:
    widths = [
        {"num_bits": bits, "stored_bits": 100 * bits, "divergence": scale / 4**bits}
        for bits in (2, 3, 4, 8)
    ]
    return {"paths": paths, "weights": 147456, "widths": widths}


REPORT: Json = {
    "schema": "marrq.sensitivity/1",
    "about": {"model": "tiny", "scheme": "WmixA8 per-tensor"},
    "groups": [
        group(["blocks.0.q", "blocks.0.k", "blocks.0.v"], 1.0),
        group(["blocks.0.fc1"], 2.0),
    ],
    "curve": [
        plan(2.1 + step / 10, 0.5 / 2**step, {"blocks.0.q": 2, "blocks.0.fc1": 2 + step // 20})
        for step in range(40)
    ],
    "uniform": [
        plan(bits + 0.1, 3 / 4**bits, {"blocks.0.q": bits, "blocks.0.fc1": bits})
        for bits in (2, 3, 4, 8)
    ],
}


def printed(table: Table) -> str:
    console = Console(width=100, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_a_row_shows_what_the_linears_of_one_input_cost_at_each_width():
    lines = printed(costs_table(SensitivityReport.read(REPORT))).splitlines()
    [row] = [line for line in lines if "blocks.0.q" in line]
    assert row.split() == [
        *("blocks.0.q", "+", "2", "147,456"),
        *("6.25e-02", "1.56e-02", "3.91e-03", "1.53e-05"),
    ]


def test_sizes_ascend_and_models_of_one_width_stand_among_them():
    lines = printed(sizes_table(SensitivityReport.read(REPORT))).splitlines()
    rows = [line.rsplit(maxsplit=3) for line in lines if line.strip()[:1].isdigit()]
    sizes = [float(row[1]) for row in rows]
    assert sizes == sorted(sizes)
    assert sizes[0] == 2.1
    names = [row[0].strip() for row in rows]
    assert [name for name in names if "everywhere" in name] == [
        f"{bits} everywhere" for bits in (2, 3, 4, 8)
    ]
    assert "2, 3" in names


def test_the_picture_is_the_same_from_the_same_report(tmp_path: Path):
    report = SensitivityReport.read(REPORT)
    for name in ("a.svg", "b.svg"):
        plot_sensitivity(report, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for said in ("a budget", "one width", "3 bits", "tiny, WmixA8 per-tensor"):
        assert said in text
    # Numbers of a log axis are numbers, and no formulas.
    assert "$" not in text
    report = replace(report, model="local-dir:somewhere/vit")
    plot_sensitivity(report, tmp_path / "c.svg")
    assert "somewhere" not in (tmp_path / "c.svg").read_text()
