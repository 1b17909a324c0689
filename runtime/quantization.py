"""How an artifact was quantized, linear by linear, and how it was refined: the reading side of its
quantization.json, and of the refinement in its config.json.

The bench's report repeats the entries whole, so a record keeps the JSON that it was read from.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BenchError
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
    # Of its weight.
    num_bits: int
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


@dataclass(frozen=True)
class Refinement(Record):
    """How a model was refined, that is trained, after it was quantized.

    images: it learned from. held_out: images that judged it. files_sha256: a hash of their names.
    loss_before, loss_after: on the images that judged. moved_codes: codes that moved by one step.
    """

    images: int
    held_out: int
    files_sha256: str
    steps: int
    loss_before: float
    loss_after: float
    moved_codes: int = 0

    @property
    def sentence(self) -> str:
        """What was done, and what came of it."""
        taken_back = "" if self.loss_after < self.loss_before else ", and was taken back"
        moved = f", which moved {self.moved_codes:,} codes" if self.moved_codes else ""
        return (
            f"on {self.images:,} further images in {self.steps:,} steps{moved}: the loss on "
            f"{self.held_out:,} held-out images went from {self.loss_before:.3f} to "
            f"{self.loss_after:.3f}{taken_back}"
        )


def read_quantization(file: Path) -> tuple[QuantizedModule, ...]:
    """All entries of a quantization.json, in the order of the model. Raises BenchError for a file
    that is damaged."""
    try:
        return tuple(QuantizedModule.read(entry) for entry in json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{str(file)!r} is damaged ({error}): quantize again") from error
