"""The float model behind an artifact or a file, which may not be on this machine.

An artifact and a file hold all that they need to run. The float model is something to compare with,
so a command that finds it gone goes on without it, says so and records it.
"""

from typing import TYPE_CHECKING

from marrq.errors import MarrqError

if TYPE_CHECKING:
    from marrq.models.class_embeddings import ClassEmbeddings
    from marrq.models.load import ModelSource, VisionModel


def find_float_model(
    source: "ModelSource", classes: "ClassEmbeddings | None" = None
) -> "tuple[VisionModel | None, str]":
    """The float model, or None and the reason: it is gone, it cannot be loaded, or it has other
    weights now.

    classes: that the model is given, as what it is compared with has been; None for no classes.
    """
    from marrq.models.load import load_source
    from marrq.zero_shot import with_classes

    # Whatever keeps the model from being loaded, the caller can do without it: a folder that was
    # moved, a hub that cannot be reached, weights that were trained further.
    try:
        found = load_source(source)
        return found if classes is None else with_classes(found, classes), ""
    except MarrqError as error:
        return None, str(error)
