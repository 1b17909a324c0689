"""The doctor's report as a table for people."""

from collections.abc import Sequence

from rich.table import Table

from runtime.doctor.diagnose import Diagnosis, RepositoryModel, ServedFile
from runtime.doctor.machine import ExaminedMachine, TorchBuild
from runtime.doctor.releases import NEWEST
from runtime.doctor.tensorrt import BrokenRule
from runtime.environment import ONNXRUNTIME_PACKAGES
from runtime.gpu import Gpu

# Domain of the operators that ONNX Runtime brings.
CONTRIBUTED = "com.microsoft"

# Heading and text.
Line = tuple[str, str]


def diagnosis_table(report: Diagnosis) -> Table:
    """The report for people. Fits 100 columns."""
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    lines = _machine_lines(report.machine)
    lines += [("model", _served(model)) for model in report.models]
    for file in report.files:
        lines += _file_lines(file)
        if report.server:
            lines.append((f"loads under {report.server}", _loads(file)))
    lines += _listed("problems", report.problems or ["none"])
    lines += _listed("warnings", report.warnings)
    for heading, text in lines:
        result.add_row(heading, text)
    return result


def _machine_lines(machine: ExaminedMachine) -> list[Line]:
    packages, found = machine.packages, machine.onnxruntime
    flags = ", ".join(machine.processor_flags)
    # Without flags the system does not tell, and "none" would claim too much.
    dot_products = ", ".join(machine.int8_dot_products) or ("none" if flags else "not known")
    installed = [f"{name} {packages[name]}" for name in ONNXRUNTIME_PACKAGES if name in packages]
    # These have lines of their own.
    shown = (*ONNXRUNTIME_PACKAGES, "torch")
    others = [f"{name} {version}" for name, version in packages.items() if name not in shown]
    torch = packages.get("torch", "version not known")
    return [
        ("processor", f"{machine.processor}, {machine.cores} cores"),
        ("flags", flags or "not told by the system"),
        ("int8 products", dot_products),
        ("system", f"{machine.system}, Python {machine.python}"),
        ("ONNX Runtime", ", ".join(installed) or found.version or "none"),
        ("providers", ", ".join(found.providers) or "none"),
        ("torch", f"{torch}, {_cuda(machine.torch)}" if machine.torch else "not installed"),
        ("packages", ", ".join(others)),
        ("GPU", _gpu(machine.gpu)),
    ]


def _gpu(gpu: Gpu | None) -> str:
    if gpu is None:
        return "nvidia-smi tells of none"
    memory = "" if gpu.memory_mb is None else f", {gpu.memory_mb:.0f} MB"
    clock = "" if gpu.sm_mhz is None else f", {gpu.sm_mhz:.0f} MHz now"
    return f"{gpu.name}, driver {gpu.driver}{memory}{clock}"


def _cuda(torch: TorchBuild) -> str:
    if torch.cuda is None:
        return "built without CUDA"
    finds = "which it finds" if torch.cuda_found else "which it does not find"
    return f"built for CUDA {torch.cuda}, {finds}"


def _file_lines(file: ServedFile) -> list[Line]:
    # None: newer than every release that was tried.
    lowest = file.lowest_onnxruntime or f"later than {NEWEST}"
    source = "its metadata says" if file.stated else "opset and IR version tell"
    beside = [
        f"{name}{'' if there else ' (missing)'}" for name, there in file.external_data.items()
    ]
    producer = file.producer or "a tool that does not say its name"
    missing = file.without_cuda_kernel
    return [
        ("file", f"{file.path}, written by {producer}"),
        ("opsets", f"{_counted(file.opsets)}; IR version {file.ir_version}"),
        ("operators", _counted(file.operators)),
        ("made for", _made_for(file.other_domains)),
        ("lowest", f"ONNX Runtime {lowest}, as {source}"),
        ("data beside it", ", ".join(beside) or "none"),
        ("loads here", "yes" if file.load_error is None else "no"),
        *([] if missing is None else [("CUDA kernels", _kernels(missing))]),
        *([] if file.tensorrt is None else [("TensorRT", _for_tensorrt(file.tensorrt))]),
        *([] if file.way_to_tensorrt is None else [("for TensorRT", file.way_to_tensorrt)]),
    ]


def _kernels(missing: dict[str, int]) -> str:
    """Nodes that have none, by operator; the way out stands below, with the problems."""
    if not missing:
        return "every node has one"
    return f"none for {', '.join(f'{count} × {name}' for name, count in missing.items())}"


def _for_tensorrt(broken: Sequence[BrokenRule]) -> str:
    """Which rules are broken; the sentences stand below, with the problems and warnings."""
    if not broken:
        return "breaks none of the documented rules; it was not run"
    rules = {"problem": dict[str, None](), "warning": dict[str, None]()}
    for one in broken:
        rules[one.level][one.rule] = None
    told = [f"{level}s with {', '.join(names)}" for level, names in rules.items() if names]
    return "; ".join(told)


def _made_for(domains: Sequence[str]) -> str:
    if CONTRIBUTED in domains:
        return f"ONNX Runtime only: operators of {', '.join(domains)}"
    if domains:
        return f"runtimes with operators of {', '.join(domains)}"
    return "every runtime that knows the opset"


def _loads(file: ServedFile) -> str:
    return {True: "yes", False: "no", None: "not known"}[file.loads_on_server]


def _served(model: RepositoryModel) -> str:
    numbers = ", ".join(map(str, model.versions))
    versions = f"versions {numbers}" if numbers else "no version"
    return f"{model.name}, backend {model.backend}, {versions}"


def _counted(numbers: dict[str, int]) -> str:
    """`ai.onnx 21, com.microsoft 1`."""
    return ", ".join(f"{domain} {number}" for domain, number in numbers.items())


def _listed(heading: str, texts: Sequence[str]) -> list[Line]:
    """A line for each text, the heading before the first."""
    return [(heading if place == 0 else "", text) for place, text in enumerate(texts)]
