"""Audit and precision, as they stand in the JSON of `marrq inspect` and of the bench, for people.
Nothing is examined or counted here."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table


def audit_table(rows: list[dict[str, Any]]) -> Table:
    """Linears that differ by their numbers only, and run alike, are one line; a linear that runs
    otherwise than most of its kind has a line of its own. Fits 100 columns. An operator stands with
    how often a linear needs it."""
    result = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    result.add_column("linear", overflow="fold")
    result.add_column("×", justify="right")
    for heading in ("scheme", "runs", "weight", "input", "ok"):
        result.add_column(heading, no_wrap=True)
    for name, count, row in _grouped(rows):
        operator = (
            row["operator"] if row["operators"] <= 1 else f"{row['operators']} × {row['operator']}"
        )
        result.add_row(
            name,
            str(count),
            row["nominal"],
            operator,
            row["weight"],
            row["activation"],
            "yes" if row["reason"] is None else "no",
        )
    return result


def _grouped(rows: list[dict[str, Any]]) -> Iterable[tuple[str, int, dict[str, Any]]]:
    """Name, number and example of each line."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"\d+", "*", row["linear"]), []).append(row)
    for kind, members in kinds.items():
        ways = Counter(_way(row) for row in members)
        [(usual, count)] = ways.most_common(1)
        example = next(row for row in members if _way(row) == usual)
        yield (escape(kind if count > 1 else example["linear"]), count, example)
        yield from ((escape(row["linear"]), 1, row) for row in members if _way(row) != usual)


def _way(row: dict[str, Any]) -> tuple[Any, ...]:
    """All of a row but its name."""
    return tuple(value for key, value in row.items() if key != "linear")


def reasons(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each reason why linears do not run as their scheme says, with the first of
    them and their number."""
    linears: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"] is not None:
            linears.setdefault(row["reason"], []).append(row["linear"])
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}, of {len(rows)}: "
        f"{reason}"
        for reason, names in linears.items()
    ]


def precision_lines(precision: dict[str, Any], size_bytes: int) -> list[tuple[str, str]]:
    """Heading and text of each line."""
    kernel = f"{precision['kernel_weight_bits']}-bit weights, {precision['kernel_activation_bits']}-bit activations"
    file = f"{size_bytes / 1e6:.2f} MB; {precision['bits_per_weight']:.2f} bits a weight, with {precision['container_bits']}-bit codes"
    parts: dict[tuple[str, str], list[str]] = {}
    for part in precision["float_remainder"]:
        parts.setdefault((part["what"], part["why"]), []).append(
            f"{part['count']} {part['operator']}"
        )
    in_float = [
        f"{what} ({', '.join(operators)}): {why}" for (what, why), operators in parts.items()
    ]
    lines = [("scheme", precision["nominal"]), ("kernels", kernel), ("file", file)]
    return lines + [("in float" if place == 0 else "", text) for place, text in enumerate(in_float)]


def inspection(report: dict[str, Any]) -> Table:
    """What stands below the table of the linears: why some do not run as they should, and the
    bits."""
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for place, reason in enumerate(reasons(report["audit"])):
        result.add_row("why not" if place == 0 else "", escape(reason))
    for heading, text in precision_lines(report["precision"], report["size_bytes"]):
        result.add_row(heading, escape(text))
    return result


def shortfalls(report: dict[str, Any]) -> list[str]:
    """A sentence for each candidate of a bench of which a linear does not run as its scheme
    says."""
    return [
        f"{model['name']}: {reason}"
        for model in report["models"]
        if model["role"] == "candidate"
        for reason in reasons(model["audit"])
    ]
