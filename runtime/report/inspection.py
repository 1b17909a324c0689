"""What `marrq inspect` says, for people: the audit and precision of a file, or how an artifact was
quantized. Nothing is examined or counted here."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from runtime.audit.inspect import Inspection
from runtime.audit.precision import Precision
from runtime.audit.rows import AuditRow
from runtime.quantization import QuantizedModule

SATURATES_HERE = (
    "its codes go beyond -64 … 63, and sums of two products saturate on this processor, which has "
    "no VNNI: quantize to 7 bits, or set session.x64quantprecision to 1"
)


def audit_table(rows: Sequence[AuditRow]) -> Table:
    """A line for linears that differ by their numbers only and run alike; a linear that runs
    otherwise than most of its kind has a line of its own. An operator stands with how often a
    linear needs it. Fits 100 columns."""
    # The box itself sets columns apart by a space: at 80 columns more would fold the names.
    result = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    result.add_column("linear", overflow="fold")
    result.add_column("count", justify="right")
    for heading in ("scheme", "runs", "weight", "input", "ok"):
        result.add_column(heading, no_wrap=True)
    for name, count, row in _grouped(rows):
        # "3 × MatMulIntegerToFloat": q, k and v run apart.
        times = f"{row.operators} × " if row.operators > 1 else ""
        result.add_row(
            name,
            str(count),
            row.nominal,
            f"{times}{row.operator}",
            row.weight,
            row.activation,
            "yes" if row.reason is None and row.saturates != "here" else "no",
        )
    return result


def _grouped(rows: Sequence[AuditRow]) -> Iterable[tuple[str, int, AuditRow]]:
    """Name, number of linears, and an example for each line."""
    # blocks.0.mlp.fc1 and blocks.1.mlp.fc1 are of one kind, blocks.*.mlp.fc1.
    kinds: dict[str, list[AuditRow]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"\d+", "*", row.linear), []).append(row)
    for kind, members in kinds.items():
        # The way that most linears of the kind run.
        [(usual, count)] = Counter(map(_way, members)).most_common(1)
        example = next(row for row in members if _way(row) == usual)
        yield kind if count > 1 else example.linear, count, example
        for row in members:
            if _way(row) != usual:
                yield row.linear, 1, row


def _way(row: AuditRow) -> AuditRow:
    """The row without the name of its linear."""
    return replace(row, linear="")


def reasons(rows: Sequence[AuditRow]) -> list[str]:
    """A sentence for each reason why linears do not run as their scheme says, with the first of
    these linears and their number."""
    # Linears with the same reason share a sentence.
    linears: dict[str, list[str]] = {}
    for row in rows:
        for reason in (row.reason, SATURATES_HERE if row.saturates == "here" else None):
            if reason is not None:
                linears.setdefault(reason, []).append(row.linear)
    found = []
    for reason, names in linears.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(f"{names[0]}{more}, of {len(rows)}: {reason}")
    return found


def inspection_table(report: Inspection) -> Table:
    """What stands below the table of the linears: why some do not run as they should, and the
    bits."""
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for place, reason in enumerate(reasons(report.audit)):
        result.add_row("why not" if place == 0 else "", reason)
    for text in _saturation(report.audit):
        result.add_row("saturation", text)
    if report.refinement is not None:
        result.add_row("refined", report.refinement.sentence)
    for heading, text in _precision_lines(report.precision, report.size_bytes):
        result.add_row(heading, text)
    return result


def _saturation(rows: Sequence[AuditRow]) -> Iterable[str]:
    """What holds of the sums on other processors than this one; nothing for a file that multiplies
    no integers."""
    integer = [row for row in rows if row.integer and row.activation in ("uint8", "int8")]
    found = [row.linear for row in integer if row.saturates is not None]
    if integer and not found:
        yield "none: no sum of two products leaves 16 bits, on any x86 processor"
    elif found and not any(row.saturates == "here" for row in integer):
        yield (
            f"{len(found)} of {len(integer)} linears, such as {found[0]}, on x86 processors "
            "without VNNI: codes beyond -64 … 63; sums are exact on this processor"
        )


def _precision_lines(precision: Precision, size_bytes: int) -> list[tuple[str, str]]:
    """Heading and text of each line."""
    # What is multiplied, which may be wider than what is stored.
    weights, activations = precision.kernel_weight_bits, precision.kernel_activation_bits
    per_weight = f"{precision.bits_per_weight:.2f} bits a weight"
    lines = [
        ("scheme", precision.nominal),
        ("kernels", f"{weights}-bit weights, {activations}-bit activations"),
        (
            "file",
            f"{size_bytes / 1e6:.2f} MB; {per_weight}, with {precision.container_bits}-bit codes",
        ),
    ]
    # Operators that run in float for the same reason share a line.
    parts: dict[tuple[str, str], list[str]] = {}
    for part in precision.float_remainder:
        parts.setdefault((part.what, part.why), []).append(f"{part.count} {part.operator}")
    for place, ((what, why), operators) in enumerate(parts.items()):
        lines.append(("in float" if place == 0 else "", f"{what} ({', '.join(operators)}): {why}"))
    return lines


def quantization_table(modules: Sequence[QuantizedModule]) -> Table:
    """How an artifact was quantized, for people."""
    result = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    # A long path folds; a number that is cut off would be another number.
    result.add_column("\nlinear", overflow="fold")
    for heading in ("\nbits", "\nα", "\nsteps", "relative\nerror", "clipped\n%", "\ndamping"):
        result.add_column(heading, justify="right", no_wrap=True)
    for module in modules:
        result.add_row(
            module.path,
            str(module.num_bits),
            "–" if module.alpha is None else f"{module.alpha:.2f}",
            str(len(module.trajectory)),
            f"{module.relative_error:.2e}",
            f"{100 * module.clipped:.1f}",
            f"{module.damping:g}",
        )
    return result
