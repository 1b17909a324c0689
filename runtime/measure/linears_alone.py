"""The quantized linears of a file, each cut out of its graph and run alone.

A linear's own part of the graph gets the input that the linear has in torch, so that nothing before
it amplifies a difference: what it gives may differ from torch by the rounding of float sums alone.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.errors import BenchError
from runtime.metadata import LinearPart, Metadata
from runtime.session import Model, SessionSettings

Array = NDArray[np.float32]


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
