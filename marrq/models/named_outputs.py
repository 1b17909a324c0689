"""A model is a function from pixels to named tensors: names of outputs, and what an output is.

    logits                    classes: what a classifier gives
    pooler_output, features   features: one vector an image, an embedding
    last_hidden_state, pred_boxes, predicted_depth, logits of a segmenter
                              dense: numbers for each token, box or pixel

A module with one output returns one Tensor, a module with several a tuple in the order of their
names. runtime/metadata.py tells the kinds of a file's outputs by the same rule;
tests/test_contract.py holds that both agree.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from marrq.errors import MarrqError

OutputKind = Literal["classes", "features", "dense"]

NAME = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)
"""The name of an output: it becomes a name in graphs and in the config of a server."""
MOST_OUTPUTS = 16

LOGITS = "logits"
"""The output that class names belong to."""


def output_kind(name: str, rank: int, labels: Sequence[str]) -> OutputKind:
    """What an output is. rank: number of its axes, the batch among them. labels: of the model."""
    if rank != 2:
        return "dense"
    return "classes" if name == LOGITS and labels else "features"


def kinds_of_change(
    outputs: Iterable[Tensor], names: Iterable[str], labels: Sequence[str]
) -> list[OutputKind]:
    """By which kind of output a small change of each output counts.

    outputs: of some images. names: of them. labels: of the model."""
    return [
        # One number has no softmax and no direction that could change: its size counts.
        "dense" if z.shape[1:] == (1,) else output_kind(name, z.dim(), labels)
        for name, z in zip(names, outputs, strict=True)
    ]


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All outputs of a module, in the order of their names."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def as_returned(outputs: Iterable[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """The outputs as a module returns them: one alone, or a tuple of several."""
    found = tuple(outputs)
    return found[0] if len(found) == 1 else found


def check_names(names: object) -> tuple[str, ...]:
    """The names of outputs, as a tuple. Raises MarrqError if they are no list of different names.

    names: as a user or a file gives them.
    """
    if (
        not isinstance(names, list | tuple)
        or not 0 < len(names) <= MOST_OUTPUTS
        or len(set(map(str, names))) < len(names)
        or not all(isinstance(name, str) and NAME.fullmatch(name) for name in names)
    ):
        raise MarrqError(
            f"outputs {names!r} are not 1 to {MOST_OUTPUTS} different names of letters, digits and "
            "'_': correct them"
        )
    return tuple(names)


def check_offered(names: Sequence[str], offered: Sequence[str], model: str) -> None:
    """Raise MarrqError if the model does not give an output of these names.

    offered: what it gives. model: for the message.
    """
    unknown = [name for name in names if name not in offered]
    if unknown:
        raise MarrqError(
            f"{model} gives no output {unknown[0]!r}: choose from {', '.join(offered)}"
        )


class NamedOutputs(nn.Module):
    """A model of a library, as a module that returns the outputs of some names."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        """outputs: names, in the order in which they are returned."""
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)
