"""What the user chooses about the refinement: `refine=on`, `refine.images=1200`.

marrq/refinement does the work. Nothing here imports torch, see methods/spec.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from marrq.errors import MarrqError
from marrq.methods.setting import COUNT, ON_OFF, check_settings, number, setting

KEY = "refine"


@dataclass(frozen=True)
class RefinementSpec:
    """Whether the finished model is refined, that is trained end to end, and how.

    on: off by default; nothing else trains anything
    images: unlabelled images to learn from, which calibration has not used
    codes: whether codes of weights may move by one step (marrq/refinement/learned.py)
    epochs: how often each of them is seen
    batch: images of a step at most
    rate: multiplies the learning rates of marrq/refinement/learned.py
    temperature: of the logits in the loss (marrq/refinement/loss.py)
    held_out: further images, which only judge whether the refinement helps"""

    on: bool = field(
        default=False,
        metadata=setting(KEY, "refine the finished model: train it end to end", ON_OFF),
    )
    images: int = field(
        default=1200,
        metadata=setting(
            f"{KEY}.images", "images to learn from, which calibration has not used", COUNT
        ),
    )
    codes: bool = field(
        default=True,
        metadata=setting(
            f"{KEY}.codes", "let codes of weights move by one step, which takes longer", ON_OFF
        ),
    )
    epochs: int = field(
        default=1, metadata=setting(f"{KEY}.epochs", "how often each image is seen", COUNT)
    )
    batch: int = field(default=12, metadata=setting(f"{KEY}.batch", "most images of a step", COUNT))
    rate: float = field(
        default=1.0,
        metadata=setting(
            f"{KEY}.rate", "multiplies all learning rates", number("a number from 0 to 100", 0, 100)
        ),
    )
    temperature: float = field(
        default=4.0,
        metadata=setting(
            f"{KEY}.temperature",
            "softens the logits of classes in the loss",
            number("a number from 1 to 1000", 1, 1000),
        ),
    )
    held_out: int = field(
        default=120,
        metadata=setting(
            f"{KEY}.held-out", "further images, which judge whether the refinement helps", COUNT
        ),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch > self.images:
            raise MarrqError(
                f"a step of the refinement takes {self.batch} images and there are {self.images}: "
                f"lower {KEY}.batch, or raise {KEY}.images"
            )

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return self.epochs * math.ceil(self.images / self.batch)

    @property
    def all_images(self) -> int:
        """Images that are drawn after those of calibration."""
        return self.images + self.held_out if self.on else 0

    def check_used(self, keys: Iterable[str]) -> None:
        """Raise MarrqError if the user has set something about a refinement that is off.

        keys: of the settings that the user wrote."""
        unused = [key for key in keys if key.startswith(f"{KEY}.")]
        if unused and not self.on:
            raise MarrqError(
                f"setting {unused[0]!r} is given and the refinement is off: add {KEY}=on"
            )
