"""What really runs: one row for each linear of a file.

The operator that runs a linear and the types of its operands say what is computed. If that is not
what the scheme says, the form of the product in the file says why (runtime/audit/fusion.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.audit.fusion import reason
from runtime.audit.linears import FLOAT, Examined, Linear, is_integer, kernel_types, nominal_bits
from runtime.audit.saturation import Saturates, can_saturate, where_it_saturates
from runtime.errors import GateError
from runtime.records import Record


@dataclass(frozen=True)
class AuditRow(Record):
    """What runs a linear."""

    # The module path; the node's name if the weight has none.
    linear: str
    # What the scheme says, as `W4A8`, or "float".
    nominal: str
    # What runs, and how often: q, k and v may run apart, and so may groups of inputs.
    operator: str
    operators: int
    # Types of the operands as the kernel gets them.
    weight: str
    activation: str
    # Whether the kernel multiplies integers or n-bit weights; of both operands if the scheme
    # quantizes both.
    integer: bool
    # Why the linear does not run as its scheme says; None if it does.
    reason: str | None
    # Where a sum of two products can leave 16 bits and saturate (runtime/audit/saturation.py):
    # "here", or "without VNNI" if it can on such x86 processors alone; None if it cannot.
    saturates: Saturates | None

    @property
    def falls_short(self) -> bool:
        """Whether the linear runs in float although its scheme says integers."""
        if self.integer or self.nominal == FLOAT:
            return False
        # A scheme with float activations (A16) asks for no integer kernel.
        _, activation_bits = nominal_bits(self.nominal)
        return activation_bits < 16


def audit(examined: Examined) -> list[AuditRow]:
    """A row for each linear; a row for each part of it if the parts do not run alike. A linear that
    the scheme names and the file lacks has a row that says so."""
    rows: dict[str, list[tuple[str, AuditRow]]] = {}
    for linear in examined.linears:
        # Branches and corrections belong to a linear, and are no linears of their own.
        if linear.role == "linear":
            rows.setdefault(linear.path, []).append((linear.part, _row(examined, linear)))
    # The metadata say what should be there: a linear that vanished must not go unnoticed.
    missing = [
        _row_without_kernel(path, nominal, 0, "no product of the file has its weight")
        for path, nominal in examined.file.metadata.scheme_by_linear.items()
        if path not in rows
    ]
    return [row for parts in rows.values() for row in _merged(parts)] + missing


def demand_integers(rows: Sequence[AuditRow]) -> None:
    """Raise GateError if a linear runs in float against a scheme that says integers."""
    # The first is named in full, the others are counted: one sentence has to do.
    short = [row for row in rows if row.falls_short]
    if short:
        first = f"{short[0].linear!r}, {short[0].nominal}: {short[0].reason}"
        raise GateError(
            f"{len(short)} of {len(rows)} linears run in float where their scheme says integers; "
            f"the first is {first}"
        )


def _merged(parts: list[tuple[str, AuditRow]]) -> list[AuditRow]:
    """One row if all parts of a linear run alike, otherwise one for each part and way to run."""
    # Rows of parts have the path of the whole, so that rows which are equal merge.
    alike = Counter(row for _, row in parts)
    if len(alike) > 1:
        alike = Counter(replace(row, linear=part) for part, row in parts)
    return [replace(row, operators=count) for row, count in alike.items()]


def _row(examined: Examined, linear: Linear) -> AuditRow:
    if linear.kernel is None:
        # A fused attention, for example, holds the product of its inputs.
        merged = "ONNX Runtime has merged it into another operator"
        return _row_without_kernel(linear.path, linear.nominal, 1, merged)
    weight, activation = kernel_types(examined.optimized, linear.kernel)
    # A scheme with float activations is met if the weights stay n-bit up to the kernel.
    float_activations = nominal_bits(linear.nominal)[1] >= 16
    integer = is_integer(weight) and (is_integer(activation) or float_activations)
    return AuditRow(
        linear=linear.path,
        nominal=linear.nominal,
        operator=linear.kernel.node.op_type,
        operators=1,
        weight=weight,
        activation=activation,
        integer=integer,
        reason=(
            None
            if linear.nominal == FLOAT
            else reason(examined, linear, linear.kernel, integer, activation)
        ),
        saturates=_saturates(examined, linear),
    )


def _saturates(examined: Examined, linear: Linear) -> Saturates | None:
    if linear.kernel is None:
        return None
    # Activations of fewer bits than their type are clipped, as only the scheme knows.
    bits = min(8, nominal_bits(linear.nominal)[1])
    can = can_saturate(examined.optimized, linear.kernel, bits)
    return where_it_saturates() if can else None


def _row_without_kernel(path: str, nominal: str, operators: int, why: str) -> AuditRow:
    """The row of a linear that no operator of the optimized graph runs by itself."""
    return AuditRow(
        linear=path,
        nominal=nominal,
        operator="none",
        operators=operators,
        weight="none",
        activation="none",
        integer=False,
        reason=why,
        saturates=None,
    )
