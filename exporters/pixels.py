"""Normalization inside the graph: a client sends the resized image as it is.

    pixels, uint8 [batch, height, width, channels], red first
        → red and blue exchanged, if the model has blue first
        → (x / 255 - mean) / std
        → float32 [batch, channels, height, width]

The operations are those of marrq/models/preprocessing.py, in the same order and in float32, so that
the model reads the same numbers. Resizing stays with the client, because no ONNX operator resizes
as Pillow or torchvision does. A model whose images are no 8-bit pixels between resizing and
normalization is refused.
"""

import numpy as np
import onnx_ir as ir

from exporters.graph import add_constant
from marrq.errors import MarrqError
from marrq.models.preprocessing import Preprocessing

CHANNELS_FIRST = [0, 3, 1, 2]


def take_images(graph: ir.Graph, preprocessing: Preprocessing) -> None:
    """Put the normalization before a graph with one float32 input.

    The new input keeps the name of the old one. Raises MarrqError if the model's images are no
    8-bit pixels.
    """
    if preprocessing.crop_mode == "corner" or preprocessing.resampling == "float32-tensor":
        raise MarrqError(
            "the model's images are no 8-bit pixels between resizing and normalization, so the "
            "graph cannot take them: leave --preprocess out"
        )
    # The input that the trace has: normalized pixels, channels first.
    [normalized] = graph.inputs
    assert normalized.name is not None
    assert normalized.shape is not None
    channels, height, width = preprocessing.input_size
    shape = ir.Shape([normalized.shape[0], height, width, channels])
    images = ir.Value(name=normalized.name, shape=shape, type=ir.TensorType(ir.DataType.UINT8))
    # From uint8, channels last, as an image library gives an image.
    to_float = {"to": int(ir.DataType.FLOAT)}
    nodes = [ir.node("Cast", [images], attributes=to_float, name="pixels/Cast")]
    if preprocessing.bgr:
        # A fourth channel keeps its place.
        order = np.array([2, 1, 0, *range(3, channels)], np.int64)
        order_value = add_constant(graph, "pixels/Gather.constant", order)
        inputs, last = [nodes[-1].outputs[0], order_value], {"axis": 3}
        nodes.append(ir.node("Gather", inputs, attributes=last, name="pixels/Gather"))
    steps = (("Div", 255), ("Sub", preprocessing.mean), ("Div", preprocessing.std))
    for op_type, numbers in steps:
        # mean and std are per channel, which is the last axis here.
        name = f"pixels/{op_type}_{len(nodes)}"
        constant = add_constant(graph, f"{name}.constant", np.array(numbers, np.float32))
        nodes.append(ir.node(op_type, [nodes[-1].outputs[0], constant], name=name))
    turn = {"perm": CHANNELS_FIRST}
    # [batch, height, width, channels] → [batch, channels, height, width]
    nodes.append(ir.node("Transpose", nodes[-1].outputs, attributes=turn, name="pixels/Transpose"))
    for node in nodes:
        node.outputs[0].name = node.name
    # The rest of the graph reads the result in place of its old input.
    normalized.replace_all_uses_with(nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)
    graph.inputs[0] = images
