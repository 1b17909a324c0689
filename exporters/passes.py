"""Small rewrites of a traced graph, made on its placeholders before a flavour lowers them. They
change no integer code and no result beyond float rounding, and take work away that ONNX Runtime
would otherwise do on every token."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.trace import PLACEHOLDER, PLACEHOLDER_DOMAIN


def placeholders(graph: ir.Graph) -> list[ir.Node]:
    """The quantized linears of a traced graph.

    Attributes: `path`; after `split_qkv` also `part`, where it stands for a third of a fused
    linear's rows: q, k or v; after `absorb_scales` also `output_scale` [out], which multiplies its
    output."""
    return [
        node for node in graph if node.op_type == PLACEHOLDER and node.domain == PLACEHOLDER_DOMAIN
    ]


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer, used by nothing else: sharing one could corrupt another's when either is
    rewritten."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def split_qkv(graph: ir.Graph) -> None:
    """A fused qkv projection becomes three products.

    linear → Reshape [b, n, 3, h, d] → Transpose (2, 0, 3, 1, 4) → three times Slice, Squeeze copies
    every value twice; three products give q, k and v apart, each Reshape [b, n, h, d] → Transpose
    (0, 2, 1, 3), for the same arithmetic."""
    for node in placeholders(graph):
        reshape = _only_consumer(node, "Reshape")
        transpose = _only_consumer(reshape, "Transpose")
        if (
            reshape is None
            or transpose is None
            or transpose.attributes["perm"].as_ints() != (2, 0, 3, 1, 4)
        ):
            continue
        parts = [_slice_at(transpose, index) for index in range(3)]
        shape = _constant(reshape.inputs[1])
        if (
            shape is None
            or shape[2] != 3
            or len(transpose.outputs[0].uses()) != 3
            or any(part is None for part in parts)
        ):
            continue
        for index, part in enumerate(parts):
            assert part is not None
            _replace_part(graph, node, reshape, part, index, shape)
        graph.remove([transpose, reshape, node], safe=True)


def absorb_scales(graph: ir.Graph) -> None:
    """LayerScale, a Mul by a constant per channel right after a linear, moves into the linear's
    scales and bias."""
    for node in placeholders(graph):
        multiply = _only_consumer(node, "Mul")
        factor = (
            next((value for value in multiply.inputs if value is not node.outputs[0]), None)
            if multiply
            else None
        )
        if (
            multiply is None
            or factor is None
            or factor.const_value is None
            or factor.const_value.shape != _shape(node)[-1:]
        ):
            continue
        node.attributes["output_scale"] = ir.AttrTensor("output_scale", factor.const_value)
        multiply.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove(multiply, safe=True)


def flatten_patches(graph: ir.Graph) -> None:
    """[b, rows, columns, c] → Transpose (0, 3, 1, 2) → Reshape [b, c, n] → Transpose (0, 2, 1)
    becomes one Reshape: as a linear the patch embedding makes tokens from the start."""
    for first in [
        node for node in graph if node.op_type == "Transpose" and _perm(node) == (0, 3, 1, 2)
    ]:
        reshape = _only_consumer(first, "Reshape")
        last = _only_consumer(reshape, "Transpose")
        patches = first.inputs[0]
        if (
            last is None
            or reshape is None
            or patches is None
            or _perm(last) != (0, 2, 1)
            or len(_shape(last)) != 3
        ):
            continue
        _, rows, columns, channels = _dimensions(patches)
        if list(_shape(last)[1:]) != [rows * columns, channels]:
            continue
        shape = add_constant(graph, f"{last.name}_shape", np.array([0, -1, channels]))
        tokens = ir.node("Reshape", [patches, shape], name=f"{last.name}_tokens")
        tokens.outputs[0].shape, tokens.outputs[0].type = (
            last.outputs[0].shape,
            last.outputs[0].type,
        )
        ir.convenience.replace_nodes_and_values(
            graph, last, [last, reshape, first], [tokens], last.outputs, tokens.outputs
        )


def drop_open_masks(graph: ir.Graph) -> None:
    """An Add of Where(all true, 0, -∞) goes: the mask of a model that hides no token."""
    for node in [node for node in graph if node.op_type == "Where"]:
        condition = _producer(node.inputs[0], "Expand")
        hidden = _array(condition.inputs[0] if condition else node.inputs[0])
        if hidden is None or not hidden.all() or np.any(_array(node.inputs[1])):
            continue
        for added in [
            consumer for consumer in node.outputs[0].consumers() if consumer.op_type == "Add"
        ]:
            [scores] = [
                value
                for value in added.inputs
                if value is not None and value is not node.outputs[0]
            ]
            added.outputs[0].replace_all_uses_with(scores)
            graph.remove(added, safe=True)


def drop_copies(graph: ir.Graph) -> None:
    """A Pad by nothing goes (Swin pads to whole windows), and an Expand before operators that
    broadcast by themselves (Swin v2's norms of queries and keys)."""
    for node in [node for node in graph if node.op_type in ("Pad", "Expand")]:
        padding = _array(node.inputs[1])
        alike = node.op_type == "Expand" and all(
            _broadcasts_to(reader, _shape(node)) for reader in node.outputs[0].consumers()
        )
        if alike or (node.op_type == "Pad" and padding is not None and not padding.any()):
            assert node.inputs[0] is not None
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def _broadcasts_to(node: ir.Node, shape: ir.Shape) -> bool:
    """Whether it is an operator on two inputs of which one has that shape in any case."""
    return node.op_type in ("Add", "Sub", "Mul", "Div") and any(
        value is not None and value.shape == shape and not _producer(value, "Expand")
        for value in node.inputs
    )


def fuse_attention(graph: ir.Graph) -> None:
    """softmax(s q kᵀ + mask) v, two products around a softmax, becomes one Attention.

    Swin's shifted windows, whose mask differs from window to window, stay as they are: with windows
    as heads they could be written so, and take 1.1 to 1.6 times as long (64, 16 and 4 windows of 49
    tokens, one thread). So do Swin v2's cosines, whose factor differs from head to head."""
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        product = _only_consumer(softmax, "MatMul")
        masked = _producer(softmax.inputs[0], "Add")
        scores, mask = masked.inputs if masked is not None else (softmax.inputs[0], None)
        scaled = _producer(scores, "Mul")
        factor = _array(scaled.inputs[1]) if scaled is not None else np.ones(1, np.float32)
        similarity = _producer(scaled.inputs[0] if scaled is not None else scores, "MatMul")
        turned = _producer(similarity.inputs[1], "Transpose") if similarity is not None else None
        if (
            product is None
            or product.inputs[0] is not softmax.outputs[0]
            or factor is None
            or factor.size != 1
            or similarity is None
        ):
            continue
        key = _turned_back(graph, turned)
        if key is None:
            continue
        inputs = [
            similarity.inputs[0],
            key,
            product.inputs[1],
            *([mask] if mask is not None else []),
        ]
        attention = ir.node(
            "Attention",
            inputs,
            attributes={"scale": float(factor.item())},
            name=f"{product.name}_attention",
        )
        attention.outputs[0].shape, attention.outputs[0].type = (
            product.outputs[0].shape,
            product.outputs[0].type,
        )
        ir.convenience.replace_nodes_and_values(
            graph, product, [product], [attention], product.outputs, attention.outputs
        )


def _turned_back(graph: ir.Graph, transpose: ir.Node | None) -> ir.Value | None:
    """K [b, h, n, d] from the Transpose that makes kᵀ [b, h, d, n] of it, or of [b, n, h, d]."""
    if transpose is None or _perm(transpose) not in ((0, 1, 3, 2), (0, 2, 3, 1)):
        return None
    if _perm(transpose) == (0, 1, 3, 2):
        return transpose.inputs[0]
    moved = ir.node(
        "Transpose",
        [transpose.inputs[0]],
        attributes={"perm": [0, 2, 1, 3]},
        name=f"{transpose.name}_back",
    )
    batch, heads, channels, tokens = _dimensions(transpose.outputs[0])
    key = moved.outputs[0]
    key.name, key.type, key.shape = (
        moved.name,
        transpose.outputs[0].type,
        ir.Shape([batch, heads, tokens, channels]),
    )
    graph.insert_after(transpose, moved)
    return key


def attend_on_tokens(graph: ir.Graph) -> None:
    """Attention takes q, k and v as they leave their products, [b, n, h d], and gives its output
    so: it moves the heads itself, in less time than four Transposes take."""
    for node in [node for node in graph if node.op_type == "Attention"]:
        moves = [_producer(value, "Transpose") for value in node.inputs[:3]]
        parts = [_producer(move.inputs[0], "Reshape") if move else None for move in moves]
        back = _only_consumer(node, "Transpose")
        merge = _only_consumer(back, "Reshape")
        if (
            back is None
            or merge is None
            or any(part is None for part in parts)
            or any(_perm(move) != (0, 2, 1, 3) for move in (*moves, back))
        ):
            continue
        heads = [_dimensions(value)[1] for value in node.inputs[:2] if value is not None]
        tokens = [part.inputs[0] for part in parts if part is not None]
        if any(
            value is None or len(_dimensions(value)) != 3 for value in (*tokens, merge.outputs[0])
        ):
            continue
        node.attributes["q_num_heads"], node.attributes["kv_num_heads"] = (
            ir.AttrInt64("q_num_heads", heads[0]),
            ir.AttrInt64("kv_num_heads", heads[1]),
        )
        for index, value in enumerate(tokens):
            node.replace_input_with(index, value)
        node.outputs[0].shape = merge.outputs[0].shape
        merge.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove([merge, back], safe=True)


TOKENWISE = (
    "LayerNormalization",
    "Gelu",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Sigmoid",
    "Tanh",
    "Erf",
    PLACEHOLDER,
)
"""Operators that make each token of their output from the same token of their inputs."""


def drop_unread_tokens(graph: ir.Graph) -> None:
    """Behind the last attention only the tokens that the head reads are computed: most ViTs read
    the class token alone.

    Gather(x, token), with x = f(g(…)) token by token, becomes f(g(Gather(…, token))). In an
    Attention the queries are narrowed, keys and values stay whole; what they are made from is there
    in full and is gathered from. For a ViT of 12 blocks this takes away a fifteenth of the forward.
    Exact: no token's own arithmetic changes."""
    for value in list(dict.fromkeys(node.inputs[0] for node in graph if node.op_type == "Gather")):
        readers = value.consumers() if value is not None else ()
        tokens = sorted({token for reader in readers if (token := _token_read(reader)) is not None})
        if value is None or not tokens or any(_token_read(reader) is None for reader in readers):
            continue
        narrowed = _Narrowing(graph, value, tokens).of(value)
        for reader in readers:
            place = np.array(tokens.index(_token_read(reader) or 0))
            reader.replace_input_with(0, narrowed)
            reader.replace_input_with(1, add_constant(graph, f"{reader.name}_token", place))
    graph.sort()


class _Narrowing:
    """Values [b, n, c] again, for some of the n tokens only: [b, tokens, c]."""

    def __init__(self, graph: ir.Graph, last: ir.Value, tokens: list[int]) -> None:
        self.graph, self.length, self.tokens = graph, _dimensions(last)[1], tokens
        self.indices = add_constant(graph, f"{last.name}_tokens", np.array(tokens))
        self.made: dict[ir.Value, ir.Value] = {}
        before = _ancestors([last])
        mixing = [
            node for node in graph if not _tokenwise(node) and before.intersection(node.outputs)
        ]
        self.whole = {
            value
            for node in mixing
            for value in _ancestors(node.inputs[1 if _on_tokens(node) else 0 :])
        }

    def of(self, value: ir.Value) -> ir.Value:
        """The value for those tokens, or itself where it has no tokens."""
        if len(_dimensions(value)) < 3 or _dimensions(value)[1] != self.length:
            return value
        if value not in self.made:
            self.made[value] = self._remade(value)
        return self.made[value]

    def _remade(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        if node is None or value in self.whole or not (_tokenwise(node) or _on_tokens(node)):
            node = ir.node(
                "Gather", [value, self.indices], attributes={"axis": 1}, name=f"{value.name}_read"
            )
        else:
            narrow = 1 if _on_tokens(node) else len(node.inputs)
            inputs = [
                self.of(given) if given is not None else None for given in node.inputs[:narrow]
            ] + list(node.inputs[narrow:])
            node = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                node.attributes.values(),
                name=f"{node.name}_read",
            )
        result = node.outputs[0]
        result.name, result.type = f"{value.name}_read", value.type
        batch, _, channels = _dimensions(value)
        result.shape = ir.Shape([batch, len(self.tokens), channels])
        self.graph.append(node)
        return result


def _only_consumer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The node that uses the output of `node`, where it is the only one and of that type."""
    consumers = node.outputs[0].consumers() if node is not None else ()
    return consumers[0] if len(consumers) == 1 and consumers[0].op_type == op_type else None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, where it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _token_read(reader: ir.Node) -> int | None:
    """The token that a node takes out of [b, n, c], where it does just that."""
    if (
        reader.op_type != "Gather"
        or reader.attributes["axis"].as_int() != 1
        or len(_dimensions(reader.outputs[0])) != 2
    ):
        return None
    found = _constant(reader.inputs[1])
    return found[0] if found is not None and found[0] >= 0 else None


def _tokenwise(node: ir.Node) -> bool:
    """Whether it makes each token from the same token of its inputs."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return node.op_type in TOKENWISE or (
        weight is not None and weight.const_value is not None and len(_dimensions(weight)) == 2
    )


def _on_tokens(node: ir.Node) -> bool:
    """Whether it is an Attention of [b, n, h d], without a mask."""
    return (
        node.op_type == "Attention" and "q_num_heads" in node.attributes and len(node.inputs) == 3
    )


def _ancestors(values: Iterable[ir.Value | None]) -> set[ir.Value]:
    """The values, and all that they are made from."""
    found, waiting = set[ir.Value](), list(values)
    while waiting:
        value = waiting.pop()
        if value is not None and value not in found:
            found.add(value)
            producer = value.producer()
            waiting += producer.inputs if producer is not None else ()
    return found


def _perm(node: ir.Node | None) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if node is not None else ()


def _dimensions(value: ir.Value) -> list[Any]:
    assert value.shape is not None  # the tracer knows every shape
    return list(value.shape)


def _shape(node: ir.Node) -> ir.Shape:
    shape = node.outputs[0].shape
    assert shape is not None  # the tracer knows every shape
    return shape


def _constant(value: ir.Value | None) -> list[int] | None:
    """A constant integer vector, or None."""
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _array(value: ir.Value | None) -> np.ndarray | None:
    """A constant, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _slice_at(transpose: ir.Node, index: int) -> ir.Node | None:
    """The Squeeze that gives entry `index` of the first axis, where one Slice leads to it."""
    for consumer in transpose.outputs[0].consumers():
        if consumer.op_type == "Slice" and [_constant(value) for value in consumer.inputs[1:4]] == [
            [index],
            [index + 1],
            [0],
        ]:
            return _only_consumer(consumer, "Squeeze")
    return None


def _replace_part(
    graph: ir.Graph,
    node: ir.Node,
    reshape: ir.Node,
    squeeze: ir.Node,
    index: int,
    shape: Sequence[int],
) -> None:
    """Put the product of one third of the rows in the place of one Squeeze, and remove it with its
    Slice."""
    taken = squeeze.inputs[0].producer() if squeeze.inputs[0] is not None else None
    assert taken is not None
    name = f"{node.name}_{'qkv'[index]}"
    attributes = {"path": node.attributes["path"].as_string(), "part": "qkv"[index]}
    part = ir.node(
        PLACEHOLDER, node.inputs, domain=PLACEHOLDER_DOMAIN, attributes=attributes, name=name
    )
    part.outputs[0].name, part.outputs[0].type = name, node.outputs[0].type
    part.outputs[0].shape = ir.Shape([*_shape(node)[:-1], shape[3] * shape[4]])
    heads = add_constant(graph, f"{name}_heads", np.array([*shape[:2], *shape[3:]], np.int64))
    apart = ir.node(
        "Reshape",
        [part.outputs[0], heads],
        attributes=dict(reshape.attributes),
        name=f"{name}_reshape",
    )
    moved = ir.node(
        "Transpose", apart.outputs, attributes={"perm": [0, 2, 1, 3]}, name=f"{name}_transpose"
    )
    moved.outputs[0].shape, moved.outputs[0].type = _shape(squeeze), squeeze.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        graph,
        squeeze,
        [squeeze, taken],
        [part, apart, moved],
        [squeeze.outputs[0]],
        [moved.outputs[0]],
    )
