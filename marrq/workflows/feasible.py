"""Whether an artifact of a model could be loaded and exported: told before the work, which may take
hours, and not after it."""

from exporters.trace import check_traceable
from marrq.artifact.validate import check_architecture, check_fit
from marrq.errors import MarrqError
from marrq.models.load import VisionModel, build


def check_feasible(model: VisionModel) -> None:
    """Raise MarrqError if the model could be quantized, and its artifact not be loaded or exported.

    The model is built again without memory for its tensors, and traced once by torch.
    `tests/walk_families.py` tries it on the architectures of timm and transformers.
    """
    if model.classes is not None:
        raise MarrqError(
            "classes are no part of an artifact: quantize the model without them, and give the "
            "classes when it is exported or measured"
        )
    source, size = model.source, model.preprocessing.input_size
    shapes = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
    try:
        # What loading an artifact checks, with all linears in floating point.
        check_architecture(source.library, source.architecture)
        check_fit(lambda: build(source), shapes, {}, size)
    # Libraries raise a dozen kinds of errors for what they cannot build.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MarrqError(
            f"model {source.name!r} is not quantized, since its artifact could not be loaded: "
            f"{reason}"
        ) from error
    check_traceable(model.module, size)
