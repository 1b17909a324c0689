"""Tokens that the head does not read are not computed behind the last attention.

Most ViTs read the class token alone. If x = f(g(…)) works token by token,

    Gather(f(g(y)), token)  =  f(g(Gather(y, token)))

so the Gather moves up to the last operator that mixes tokens. In that operator, an Attention, only
the queries are narrowed; keys and values need every token. No token's own arithmetic changes. For a
ViT of 12 blocks the pass takes away a fifteenth of the forward.
"""

import numpy as np
import onnx_ir as ir

from exporters.graph import add_constant, ancestors, dimensions, integers_of
from exporters.passes.multi_head import OPERATOR as MULTI_HEAD
from exporters.trace import PLACEHOLDER

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
    """Compute a value [b, n, c] only at the tokens that its readers take, if all readers take a
    single token each. An output of the graph keeps all its tokens."""
    given = set(graph.outputs)
    gathered = [node.inputs[0] for node in graph if node.op_type == "Gather"]
    for value in dict.fromkeys(gathered):
        if value is None or value in given:
            continue
        read = {reader: _token_read(reader) for reader in value.consumers()}
        # Readers may take different tokens, as a distilled model's two heads do.
        tokens = sorted({token for token in read.values() if token is not None})
        if not tokens or None in read.values():
            continue
        # All readers share one narrowed value.
        narrowed = _Narrowing(graph, value, tokens).of(value)
        for reader, token in read.items():
            assert token is not None  # checked above
            reader.replace_input_with(0, narrowed)
            # The token's place among those that are left.
            place = add_constant(graph, f"{reader.name}_token", np.array(tokens.index(token)))
            reader.replace_input_with(1, place)
    # New nodes were appended at the end, behind their readers.
    graph.sort()


class _Narrowing:
    """Copies of values [b, n, c] for some of the n tokens: [b, tokens, c].

    last: the value that the readers gather from. whole: values that some operator needs at every
    token; they are gathered from instead of computed again.
    """

    def __init__(self, graph: ir.Graph, last: ir.Value, tokens: list[int]) -> None:
        self.graph, self.length, self.tokens = graph, dimensions(last)[1], tokens
        self.indices = add_constant(graph, f"{last.name}_tokens", np.array(tokens))
        self.made: dict[ir.Value, ir.Value] = {}
        self.whole: set[ir.Value] = set()
        # What another output is computed from is there at every token.
        self.whole |= _computed_without(graph, last)
        # Only operators that the value depends on can need its tokens.
        before = ancestors([last])
        for node in graph:
            if not _is_tokenwise(node) and before.intersection(node.outputs):
                # Attention needs keys and values at every token, but not the queries.
                needed = node.inputs[1 if _is_attention(node) else 0 :]
                self.whole |= ancestors(needed)

    def of(self, value: ir.Value) -> ir.Value:
        """The value at the chosen tokens; a value without a token axis stays."""
        # Weights and constants are broadcast over the tokens.
        if len(dimensions(value)) < 3 or dimensions(value)[1] != self.length:
            return value
        if value not in self.made:
            self.made[value] = self._remade(value)
        return self.made[value]

    def _remade(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        # A value that is there at every token anyway is read, not computed again.
        if node is None or value in self.whole or not (_is_tokenwise(node) or _is_attention(node)):
            made = ir.node(
                "Gather", [value, self.indices], attributes={"axis": 1}, name=f"{value.name}_read"
            )
        else:
            made = self._on_narrowed_inputs(node)
        result = made.outputs[0]
        result.name, result.type = f"{value.name}_read", value.type
        batch, _, channels = dimensions(value)
        result.shape = ir.Shape([batch, len(self.tokens), channels])
        self.graph.append(made)
        return result

    def _on_narrowed_inputs(self, node: ir.Node) -> ir.Node:
        """A copy of the node whose inputs are narrowed; of an Attention only the queries."""
        # Keys, values and whatever else an Attention reads stay whole.
        narrowed = 1 if _is_attention(node) else len(node.inputs)
        inputs = [
            self.of(value) if value is not None and index < narrowed else value
            for index, value in enumerate(node.inputs)
        ]
        attributes = node.attributes.values()
        return ir.Node(node.domain, node.op_type, inputs, attributes, name=f"{node.name}_read")


def _computed_without(graph: ir.Graph, last: ir.Value) -> set[ir.Value]:
    """The values that the outputs of a graph are computed from on ways around `last`."""
    found, waiting = set[ir.Value](), [value for value in graph.outputs if value is not last]
    while waiting:
        value = waiting.pop()
        if value is not last and value not in found:
            found.add(value)
            node = value.producer()
            waiting += [x for x in (node.inputs if node is not None else ()) if x is not None]
    return found


def _token_read(reader: ir.Node) -> int | None:
    """The token that a Gather takes from [b, n, c]; None if the node does anything else."""
    if reader.op_type != "Gather" or reader.attributes["axis"].as_int() != 1:
        return None
    # A Gather with a scalar index removes the token axis.
    if len(dimensions(reader.outputs[0])) != 2:
        return None
    # A negative index would need the number of tokens.
    found = integers_of(reader.inputs[1])
    return found[0] if found is not None and found[0] >= 0 else None


def _is_tokenwise(node: ir.Node) -> bool:
    """Whether the node makes each token from the same token of its inputs."""
    if node.op_type == "MatMul":
        weight = node.inputs[1]
        # A constant matrix multiplies the channels of each token.
        return (
            weight is not None and weight.const_value is not None and len(dimensions(weight)) == 2
        )
    return node.op_type in TOKENWISE


def _is_attention(node: ir.Node) -> bool:
    """Whether the node is an attention on tokens [b, n, h d] without a mask.

    With a mask, the mask's rows would have to be narrowed too.
    """
    is_on_tokens = "q_num_heads" in node.attributes or node.op_type == MULTI_HEAD
    return node.op_type in ("Attention", MULTI_HEAD) and is_on_tokens and len(node.inputs) == 3
