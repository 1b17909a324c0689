"""What this machine has, what ONNX files need, alone or in a Triton repository, and whether the one
can load the others; for JSON and for people.

    problem    what keeps a file from being loaded, or will: named with the way out
    warning    what may be worse than it looks, or cannot be known from here

The lowest ONNX Runtime of a file stands in its metadata where marrq wrote it. Of other files it
follows from opset and IR version by TRIED, which is a lower bound: a release may know an opset and
have no kernel for one of its operators.

On x86 without dot products of int8, ONNX Runtime multiplies uint8 by int8 with vpmaddubsw, which
adds two products into 16 bits: 2 · 255 · 128 = 65,280 does not fit into 32,767, while 2 · 255 · 8 =
4,080 of 4-bit weights does. Its own advice there is `reduce_range`, 7-bit weights; the session
option `session.x64quantprecision` has it compute slower and exactly."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import onnx
from onnx.external_data_helper import uses_external_data
from rich.markup import escape
from rich.table import Table

from runtime.audit.graph import Graph
from runtime.environment import (
    ONNXRUNTIME_PACKAGES,
    REINSTALL,
    describe_machine,
    installed_versions,
    onnxruntime_conflict,
)
from runtime.errors import BenchError

if TYPE_CHECKING:
    from runtime.doctor.repository import ServedModel

SCHEMA = "marrq.doctor/1"

PACKAGES = (*ONNXRUNTIME_PACKAGES, "torch", "onnx", "timm", "transformers", "tritonclient")

DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Flags of processors that add products of 8-bit integers into 32 bits."""

SATURATES = (
    "this processor has no dot product of int8 (VNNI): ONNX Runtime adds two products of uint8 and "
    "int8 into 16 bits, which saturate with "
    "weight codes beyond -64 … 63; files that marrq writes hold none beside quantized activations, "
    "those of other tools may: for these set "
    "session.x64quantprecision to 1"
)

TRIED = {
    "1.15.0": (18, 9),
    "1.16.0": (19, 9),
    "1.17.0": (20, 9),
    "1.18.0": (21, 10),
    "1.21.0": (22, 10),
    "1.23.0": (23, 11),
    "1.24.1": (25, 13),
    "1.25.0": (26, 13),
    "1.32.0": (28, 14),
}
"""Highest opset and IR version that ONNX Runtime loads from that release on. The first release of
each minor version from 1.15 to 1.32 was seen to load an Identity of every opset from 7 on, with
every IR version from 3 on, up to these, and to refuse the next of either."""

NEWEST = list(TRIED)[-1]

STANDARD = "ai.onnx"
"""Name of the domain that files leave empty."""

CONTRIBUTED = "com.microsoft"
"""Domain of the operators that ONNX Runtime brings."""

METADATA = "marrq.lowest_onnxruntime"

SOURCE_LINE = re.compile(r"/[^\s:]+\.(?:cc|h):\d+ .*?\) (?:const )?")
"""Where in ONNX Runtime an error was raised: a file, a line and a C++ signature."""


@dataclass(frozen=True)
class FileFacts:
    """What an ONNX file needs, and whether it has it here.

    opsets, operators: version and number of nodes by domain; other_domains: of operators that are
    neither standard nor defined in the file; lowest_onnxruntime: None where the file is newer than
    all that was tried; stated: whether the file says it itself; external_data: files with its
    tensors, and whether they are there; load_error: why ONNX Runtime does not open it here, None
    where it does."""

    path: str
    producer: str
    opsets: dict[str, int]
    ir_version: int
    operators: dict[str, int]
    other_domains: list[str]
    lowest_onnxruntime: str | None
    stated: bool
    external_data: dict[str, bool]
    load_error: str | None

    @property
    def versions(self) -> str:
        """What TRIED is asked about."""
        return f"opset {self.opsets[STANDARD]} with IR version {self.ir_version}"


@dataclass(frozen=True)
class Findings:
    """Sentences for people."""

    problems: list[str]
    warnings: list[str]


def parse_version(text: str) -> tuple[int, ...]:
    """Numbers of a version. Raises BenchError where it has something else."""
    parts = text.split(".")
    if not all(part.isdecimal() for part in parts):
        raise BenchError(
            f"{text!r} is no version of ONNX Runtime: give numbers with points between them, like "
            "1.18 or 1.18.1"
        )
    return tuple(map(int, parts))


def lowest_onnxruntime(opset: int, ir_version: int) -> str | None:
    """First release that was seen to load both; None where none did."""
    return next(
        (
            release
            for release, highest in TRIED.items()
            if opset <= highest[0] and ir_version <= highest[1]
        ),
        None,
    )


def loads_under(server: str, lowest: str | None) -> bool | None:
    """Whether an ONNX Runtime is new enough; None where that is not known. A version that leaves
    out its last number stands for all releases that begin so."""
    version = parse_version(server)
    if lowest is not None:
        return version >= parse_version(lowest)[: len(version)]
    return None if version > parse_version(NEWEST)[: len(version)] else False


def examine_machine(torch: dict[str, Any] | None) -> dict[str, Any]:
    """Processor, system, packages and providers, as JSON. torch: `cuda` that it was built for and
    `cuda_found`, None without torch."""
    described = describe_machine()
    return {
        **described,
        "int8_dot_products": [
            flag for flag in described["processor_flags"] if flag in DOT_PRODUCTS
        ],
        "packages": installed_versions(PACKAGES),
        "onnxruntime": _examine_onnxruntime(),
        "torch": torch,
    }


def _examine_onnxruntime() -> dict[str, Any]:
    """The one that is imported; error: why none can be."""
    try:
        session = _session()
    except BenchError as error:
        return {"version": None, "providers": [], "error": str(error)}
    return {
        "version": session.ONNXRUNTIME_VERSION,
        "providers": session.available_providers(),
        "error": None,
    }


def _session() -> ModuleType:
    """The module that needs ONNX Runtime. Raises BenchError where that cannot be imported."""
    try:
        from runtime import session
    except AttributeError as error:  # where one of two packages was uninstalled, the other is an empty folder that can be imported
        raise BenchError(f"what is installed of ONNX Runtime is not whole: {REINSTALL}") from error
    return session


def examine_file(path: Path) -> FileFacts:
    """Look an ONNX file through and open it. Raises BenchError for a file that is none."""
    graph = Graph.load(path)
    model = graph.model
    opsets = {STANDARD: 1} | {_domain(entry.domain): entry.version for entry in model.opset_import}
    operators = Counter(
        _domain(node.domain)
        for body in (model.graph, *model.functions)
        for node in _nodes(body.node)
    )
    stated = graph.metadata.get(METADATA)
    return FileFacts(
        path=str(path),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opsets=opsets,
        ir_version=model.ir_version,
        operators=dict(operators.most_common()),
        other_domains=sorted(
            set(operators) - {STANDARD} - {function.domain for function in model.functions}
        ),
        lowest_onnxruntime=stated or lowest_onnxruntime(opsets[STANDARD], model.ir_version),
        stated=stated is not None,
        external_data={name: (path.parent / name).is_file() for name in _external_data(graph)},
        load_error=_load_error(path),
    )


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body.node)


def _domain(name: str) -> str:
    return name or STANDARD


def _external_data(graph: Graph) -> list[str]:
    """Files that hold tensors of the graph, as it names them."""
    outside = filter(uses_external_data, graph.initializers.values())
    return sorted(
        {
            entry.value
            for tensor in outside
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )


def _load_error(path: Path) -> str | None:
    """Why ONNX Runtime does not open the file on the CPU; None where it does."""
    try:
        session = _session()
        session.Model(path, session.SessionSettings(threads=1))
    except BenchError as error:
        return SOURCE_LINE.sub(" ", str(error))
    return None


def diagnose(
    machine: dict[str, Any],
    files: Sequence[FileFacts] = (),
    version: str | None = None,
    models: Sequence["ServedModel"] = (),
) -> dict[str, Any]:
    """Facts and verdicts, as JSON. version: of the ONNX Runtime that a server is to load the files
    with, None where none was asked about; models: of the repository that the files are in."""
    found = [_about_machine(machine), *map(_about_file, files)]
    found += [_about_model(model) for model in models]
    loads = (
        {}
        if version is None
        else {file.path: loads_under(version, file.lowest_onnxruntime) for file in files}
    )
    found += [
        _about_server(file, str(version), loads[file.path]) for file in files if file.path in loads
    ]
    return {
        "schema": SCHEMA,
        "machine": machine,
        "files": [asdict(file) | {"loads_on_server": loads.get(file.path)} for file in files],
        "models": [
            {"name": model.name, "backend": model.backend, "versions": list(model.versions)}
            for model in models
        ],
        "server": version,
        "problems": list(
            dict.fromkeys(sentence for each in found for sentence in each.problems)
        ),  # file and machine may have the same
        "warnings": [sentence for each in found for sentence in each.warnings],
    }


def _about_machine(machine: dict[str, Any]) -> Findings:
    faults = (onnxruntime_conflict(machine["packages"]), machine["onnxruntime"]["error"])
    saturates = (
        "avx" in machine["processor_flags"] and not machine["int8_dot_products"]
    )  # avx tells that it is x86
    return Findings(
        problems=[fault for fault in faults if fault is not None],
        warnings=[SATURATES] if saturates else [],
    )


def _about_file(file: FileFacts) -> Findings:
    missing = ", ".join(name for name, there in file.external_data.items() if not there)
    fault = (
        f"{file.path!r} has tensors in {missing}, missing here: copy that to where the file is"
        if missing
        else file.load_error
    )
    unknown = (
        f"the operators of {', '.join(file.other_domains)} are not covered by what {file.versions} "
        f"tells about {file.path!r}: "
        "a server's ONNX Runtime may lack them, so try it there"
    )
    return Findings(
        [] if fault is None else [fault],
        [unknown] if file.other_domains and not file.stated else [],
    )


def _about_model(model: "ServedModel") -> Findings:
    return Findings(
        *(
            [f"{model.name}: {sentence}" for sentence in sentences]
            for sentences in (model.problems, model.warnings)
        )
    )


def _about_server(file: FileFacts, onnxruntime: str, loads: bool | None) -> Findings:
    if loads:
        return Findings([], [])
    if file.lowest_onnxruntime is None:
        reason = f"no ONNX Runtime up to {NEWEST} was seen to load {file.versions}, as {file.path!r} has it: convert it to lower ones"
        return Findings([], [reason]) if loads is None else Findings([reason], [])
    first = f"{file.lowest_onnxruntime} is the first that was seen to {'run it' if file.stated else f'load {file.versions}'}"
    way = (
        "export with --no-fuse, or a flavour that needs less"
        if file.stated
        else "convert the file to lower ones"
    )
    return Findings(
        [
            f"ONNX Runtime {onnxruntime} is too old for {file.path!r}: {first}; update the server, "
            f"or {way}"
        ],
        [],
    )


def diagnosis(report: dict[str, Any]) -> Table:
    """The report for people. Fits 100 columns."""
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    lines = _machine_lines(report["machine"])
    lines += [("model", _served(model)) for model in report["models"]]
    for file in report["files"]:
        lines += _file_lines(file) + (
            [_server_line(report["server"], file)] if report["server"] else []
        )
    lines += _listed("problems", report["problems"] or ["none"]) + _listed(
        "warnings", report["warnings"]
    )
    for heading, text in lines:
        result.add_row(heading, escape(text))
    return result


def _machine_lines(machine: dict[str, Any]) -> list[tuple[str, str]]:
    packages, found = machine["packages"], machine["onnxruntime"]
    flags = ", ".join(machine["processor_flags"])
    installed = [f"{name} {packages[name]}" for name in ONNXRUNTIME_PACKAGES if name in packages]
    others = [
        f"{name} {version}"
        for name, version in packages.items()
        if name not in (*ONNXRUNTIME_PACKAGES, "torch")
    ]
    return [
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("flags", flags or "not told by the system"),
        (
            "int8 products",
            ", ".join(machine["int8_dot_products"]) or ("none" if flags else "not known"),
        ),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("ONNX Runtime", ", ".join(installed) or found["version"] or "none"),
        ("providers", ", ".join(found["providers"]) or "none"),
        (
            "torch",
            f"{packages.get('torch', 'version not known')}, {_cuda(machine['torch'])}"
            if machine["torch"]
            else "not installed",
        ),
        ("packages", ", ".join(others)),
    ]


def _cuda(torch: dict[str, Any]) -> str:
    if torch["cuda"] is None:
        return "built without CUDA"
    return f"built for CUDA {torch['cuda']}, {'which it finds' if torch['cuda_found'] else 'which it does not find'}"


def _file_lines(file: dict[str, Any]) -> list[tuple[str, str]]:
    lowest = f"ONNX Runtime {file['lowest_onnxruntime'] or f'later than {NEWEST}'}"
    beside = [
        f"{name}{'' if there else ' (missing)'}" for name, there in file["external_data"].items()
    ]
    return [
        (
            "file",
            f"{file['path']}, written by {file['producer'] or 'a tool that does not say its name'}",
        ),
        ("opsets", f"{_counted(file['opsets'])}; IR version {file['ir_version']}"),
        ("operators", _counted(file["operators"])),
        ("made for", _made_for(file["other_domains"])),
        (
            "lowest",
            f"{lowest}, as "
            f"{'its metadata says' if file['stated'] else 'opset and IR version tell'}",
        ),
        ("data beside it", ", ".join(beside) or "none"),
        ("loads here", "yes" if file["load_error"] is None else "no"),
    ]


def _made_for(domains: list[str]) -> str:
    if CONTRIBUTED in domains:
        return f"ONNX Runtime only: operators of {', '.join(domains)}"
    return (
        f"runtimes with operators of {', '.join(domains)}"
        if domains
        else "every runtime that knows the opset"
    )


def _server_line(version: str, file: dict[str, Any]) -> tuple[str, str]:
    return f"loads under {version}", {True: "yes", False: "no", None: "not known"}[
        file["loads_on_server"]
    ]


def _served(model: dict[str, Any]) -> str:
    versions = ", ".join(map(str, model["versions"]))
    return f"{model['name']}, backend {model['backend']}, {f'versions {versions}' if versions else 'no version'}"


def _counted(numbers: dict[str, int]) -> str:
    """`ai.onnx 21, com.microsoft 1`."""
    return ", ".join(f"{domain} {number}" for domain, number in numbers.items())


def _listed(heading: str, texts: list[str]) -> list[tuple[str, str]]:
    """A line for each text, the heading before the first."""
    return [(heading if place == 0 else "", text) for place, text in enumerate(texts)]
