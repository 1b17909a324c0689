"""What each group of linears costs at each width, and what a size buys: the reading side of the
report of `marrq sensitivity` (schema marrq.sensitivity/1)."""

from dataclasses import dataclass

from runtime.records import Json, Record


@dataclass(frozen=True)
class WidthCost(Record):
    """A group at one width. stored_bits: scales included. divergence: expected, of an image."""

    num_bits: int
    stored_bits: int
    divergence: float


@dataclass(frozen=True)
class GroupCosts(Record):
    """Linears that share an input, by their paths; `weights` is their number of weights."""

    paths: tuple[str, ...]
    weights: int
    widths: tuple[WidthCost, ...]

    @property
    def name(self) -> str:
        """The first linear, and how many others share its input."""
        more = f" + {len(self.paths) - 1}" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"


@dataclass(frozen=True)
class SizedPlan(Record):
    """A model of some size. widths: bits of each linear, by path. size_bytes: of all tensors of the
    artifact. divergence: expected."""

    widths: dict[str, int]
    bits_per_weight: float
    size_bytes: int
    divergence: float


@dataclass(frozen=True)
class SensitivityReport(Record):
    """curve: the best models of their size, from the smallest. uniform: the models of one width.
    unit: of the divergences."""

    model: str
    scheme: str
    unit: str
    groups: tuple[GroupCosts, ...]
    curve: tuple[SizedPlan, ...]
    uniform: tuple[SizedPlan, ...]

    @classmethod
    def read(cls, report: Json) -> "SensitivityReport":
        """From the JSON of `marrq sensitivity`."""
        groups = tuple(
            GroupCosts(
                tuple(group["paths"]),
                group["weights"],
                tuple(WidthCost(**width) for width in group["widths"]),
            )
            for group in report["groups"]
        )
        curve, uniform = (
            tuple(SizedPlan(**plan) for plan in report[key]) for key in ("curve", "uniform")
        )
        about = report["about"]
        # Files of an earlier marrq do not name the unit, which most models have.
        unit = about.get("unit", "nats")
        return cls(about["model"], about["scheme"], unit, groups, curve, uniform)
