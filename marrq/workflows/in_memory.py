"""Quantize a copy of a model in memory: the Python API."""

from dataclasses import replace

from marrq.budget import check_method, check_scheme, default_scheme, limit_of
from marrq.errors import MarrqError
from marrq.methods.spec import MethodSpec, parse_method
from marrq.models.images import ImageSet
from marrq.models.load import VisionModel
from marrq.pipeline.quantize import RunOptions
from marrq.quantized_model import QuantizedModel
from marrq.schemes import Scheme, parse_scheme
from marrq.workflows.devices import choose_device
from marrq.workflows.feasible import check_feasible
from marrq.workflows.quantize import Recipe, quantize_in_place
from marrq.workflows.sensitivity import Progress, copied, plan_within, sensitivity_of


def quantize(
    model: VisionModel,
    images: ImageSet,
    scheme: str | Scheme | None = None,
    method: str | MethodSpec = "marr",
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    budget: float | str | None = None,
) -> QuantizedModel:
    """Quantize a copy of a model; the model given stays as it is.

    model: a float model from `load_model`.
    images: calibration images from `find_images`; their classes are not used.
    scheme: bits and grids, such as `W4A16-g128` or `W4A4:per-token` (marrq/schemes.py); None for
        W4A8, or WmixA8 with a budget.
    method: `NAME[,KEY=VALUE…]`, such as `marr` or `gptq,damping=0.05` (marrq/methods/spec.py).
    samples: number of images to draw, at least 2; None for 1,024, or all if there are fewer.
    seed: of the draw; the same seed draws the same images.
    device: auto, cpu or cuda. `auto` takes a GPU if torch finds one.
    budget: bits a weight in all, scales included, such as 3.0, or a size of all tensors, such as
        "10MB"; each linear then gets 2, 3, 4 or 8 bits, by one more pass over the images.

    The copy takes the memory of the float weights once more. Raises MarrqError for an unknown
    scheme, method or device, for a budget that no model meets, for fewer images than samples, and
    for a model that has no transformer blocks or values that are not finite.
    """
    if isinstance(model, QuantizedModel):
        raise MarrqError(
            f"{model.source.name!r} is quantized already: give the float model, from load_model"
        )
    # Texts first: a wrong one is told before a model is copied.
    limit = None if budget is None else limit_of(budget)
    scheme = default_scheme(limit) if scheme is None else scheme
    recipe = Recipe(
        parse_scheme(scheme) if isinstance(scheme, str) else scheme,
        parse_method(method) if isinstance(method, str) else method,
        images.samples(samples),
        seed,
    )
    check_scheme(recipe.scheme, limit)
    check_method(recipe.method, limit, resume=False)
    run = RunOptions(choose_device(device))
    check_feasible(model)
    if limit is not None:
        # Too few images for a refinement are told before the costs are measured.
        if recipe.method.refinement.on:
            recipe.fresh(images)
        costs = sensitivity_of(model, images, recipe, Progress(run), limit)
        recipe = replace(recipe, widths=plan_within(costs, limit).widths)
    # The pipeline puts its linears into the module that it is given.
    return quantize_in_place(copied(model), images, recipe, run)
