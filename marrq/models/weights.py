"""Weights of a checkpoint: which file holds them, a prefix that training put before their names,
and what does not fit the model.

Training wraps models, and the wrapper's name stands before every name of a weight:

    module.         DataParallel and DistributedDataParallel
    _orig_mod.      torch.compile
    model., net.    Lightning
    timm_model.     transformers' wrapper of timm

No wrapper is known by name. A prefix is dropped if all names share it and all weights fit without
it. It is never dropped from some of the names.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from marrq.errors import MarrqError

PREFERRED = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names of a file of weights that come before all others, the first one first."""

SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin", ".ckpt", ".pt")

NAMED = 2
"""How many weights of a kind a sentence names."""


def weights_file(folder: Path) -> Path:
    """The file of weights in a checkpoint folder. Raises MarrqError if there is none, or a choice.

    A name of `PREFERRED` wins, as in timm.
    """
    # Training leaves more than one file: an optimizer, the arguments of a trainer.
    preferred = [folder / name for name in PREFERRED if (folder / name).is_file()]
    others = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    if preferred or len(others) == 1:
        return [*preferred, *others][0]
    if not others:
        raise MarrqError(
            f"the folder has no weights: put a file {PREFERRED[0]} or NAME.pth beside config.json"
        )
    # timm would take the first name of the alphabet: any epoch of a training run.
    raise MarrqError(
        f"the folder has {len(others)} files of weights, such as {others[0].name} and "
        f"{others[1].name}: leave one of them there, or name it {PREFERRED[0]} or model.pth"
    )


def shared_prefix(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before all names, if the rests of the names are the wanted names; else nothing.

    names: of a checkpoint's weights. wanted: of the model's weights.
    """
    names, wanted = set(names), set(wanted)
    # A shared prefix stands before the name that is wanted first.
    first = min(wanted, default="")
    found = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
    # Every wanted name with the prefix, and no other name: then nothing is dropped by half.
    return next(
        (prefix for prefix in sorted(found) if {prefix + name for name in wanted} == names), ""
    )


@dataclass(frozen=True)
class Misfit:
    """What does not fit between a checkpoint and a model.

    missing: weights that the model has and the checkpoint lacks.
    unknown: weights that the checkpoint has and the model lacks.
    differing: name, shape in the checkpoint, shape in the model.
    """

    missing: Sequence[str]
    unknown: Sequence[str]
    differing: Sequence[tuple[str, Sequence[int], Sequence[int]]]

    @classmethod
    def between(cls, checkpoint: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> "Misfit":
        """The difference of two dictionaries of weights."""
        # In the order of the model, so that the first name is the first layer's.
        return cls(
            [name for name in model if name not in checkpoint],
            [name for name in checkpoint if name not in model],
            [
                (name, list(tensor.shape), list(model[name].shape))
                for name, tensor in checkpoint.items()
                if name in model and tensor.shape != model[name].shape
            ],
        )

    def __bool__(self) -> bool:
        """Whether anything does not fit."""
        return bool(self.missing or self.unknown or self.differing)

    def error(self) -> ValueError:
        """The misfit as one sentence. The names come last, where a narrow terminal shows them."""
        return ValueError(
            "its weights do not fit the model that its config.json describes (correct one of "
            f"them): {'; '.join(self._parts())}"
        )

    def _parts(self) -> Iterator[str]:
        # Shapes last: they tell most often what is wrong, such as another number of classes.
        if self.unknown:
            yield f"the model lacks {_some(self.unknown)}"
        if self.missing:
            yield f"the checkpoint lacks {_some(self.missing)}"
        if self.differing:
            yield _some(
                [
                    f"{name} is {list(had)} in the checkpoint, {list(wanted)} in the model"
                    for name, had, wanted in self.differing
                ]
            )


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    # A model has hundreds of weights; the first names tell what they have in common.
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
