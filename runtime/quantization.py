"""How an artifact was quantized, linear by linear: the reading side of its quantization.json.

The bench's report repeats the entries whole, so a record keeps the JSON that it was read from.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from runtime.records import Json, Record


@dataclass(frozen=True)
class SearchStep(Record):
    """A step of the search of α.

    half: of the calibration images, 0 or 1; None if the search saw all of them at once.
    error: J.
    """

    half: int | None
    alpha: float
    error: float


@dataclass(frozen=True)
class QuantizedModule(Record):
    """How one linear was quantized."""

    path: str
    # J: square error of the linear's outputs, summed over the calibration tokens.
    error: float
    # J over the power of the float outputs.
    relative_error: float
    # J / (tokens · outputs).
    mse: float
    # Strength of the residual correction; None if the method has none.
    alpha: float | None
    # Steps of the search of α; empty without a search.
    trajectory: tuple[SearchStep, ...]
    # Share of weights outside the range of their grid, 0 … 1.
    clipped: float
    # Of the Hessian, as a share of its mean diagonal.
    damping: float
    # Why α = 0 was used instead; None if it was not.
    fallback: str | None
    # The JSON as it stands in the file, with keys that no report shows.
    source: Json

    @classmethod
    def read(cls, source: Json) -> "QuantizedModule":
        """From an entry of quantization.json."""
        # Keys that only later versions write stay in `source`.
        shown = [name for name in cls.__dataclass_fields__ if name not in ("trajectory", "source")]
        steps = tuple(SearchStep(**step) for step in source["trajectory"])
        return cls(**{name: source[name] for name in shown}, trajectory=steps, source=source)

    def to_json(self) -> Json:
        """The entry as it was read."""
        return self.source


def read_quantization(file: Path) -> tuple[QuantizedModule, ...]:
    """All entries of a quantization.json, in the order of the model."""
    return tuple(QuantizedModule.read(entry) for entry in json.loads(file.read_text("utf-8")))
