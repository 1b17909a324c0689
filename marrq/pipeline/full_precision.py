"""Full-precision tokens that several runs on the same model and images have in common.

A comparison of methods quantizes one model many times. The full-precision path is the same in all
these runs, so that the first run computes its tokens and the later runs read them. What these
tokens depend on is their key, and a run with another key is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from marrq.errors import MarrqError
from marrq.models.blocks import Block
from marrq.models.load import ModelSource, VisionModel
from marrq.models.preprocessing import Preprocessing
from marrq.pipeline.block_inputs import TokenBatches
from marrq.quantized_model import CalibrationRecord, QuantizationSettings


@dataclass(frozen=True)
class FullPrecisionKey:
    """Everything that the tokens of the full-precision path depend on.

    source: the float model.
    preprocessing: of the images.
    calibration: the images and the batch size.
    rotation: the seed of the rotation, or None.
    outer_layers: whether first and last layers are quantized.
    balanced: whether blocks are balanced.
    device: the last bits of float32 products depend on it.
    """

    source: ModelSource
    preprocessing: Preprocessing
    calibration: CalibrationRecord
    rotation: int | None
    outer_layers: bool
    balanced: bool
    device: torch.device

    @classmethod
    def of(
        cls, model: VisionModel, settings: QuantizationSettings, device: torch.device
    ) -> "FullPrecisionKey":
        """The key of a run that quantizes `model`."""
        return cls(
            source=model.source,
            preprocessing=model.preprocessing,
            calibration=settings.calibration,
            rotation=settings.method.rotation,
            outer_layers=settings.scheme.outer_layers,
            # What a method does after the balance changes only the quantized path.
            balanced=settings.method.balances(settings.scheme),
            device=device,
        )


@dataclass(frozen=True)
class FullPrecisionInputs:
    """The tokens that enter each block but the first on the full-precision path, by the block's
    path in the model. They belong to one process."""

    key: FullPrecisionKey
    _tokens: dict[str, TokenBatches] = field(default_factory=dict, init=False, repr=False)

    def check(self, key: FullPrecisionKey) -> None:
        """Raise MarrqError if a run with this key must not use these tokens."""
        # Field by field, so that the message can name the first that differs.
        kept, wanted = vars(self.key), vars(key)
        for name in kept:
            if kept[name] != wanted[name]:
                raise MarrqError(
                    f"full-precision tokens are kept for {name} {kept[name]!r} and cannot be used "
                    f"for {wanted[name]!r}: make a FullPrecisionInputs for each key"
                )

    def entering(self, block: Block, compute: Callable[[], TokenBatches]) -> TokenBatches:
        """The tokens that enter the block, computed if no run has computed them yet."""
        # First layers never get here: the first block's input is the same on both paths. So the
        # path is unique: the last layers alone have the empty path.
        if block.path not in self._tokens:
            self._tokens[block.path] = compute()
        return self._tokens[block.path]
