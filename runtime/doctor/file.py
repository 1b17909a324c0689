"""What an ONNX file needs, and whether ONNX Runtime here opens it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from runtime.audit.graph import Graph
from runtime.doctor.gpu import without_cuda_kernel
from runtime.doctor.machine import import_session
from runtime.doctor.releases import NEWEST, loads_under, lowest_onnxruntime
from runtime.doctor.tensorrt import BrokenRule, Level, broken_rules
from runtime.errors import BenchError
from runtime.records import Record

# What to do about nodes without a CUDA kernel, by what marrq made the file for.
WAYS_TO_GPU: dict[str | None, str] = {
    "cpu": "export it with --device gpu",
    "gpu": "export it with --flavor folded",
}

# What to do about broken rules of TensorRT's in a file that marrq wrote.
WAY_TO_TENSORRT = (
    "quantize with --scheme W8A8-sym, or a scheme like W4A16-g128-sym, then export with --flavor "
    "qdq --symmetric"
)

# Name of the domain that files leave empty.
STANDARD = "ai.onnx"
ATTENTION_OPSET = 23
"""The opset that a file of marrq asks for if it has Attention as one operator."""

# Where in ONNX Runtime an error was raised: a file, a line and a C++ signature.
SOURCE_LINE = re.compile(r"/[^\s:]+\.(?:cc|h):\d+ .*?\) (?:const )?")


@dataclass(frozen=True)
class FileFacts(Record):
    """What an ONNX file needs, and whether it has that here."""

    path: str
    # The tool that wrote the file, with its version.
    producer: str
    # Version by domain.
    opsets: dict[str, int]
    ir_version: int
    # Number of nodes by domain.
    operators: dict[str, int]
    # Of operators that are neither standard nor defined in the file.
    other_domains: tuple[str, ...]
    # First release that loads the file; None if the file is newer than all that was tried.
    lowest_onnxruntime: str | None
    # Whether the file says that release itself.
    stated: bool
    # Files with its tensors, and whether they are there.
    external_data: dict[str, bool]
    # Why ONNX Runtime does not open it here; None if it does.
    load_error: str | None
    # What marrq made the file for, cpu or gpu; None for a file of another tool.
    device: str | None
    # Number of nodes by operator that have no CUDA kernel; None if no GPU was asked about.
    without_cuda_kernel: dict[str, int] | None
    # What TensorRT would not take; None if it was not asked about.
    tensorrt: tuple[BrokenRule, ...] | None

    @property
    def versions(self) -> str:
        """What runtime/doctor/releases.py is asked about."""
        return f"opset {self.opsets[STANDARD]} with IR version {self.ir_version}"

    @property
    def problems(self) -> list[str]:
        """What keeps the file from being loaded here."""
        # A missing file is the cause; the error of ONNX Runtime would only repeat it.
        missing = ", ".join(name for name, there in self.external_data.items() if not there)
        if missing:
            return [
                f"{self.path!r} has tensors in {missing}, missing here: copy that to where the "
                "file is"
            ]
        own = [] if self.load_error is None else [self.load_error]
        return [*own, *self._for_gpu, *self.broken("problem")]

    @property
    def _for_gpu(self) -> list[str]:
        """A sentence if nodes would run on the CPU with copies to and fro."""
        if not self.without_cuda_kernel:
            return []
        counted = ", ".join(f"{n} × {operator}" for operator, n in self.without_cuda_kernel.items())
        way = WAYS_TO_GPU.get(self.device, "write it with a lower opset, or with other operators")
        return [
            f"{self.path!r} would run nodes on the CPU in the midst of the GPU's: ONNX Runtime's "
            f"CUDA provider has no kernel for {counted}; {way}"
        ]

    @property
    def warnings(self) -> list[str]:
        """What cannot be known of the file from its versions."""
        about_tensorrt = self.broken("warning")
        # marrq tried the release that its files state, with their operators.
        if not self.other_domains or self.stated:
            return about_tensorrt
        return [
            *about_tensorrt,
            f"the operators of {', '.join(self.other_domains)} are not covered by what "
            f"{self.versions} tells about {self.path!r}: a server's ONNX Runtime may lack them, so "
            "try it there",
        ]

    def broken(self, level: Level) -> list[str]:
        """The broken rules of TensorRT's, a sentence for each: what the first node breaks it with,
        and how many others do. `tensorrt` has the sentence of every node."""
        rules: dict[str, list[BrokenRule]] = {}
        for one in self.tensorrt or ():
            if one.level == level:
                rules.setdefault(one.rule, []).append(one)
        return [
            f"TensorRT, {_named([one.node for one in found])}{found[0].sentence}"
            for found in rules.values()
        ]

    @property
    def way_to_tensorrt(self) -> str | None:
        """What mends every broken rule of a file that marrq wrote; None if nothing is to mend, and
        for a file of another tool."""
        return WAY_TO_TENSORRT if self.device is not None and self.broken("problem") else None

    def server_problem(self, server: str) -> str | None:
        """Why an ONNX Runtime of that version does not load the file, or may not; None if it
        does."""
        if loads_under(server, self.lowest_onnxruntime):
            return None
        if self.lowest_onnxruntime is None:
            return (
                f"no ONNX Runtime up to {NEWEST} was seen to load {self.versions}, as "
                f"{self.path!r} has it: convert it to lower ones"
            )
        # A file of another tool was not tried: its versions are all that is known.
        seen, way = f"load {self.versions}", "convert the file to lower ones"
        if self.stated:
            # Attention of opset 23 can be left out; of codes the bits decide.
            fused = self.opsets[STANDARD] == ATTENTION_OPSET
            way = "export with --no-fuse" if fused else "quantize to other bits, which need less"
            seen, way = "run it", f"{way} (exporters/README.md)"
        return (
            f"ONNX Runtime {server} is too old for {self.path!r}: {self.lowest_onnxruntime} is the "
            f"first that was seen to {seen}; update the server, or {way}"
        )


def examine_file(path: Path, tensorrt: bool = False, device: str | None = None) -> FileFacts:
    """Look an ONNX file through, and open it. Raises BenchError if it is not a whole ONNX file.

    tensorrt: hold it against TensorRT's rules too. device: that is to run it, cpu or gpu, or None.
    """
    graph = Graph.load(path)
    model = graph.model
    # A file that names no opset is of opset 1.
    opsets = {STANDARD: 1} | {_domain(entry.domain): entry.version for entry in model.opset_import}
    operators = Counter(_domain(node.domain) for node in _nodes(model.graph.node))
    stated = graph.metadata.lowest_onnxruntime
    return FileFacts(
        path=str(path),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opsets=opsets,
        ir_version=model.ir_version,
        operators=dict(operators.most_common()),
        other_domains=tuple(sorted(set(operators) - {STANDARD})),
        lowest_onnxruntime=stated or lowest_onnxruntime(opsets[STANDARD], model.ir_version),
        stated=stated is not None,
        external_data={name: (path.parent / name).is_file() for name in _external_data(graph)},
        load_error=_load_error(path),
        device=graph.metadata.device if graph.metadata.is_marrqs else None,
        without_cuda_kernel=without_cuda_kernel(graph) if device == "gpu" else None,
        tensorrt=tuple(broken_rules(graph, path.parent)) if tensorrt else None,
    )


def _named(nodes: list[str]) -> str:
    """`'blocks.0.mlp.fc1/MatMul_3' and 23 others: `; empty for the whole file."""
    if nodes == [""]:
        return ""
    others = len(nodes) - 1
    counted = f" and {others} other{'s' if others > 1 else ''}" if others else ""
    return f"{nodes[0]!r}{counted}: "


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            # If, Loop and Scan hold graphs in their attributes.
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body.node)


def _domain(name: str) -> str:
    return name or STANDARD


def _external_data(graph: Graph) -> list[str]:
    """Files that hold tensors of the graph, as the graph names them."""
    outside = filter(uses_external_data, graph.initializers.values())
    entries = (entry for tensor in outside for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def _load_error(path: Path) -> str | None:
    """Why ONNX Runtime does not open the file on the CPU; None if it does."""
    try:
        # On the CPU, which every ONNX Runtime has.
        session = import_session()
        session.Model(path, session.SessionSettings(threads=1))
    except BenchError as error:
        # A path of the machine that ONNX Runtime was built on tells a user nothing.
        return SOURCE_LINE.sub(" ", str(error))
    return None
