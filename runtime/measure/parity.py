"""Where a model loses on its way from float weights in torch to a file that a server feeds:
quantization, export, or preprocessing.

Four sets of logits of the same images, each compared with the one before it:

    float torch  →  simulated torch  →  ONNX Runtime, the same pixels  →  ONNX Runtime, pixels by the file's own preprocessing
           quantization             export                      preprocessing

Each stage has a rule of its own by which it *loses*, since each may do another thing to the logits;
the first that loses is named.

quantization    may change them. It loses when it gets fewer images right than chance explains: by McNemar's exact test at 5 %.
export          may change them by the rounding of float sums. That is not little for every model: a quantized one carries an activation
                that falls to the other side between two codes on through all blocks behind. So the judge is twofold.
                Linear by linear (`LinearsAlone`): what enters a linear in torch goes through that linear's own part of the graph alone,
                where nothing amplifies; an output channel then errs by 1e-6 of its size, and one wrong scale, zero point or code of it by
                more than LINEAR_TOLERANCE. And for what lies between the linears, by the logits: their mean distance (1 - cosine)
                must stay within AMPLIFICATIONS times that of the simulation from itself under a nudge of its pixels by a millionth, and
                LOGITS_TOLERANCE.
preprocessing   may change nothing: it loses when a pixel, in units of the model's input, differs by more than PIXEL_TOLERANCE.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.errors import BenchError
from runtime.measure.accuracy import hits, paired_drop
from runtime.session import Model, SessionSettings

SIGNIFICANT = 0.05
LINEAR_TOLERANCE = 1e-3
PIXEL_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 1e-4
AMPLIFICATIONS = 10.0

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Logits:
    """Of the same images, [images, classes]: by the float model in torch, by the simulation, by the
    simulation with nudged pixels, by the file on the simulation's pixels, and by the file on pixels
    that its own preprocessing made."""

    original: Array
    simulated: Array
    nudged: Array
    exported: Array
    served: Array


def parity(
    logits: Logits,
    targets: NDArray[np.int64],
    linears: Mapping[str, float],
    pixel_difference: float,
) -> dict[str, Any]:
    """The section `parity` of the bench's JSON.

    targets: [images], indices of classes; linears: relative error of each; pixel_difference: the
    largest there is between what the two preprocessings make of an image. Besides its numbers a
    stage has `loss`, a sentence, or None where it loses nothing."""
    quantization = _stage(
        "quantization", "float torch", "simulated torch", logits.original, logits.simulated, targets
    )
    export = _stage(
        "export", "simulated torch", "ONNX Runtime", logits.simulated, logits.exported, targets
    )
    preprocessing = _stage(
        "preprocessing",
        "ONNX Runtime",
        "ONNX Runtime, the file's preprocessing",
        logits.exported,
        logits.served,
        targets,
    )
    quantization["loss"] = _quantization_loss(logits, targets)
    export["loss"] = _linear_loss(linears) or _logits_loss(logits)
    preprocessing["loss"] = _preprocessing_loss(pixel_difference)
    stages = [quantization, export, preprocessing]
    return {
        "images": len(targets),
        "stages": stages,
        "first_loss": next((stage["stage"] for stage in stages if stage["loss"]), None),
        "nudged": _closeness(logits.simulated, logits.nudged),
        "pixel_difference": pixel_difference,
        "linears": [{"linear": path, "relative_error": error} for path, error in linears.items()],
    }


def cosines(a: Array, b: Array) -> NDArray[np.float64]:
    """Of each row of a [n, c] with that of b: [n]."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    found: NDArray[np.float64] = (
        (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    )
    return found


def relative_error(found: Array, expected: Array) -> float:
    """The largest over channels of ‖found - expected‖ / ‖expected‖, each over all tokens of that
    channel; [..., channels].

    A single wrong code shows in its own channel and would be lost in a norm over all of them. A
    channel that is 0 throughout is measured by the largest one."""
    difference, size = (
        np.linalg.norm(x.reshape(-1, x.shape[-1]).astype(np.float64), axis=0)
        for x in (found - expected, expected)
    )
    return float((difference / np.where(size > 0, size, size.max() or 1.0)).max())


class LinearsAlone:
    """The quantized linears of a file, each cut out of its graph, to be run by itself: from the
    value that enters to the value that leaves, as the metadata `marrq.linears` names them."""

    def __init__(self, file: Path, settings: SessionSettings) -> None:
        """Raises BenchError when the file does not tell where its linears are."""
        self._model, self._settings = ir.load(file), settings
        described = self._model.metadata_props.get("marrq.linears")
        if described is None:
            raise BenchError(
                f"{str(file)!r} does not say where its linears are: export the artifact again"
            )
        self._parts: dict[str, list[dict[str, str]]] = json.loads(described)

    def run(self, path: str, x: Array) -> Array:
        """The output [..., out] of a linear for an input [..., in]. Where the graph computes some
        tokens only, here all of x are."""
        return np.concatenate(
            [self._run(part["input"], part["output"], x) for part in self._parts[path]], -1
        )

    def scale(self, path: str) -> str | None:
        """Name of the model's tensor [out] (LayerScale) that a linear's output is multiplied by in
        the file, where there is one."""
        return self._parts[path][0].get("scale")

    def _run(self, enters: str, leaves: str, x: Array) -> Array:
        graph = ir.convenience.extract(self._model.graph, [enters], [leaves])
        graph.inputs[0].shape, graph.outputs[0].shape = ir.Shape(x.shape), None
        alone = ir.external_data.load_to_model(ir.Model(graph, ir_version=self._model.ir_version))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "linear.onnx"
            ir.save(alone, file)
            return Model(file, self._settings).run(x)


def _stage(
    stage: str, source: str, target: str, before: Array, after: Array, targets: NDArray[np.int64]
) -> dict[str, Any]:
    right = [float(hits(logits, targets).mean()) for logits in (before, after)]
    names = {"stage": stage, "source": source, "target": target}
    return {**names, **_closeness(before, after), "top1_source": right[0], "top1_target": right[1]}


def _closeness(before: Array, after: Array) -> dict[str, float]:
    found = cosines(before, after)
    agreement = float((before.argmax(1) == after.argmax(1)).mean())
    return {
        "least_cosine": float(found.min()),
        "median_cosine": float(np.median(found)),
        "agreement": agreement,
    }


def _quantization_loss(logits: Logits, targets: NDArray[np.int64]) -> str | None:
    found = paired_drop(hits(logits.original, targets), hits(logits.simulated, targets))
    if found.drop <= 0 or found.p_value >= SIGNIFICANT:
        return None
    return f"{found.only_baseline} images are right in float only, {found.only_model} when quantized only: more than chance explains"


def _linear_loss(linears: Mapping[str, float]) -> str | None:
    wrong = sorted(
        (path for path in linears if not linears[path] <= LINEAR_TOLERANCE),
        key=lambda path: -linears[path],
    )
    if not wrong:
        return None
    others = f", and {len(wrong) - 1} other linears differ too" if len(wrong) > 1 else ""
    return f"{wrong[0]} differs by {linears[wrong[0]]:.1e} from torch on the same input, where {LINEAR_TOLERANCE:g} is allowed{others}"


def _logits_loss(logits: Logits) -> str | None:
    distance, explained = (
        float((1 - cosines(logits.simulated, x)).mean()) for x in (logits.exported, logits.nudged)
    )
    if distance <= AMPLIFICATIONS * explained + LOGITS_TOLERANCE:
        return None
    return (
        f"logits are {distance:.1e} from torch's in the mean (1 - cosine), where a nudge of the "
        "pixels by a millionth moves them by "
        f"{explained:.1e}; no linear is at fault, so it lies between them"
    )


def _preprocessing_loss(pixel_difference: float) -> str | None:
    if pixel_difference <= PIXEL_TOLERANCE:
        return None
    return f"pixels differ by up to {pixel_difference:.1e} from those that the model was quantized for: the file's preprocessing is another"
