"""Where a model loses on its way from float weights in torch to a file that a server feeds:
quantization, export, or preprocessing.

Four sets of logits of the same images, each compared with the one before:

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

- Linear by linear (`LinearsAlone`): the input that a linear has in torch goes through that linear's
  own part of the graph alone, where nothing amplifies. An output channel of a healthy file then
  errs by about 1e-6 of its size; one wrong scale, zero point or code errs by more than
  LINEAR_TOLERANCE.
- Between the linears, by the logits: their mean distance (1 - cosine) must be within AMPLIFICATIONS
  times the distance by which a nudge of the pixels by a millionth moves the simulation, and
  LOGITS_TOLERANCE.

**Preprocessing** may change nothing. It loses if a pixel, in units of the model's input, differs by
more than PIXEL_TOLERANCE.
"""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.errors import BenchError
from runtime.measure.accuracy import hits, paired_drop
from runtime.measure.cosines import cosines
from runtime.metadata import LinearPart, Metadata
from runtime.records import Record
from runtime.session import Model, SessionSettings

SIGNIFICANT = 0.05
LINEAR_TOLERANCE = 1e-3
PIXEL_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 1e-4
# Of files in float16, whose numbers have 11 bits: one activation of a hundred is so near a tie
# between two codes that it goes to the other side, in each linear.
HALF_LINEAR_TOLERANCE = 2e-2
HALF_LOGITS_TOLERANCE = 1e-2
AMPLIFICATIONS = 10.0

Array = NDArray[np.float32]


@dataclass(frozen=True)
class StageLogits:
    """Logits of the same images, [images, classes], or embeddings [images, channels]."""

    # Of the float model in torch; None if it is not at hand.
    original: Array | None
    # Of the quantized model in torch.
    simulated: Array
    # Of the quantized model in torch, with pixels nudged by a millionth.
    nudged: Array
    # Of the file, on the pixels that torch gets.
    exported: Array
    # Of the file, on the pixels of its own preprocessing.
    served: Array
    # Whether they are logits of classes.
    are_classes: bool = True


@dataclass(frozen=True)
class Closeness(Record):
    """How near two sets of logits are: cosine of each image's logits, and share of images with the
    same top-1; None for embeddings, whose largest number names no class."""

    least_cosine: float
    median_cosine: float
    agreement: float | None


@dataclass(frozen=True)
class Stage(Record):
    """What one stage does to the logits."""

    stage: str
    # What is compared.
    source: str
    target: str
    # Over the images: cosine of an image's logits before and after the stage.
    least_cosine: float
    median_cosine: float
    # Share of images with the same top-1; None for outputs that are no logits of classes.
    agreement: float | None
    # Accuracy before and after the stage; None if the classes of the images are not known.
    top1_source: float | None
    top1_target: float | None
    # A sentence; None if the stage loses nothing.
    loss: str | None


@dataclass(frozen=True)
class LinearError(Record):
    """Relative error of a linear's own part of the graph, on the input that it has in torch."""

    linear: str
    relative_error: float


@dataclass(frozen=True)
class Parity(Record):
    """The section `parity` of a model in the bench's report."""

    images: int
    stages: tuple[Stage, ...]
    # The first stage that loses; None if no stage does.
    first_loss: str | None
    # How far a nudge of the pixels by a millionth moves the simulation.
    nudged: Closeness
    # Largest difference between the pixels of the two preprocessings.
    pixel_difference: float
    # Of each quantized linear, in the order of execution.
    linears: tuple[LinearError, ...]


def compare_stages(
    logits: StageLogits,
    targets: NDArray[np.int64] | None,
    linears: Mapping[str, float],
    pixel_difference: float,
    saturating: Collection[str] = (),
    float16: bool = False,
) -> Parity:
    """Find the stages that lose.

    targets: [images], indices of classes; None if they are not known, or there are no classes.
        Then nobody can say what quantization loses, only how far it moves the outputs.
    linears: relative error of each linear, by module path.
    pixel_difference: largest difference between the pixels of the two preprocessings.
    saturating: linears whose sums can saturate on this processor (runtime/audit/saturation.py).
    float16: whether the file computes in float16.
    """
    # Name of the stage, what is compared, and its two sets of logits.
    compared = [
        ("export", "simulated torch", "ONNX Runtime", logits.simulated, logits.exported),
        (
            "preprocessing",
            "ONNX Runtime",
            "ONNX Runtime, the file's preprocessing",
            logits.exported,
            logits.served,
        ),
    ]
    losses = [
        # A linear that errs says where the fault is; the logits say only that there is a fault.
        _linear_loss(linears, saturating, float16) or _logits_loss(logits, float16),
        _preprocessing_loss(pixel_difference),
    ]
    # Without the float model nobody knows what quantization loses.
    if logits.original is not None:
        compared.insert(
            0, ("quantization", "float torch", "simulated torch", logits.original, logits.simulated)
        )
        losses.insert(0, _quantization_loss(logits.original, logits.simulated, targets))
    stages = tuple(
        Stage(name, source, target, **vars(_closeness(before, after, logits.are_classes)),
              top1_source=_top1(before, targets), top1_target=_top1(after, targets), loss=loss)
        for (name, source, target, before, after), loss in zip(compared, losses, strict=True)
    )  # fmt: skip
    return Parity(
        images=len(logits.simulated),
        stages=stages,
        first_loss=next((stage.stage for stage in stages if stage.loss), None),
        nudged=_closeness(logits.simulated, logits.nudged, logits.are_classes),
        pixel_difference=pixel_difference,
        linears=tuple(LinearError(path, error) for path, error in linears.items()),
    )


def relative_error(found: Array, expected: Array) -> float:
    """The largest over channels of ‖found - expected‖ / ‖expected‖, each norm over all tokens of
    that channel; [..., channels].

    A single wrong code shows in its own channel, and would be lost in a norm over all channels. A
    channel that is 0 throughout is measured by the size of the largest channel.
    """
    # Norms per channel: [channels].
    difference, size = (
        np.linalg.norm(x.reshape(-1, x.shape[-1]).astype(np.float64), axis=0)  # [channels]
        for x in (found - expected, expected)
    )
    return float((difference / np.where(size > 0, size, size.max() or 1.0)).max())


class LinearsAlone:
    """The quantized linears of a file, each cut out of its graph, to be run alone: from the value
    that enters to the value that leaves, as the metadata `marrq.linears` name them.

    In a graph for GPUs a linear may be part of an operator that does more. What is run then is the
    product with the weight that the metadata name, without the bias.
    """

    def __init__(self, file: Path, settings: SessionSettings) -> None:
        """Raises BenchError if the file does not tell where its linears are."""
        self._model, self._settings = ir.load(file), settings
        linears = Metadata(self._model.metadata_props).linears
        if linears is None:
            raise BenchError(
                f"{str(file)!r} does not say where its linears are: export the artifact again"
            )
        self._parts = linears
        self._made = {output.name for node in self._model.graph for output in node.outputs}

    def run(self, path: str, x: Array) -> Array:
        """The output [..., out] of a linear for an input [..., in]. Every token of x is computed,
        also if the graph drops some of them."""
        # q, k and v of one linear are parts of it, side by side along the channels.
        return np.concatenate([self._run(part, x) for part in self._parts[path]], -1)

    def scale(self, path: str) -> str | None:
        """Name of the model's tensor [out] (LayerScale) that the file has multiplied into the
        linear's output; None if there is none."""
        return self._parts[path][0].scale

    @property
    def float16(self) -> bool:
        """Whether the linears compute in float16."""
        first = next(iter(self._parts.values()))[0]
        return any(
            value is not None and value.name == first.input and value.dtype == ir.DataType.FLOAT16
            for node in self._model.graph
            for value in (*node.inputs, *node.outputs)
        )

    def lacks_bias(self, path: str) -> bool:
        """Whether the linear is run without its bias, which the file adds in another operator."""
        return any(part.output not in self._made for part in self._parts[path])

    def _run(self, part: LinearPart, x: Array) -> Array:
        graph = self._cut(part)
        # The batch and the number of tokens are those of x, whatever the file says of the value.
        graph.inputs[0].shape, graph.outputs[0].shape = ir.Shape(x.shape), None
        # A graph in float16 takes float16.
        if graph.inputs[0].dtype == ir.DataType.FLOAT16:
            x = x.astype(np.float16)
        alone = ir.external_data.load_to_model(ir.Model(graph, ir_version=self._model.ir_version))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "linear.onnx"
            ir.save(alone, file)
            return Model(file, self._settings).run(x).astype(np.float32)

    def _cut(self, part: LinearPart) -> ir.Graph:
        """The nodes between the ends of a part, with their initializers; or the product with its
        weight, if the part's own end is no value of the graph."""
        if part.output in self._made or part.weight is None:
            return ir.convenience.extract(self._model.graph, [part.input], [part.output])
        graph = ir.convenience.extract(self._model.graph, [], [part.weight])
        [weight] = graph.outputs
        x = ir.Value(name=part.input, type=weight.type)
        product = ir.node("MatMul", [x, weight], name=part.output)
        product.outputs[0].name, product.outputs[0].type = part.output, x.type
        graph.inputs.append(x)
        graph.append(product)
        graph.outputs[0] = product.outputs[0]
        return graph


def _top1(logits: Array, targets: NDArray[np.int64] | None) -> float | None:
    return None if targets is None else float(hits(logits, targets).mean())


def _closeness(before: Array, after: Array, are_classes: bool) -> Closeness:
    found = cosines(before, after)
    same = float((before.argmax(1) == after.argmax(1)).mean()) if are_classes else None
    return Closeness(float(found.min()), float(np.median(found)), same)


def _quantization_loss(
    original: Array, simulated: Array, targets: NDArray[np.int64] | None
) -> str | None:
    if targets is None:
        return None
    # Chance explains a gain as well as a loss: only a drop can be a loss.
    found = paired_drop(hits(original, targets), hits(simulated, targets))
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


def _logits_loss(logits: StageLogits, float16: bool) -> str | None:
    # NaN has no distance from anything.
    overflown = int((~np.isfinite(logits.exported).all(axis=1)).sum())
    if overflown:
        return f"the file gives NaN or infinite logits for {overflown} images"
    # Distance of the file from torch, and distance that a nudge of the pixels explains.
    distance, explained = (
        float((1 - cosines(logits.simulated, x)).mean()) for x in (logits.exported, logits.nudged)
    )
    tolerance = HALF_LOGITS_TOLERANCE if float16 else LOGITS_TOLERANCE
    if distance <= AMPLIFICATIONS * explained + tolerance:
        return None
    return (
        f"logits are {distance:.1e} from torch's in the mean (1 - cosine), where a nudge of the "
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
