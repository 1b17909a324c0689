"""Where a model loses on its way from float weights in torch to a file that a server feeds:
quantization, export, or preprocessing.

Four sets of outputs of the same images, each compared with the one before:

    float torch → simulated torch → ONNX Runtime on the same pixels → ONNX Runtime on served pixels
           quantization         export                         preprocessing

Served pixels are made by the file's own preprocessing (runtime/preprocessing.py). Each stage may do
another thing to the logits, so each has a rule of its own by which it *loses*. The first stage that
loses is named. Without the float model the first stage is left out.

**Quantization** may change the logits. It loses if it gets fewer images right than chance explains:
by McNemar's exact test at 5 %. Without classes it is not judged, only measured.

**Export** may change the logits by the rounding of float sums. In a quantized model that is not
always little: an activation that falls to the other side between two codes is carried on through
all later blocks. So there are two rules:

- Linear by linear (runtime/measure/linears_alone.py): the input that a linear has in torch goes
  through that linear's own part of the graph alone, where nothing amplifies. An output channel of a
  healthy file then errs by about 1e-6 of its size; one wrong scale, zero point or code errs by more
  than LINEAR_TOLERANCE.
- Between the linears, by every output: its mean distance (1 - cosine) must be within
  AMPLIFICATIONS times the distance by which a nudge of the pixels by a millionth moves the
  simulation, and LOGITS_TOLERANCE.

**Preprocessing** may change nothing. It loses if a pixel, in units of the model's input, differs by
more than PIXEL_TOLERANCE.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.accuracy import paired_drop
from runtime.measure.stages import Classes, ComparedOutput, Cosines
from runtime.records import Record

SIGNIFICANT = 0.05
LINEAR_TOLERANCE = 1e-3
PIXEL_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 1e-4
# Of files in float16, whose numbers have 11 bits: one activation of a hundred is so near a tie
# between two codes that it goes to the other side, in each linear.
HALF_LINEAR_TOLERANCE = 2e-2
HALF_LOGITS_TOLERANCE = 1e-2
AMPLIFICATIONS = 10.0

# A stage, and what BestClasses calls its two sides.
QUANTIZATION = ("quantization", "original", "simulated")
EXPORT = ("export", "simulated", "exported")
PREPROCESSING = ("preprocessing", "exported", "served")

# By stage: what is compared, and where ComparedOutput has the cosines.
SIDES = {
    "quantization": ("float torch", "simulated torch", "quantized"),
    "export": ("simulated torch", "ONNX Runtime", "exported"),
    "preprocessing": ("ONNX Runtime", "ONNX Runtime, the file's preprocessing", "served"),
}


@dataclass(frozen=True)
class Closeness(Record):
    """How near two sets of outputs are: cosine of each image's output, and share of images with the
    same top-1; None for outputs without classes."""

    least_cosine: float
    median_cosine: float
    agreement: float | None


@dataclass(frozen=True)
class Stage(Record):
    """What one stage does to an output."""

    stage: str
    # What is compared.
    source: str
    target: str
    # Over the images: cosine of an image's output before and after the stage.
    least_cosine: float
    median_cosine: float
    # Share of images with the same top-1; None for outputs that are no logits of classes.
    agreement: float | None
    # Accuracy before and after the stage; None if the classes of the images are not known.
    top1_source: float | None
    top1_target: float | None
    # A sentence; None if the stage loses nothing.
    loss: str | None
    # Name of the output.
    output: str = "logits"


@dataclass(frozen=True)
class LinearError(Record):
    """Relative error of a linear's own part of the graph, on the input that it has in torch."""

    linear: str
    relative_error: float


@dataclass(frozen=True)
class Parity(Record):
    """The section `parity` of a model in the bench's report."""

    images: int
    # In the order of the stages, and in each stage of the outputs.
    stages: tuple[Stage, ...]
    # The first stage that loses; None if no stage does.
    first_loss: str | None
    # How far a nudge of the pixels by a millionth moves the simulation's first output.
    nudged: Closeness
    # Largest difference between the pixels of the two preprocessings.
    pixel_difference: float
    # Of each quantized linear, in the order of execution.
    linears: tuple[LinearError, ...]


def compare_stages(
    outputs: Mapping[str, ComparedOutput],
    targets: NDArray[np.int64] | None,
    linears: Mapping[str, float],
    pixel_difference: float,
    saturating: Collection[str] = (),
    float16: bool = False,
) -> Parity:
    """Find the stages that lose.

    outputs: by name, in the file's order.
    targets: [images], indices of classes; None if they are not known, or there are no classes.
        Then nobody can say what quantization loses, only how far it moves the outputs.
    linears: relative error of each linear, by module path.
    pixel_difference: largest difference between the pixels of the two preprocessings.
    saturating: linears whose sums can saturate on this processor (runtime/audit/saturation.py).
    float16: whether the file computes in float16.
    """
    # A linear that errs says where the fault is; an output says only that there is a fault. A fault
    # of linears or pixels is one of all outputs, and told at the first of them.
    wrong_linears = _linear_loss(linears, saturating, float16)
    wrong_pixels = _preprocessing_loss(pixel_difference)
    quantization, export, preprocessing = [], [], []
    for place, (name, output) in enumerate(outputs.items()):
        # Without the float model nobody knows what quantization loses.
        if output.quantized is not None:
            quantization.append(_quantization(name, output, targets))
        between = None if wrong_linears else _output_loss(name, output, float16)
        export.append(
            _stage(name, EXPORT, output, targets, between if place else wrong_linears or between)
        )
        preprocessing.append(
            _stage(name, PREPROCESSING, output, targets, None if place else wrong_pixels)
        )
    stages = (*quantization, *export, *preprocessing)
    first = next(iter(outputs.values()))
    same = None if first.best is None else _share(first.best.simulated, first.best.nudged)
    return Parity(
        images=len(first.exported),
        stages=stages,
        first_loss=next((stage.stage for stage in stages if stage.loss), None),
        nudged=_closeness(first.nudged, same),
        pixel_difference=pixel_difference,
        linears=tuple(LinearError(path, error) for path, error in linears.items()),
    )


def _stage(
    name: str,
    between: tuple[str, str, str],
    output: ComparedOutput,
    targets: NDArray[np.int64] | None,
    loss: str | None,
) -> Stage:
    """What a stage does to an output. between: the stage, and fields of BestClasses before and
    after it."""
    stage, before, after = between
    source, target, measured = SIDES[stage]
    found: Cosines = getattr(output, measured)
    best = output.best
    ends = (None, None) if best is None else (getattr(best, before), getattr(best, after))
    same = None if best is None else _share(*ends)
    top1 = [None if end is None or targets is None else _share(end, targets) for end in ends]
    closeness = vars(_closeness(found, same))
    return Stage(
        stage, source, target, **closeness, top1_source=top1[0], top1_target=top1[1], loss=loss,
        output=name,
    )  # fmt: skip


def _quantization(name: str, output: ComparedOutput, targets: NDArray[np.int64] | None) -> Stage:
    loss = None
    if output.best is not None and output.best.original is not None and targets is not None:
        loss = _quantization_loss(output.best.original, output.best.simulated, targets)
    return _stage(name, QUANTIZATION, output, targets, loss)


def _share(found: Classes, expected: Classes) -> float:
    return float((found == expected).mean())


def _closeness(found: Cosines, same: float | None) -> Closeness:
    return Closeness(float(found.min()), float(np.median(found)), same)


def _quantization_loss(
    original: Classes, simulated: Classes, targets: NDArray[np.int64]
) -> str | None:
    # Chance explains a gain as well as a loss: only a drop can be a loss.
    found = paired_drop(original == targets, simulated == targets)
    if found.drop <= 0 or found.p_value >= SIGNIFICANT:
        return None
    return (
        f"{found.only_baseline} images are right in float only, {found.only_model} when quantized "
        "only: more than chance explains"
    )


def _linear_loss(
    linears: Mapping[str, float], saturating: Collection[str], float16: bool
) -> str | None:
    tolerance = HALF_LINEAR_TOLERANCE if float16 else LINEAR_TOLERANCE
    # `not <=` and not `>`: an error that is NaN is a fault too.
    wrong = [path for path in linears if not linears[path] <= tolerance]
    if not wrong:
        return None
    worst = sorted(wrong, key=lambda path: -linears[path])[0]
    others = f", and {len(wrong) - 1} other linears differ too" if len(wrong) > 1 else ""
    # What is known to be wrong on this processor need not be looked for.
    of_them = sum(path in saturating for path in wrong)
    cause = (
        f"; the sums of {of_them} of them can saturate on this processor, which has no VNNI: see "
        "marrq inspect"
        if of_them
        else ""
    )
    return (
        f"{worst} differs by {linears[worst]:.1e} from torch on the same input, where "
        f"{tolerance:g} is allowed{others}{cause}"
    )


def _output_loss(name: str, output: ComparedOutput, float16: bool) -> str | None:
    # NaN has no distance from anything.
    overflown = int((~output.finite).sum())
    if overflown:
        return f"the file gives NaN or infinite {name} for {overflown} images"
    # Distance of the file from torch, and distance that a nudge of the pixels explains.
    distance, explained = (float((1 - found).mean()) for found in (output.exported, output.nudged))
    tolerance = HALF_LOGITS_TOLERANCE if float16 else LOGITS_TOLERANCE
    if distance <= AMPLIFICATIONS * explained + tolerance:
        return None
    return (
        f"{name} are {distance:.1e} from torch's in the mean (1 - cosine), where a nudge of the "
        f"pixels by a millionth moves them by {explained:.1e}; no linear is at fault, so the fault "
        "lies between the linears"
    )


def _preprocessing_loss(pixel_difference: float) -> str | None:
    if pixel_difference <= PIXEL_TOLERANCE:
        return None
    return (
        f"pixels differ by up to {pixel_difference:.1e} from those that the model was quantized "
        "for: the file's preprocessing is another"
    )
