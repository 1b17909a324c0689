"""The doctor's report (schema marrq.doctor/1): what this machine has, what ONNX files need, and
whether this machine, or a server, can load them. The files may be in a Triton repository.

    problem    what keeps a file from being loaded, or will: named with the way out
    warning    what may be worse than it looks, or cannot be known from here
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.doctor.file import FileFacts, examine_file
from runtime.doctor.machine import WITHOUT_CUDA, ExaminedMachine, TorchBuild, examine_machine
from runtime.doctor.releases import loads_under, parse_version
from runtime.errors import GateError
from runtime.records import Json, Record

if TYPE_CHECKING:
    from runtime.doctor.repository import ServedModel

SCHEMA = "marrq.doctor/1"


@dataclass(frozen=True)
class ServedFile(FileFacts):
    """A file, and whether a server loads it. loads_on_server: None if no server was asked about,
    and if that is not known."""

    loads_on_server: bool | None


@dataclass(frozen=True)
class RepositoryModel(Record):
    """A model of a Triton repository. versions: numbers of its version folders."""

    name: str
    backend: str
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Diagnosis(Record):
    """Facts and verdicts."""

    machine: ExaminedMachine
    files: tuple[ServedFile, ...]
    # Of the repository that the files are in.
    models: tuple[RepositoryModel, ...]
    # Version of the ONNX Runtime that was asked about, or None.
    server: str | None
    # What keeps a file from being loaded, or will.
    problems: tuple[str, ...]
    # What may be worse than it looks, or cannot be known from here.
    warnings: tuple[str, ...]

    def to_json(self) -> Json:
        """Schema marrq.doctor/1."""
        return {"schema": SCHEMA, **super().to_json()}

    def demand_no_problem(self) -> None:
        """Raise GateError if there is a problem. Its sentence counts them: the table, which stands
        above it, has their texts."""
        if not self.problems:
            return
        # A sentence for each rule; one that two files break alike is counted once.
        of_tensorrt = {sentence for file in self.files for sentence in file.broken("problem")}
        rules = len(of_tensorrt.intersection(self.problems))
        others = len(self.problems) - rules
        told = [
            *([f"{_number(rules, 'rule')} of TensorRT {_is(rules)} broken"] if rules else []),
            *([f"{_number(others, 'problem')} {_is(others)} found"] if others else []),
        ]
        raise GateError(f"{' and '.join(told)}, see above")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _is(count: int) -> str:
    return "are" if count > 1 else "is"


def examine(
    path: Path | None,
    server: str | None,
    torch: TorchBuild | None,
    tensorrt: bool = False,
    device: str | None = None,
) -> Diagnosis:
    """Examine this machine, and a file or a repository.

    path: an ONNX file, a folder with a Triton repository, or None.
    server: version of the ONNX Runtime that is to load the files; None if none is asked about.
    tensorrt: hold the files against TensorRT's rules too.
    device: that is to run the files, cpu or gpu; None if none is asked about.

    Raises BenchError for a version, a file or a folder that is none.
    """
    if server is not None:
        # Before anything is examined: a typo in the version is told at once.
        parse_version(server)
    models: Sequence[ServedModel] = ()
    paths = [] if path is None else [path]
    if path is not None and path.is_dir():
        # Imported here: the protobuf of tritonclient is an optional extra.
        from runtime.doctor.repository import examine_repository

        models = examine_repository(path)
        paths = [file for model in models for file in model.files]
    files = [examine_file(file, tensorrt, device) for file in paths]
    return diagnose(examine_machine(torch), files, server, models, device)


def diagnose(
    machine: ExaminedMachine,
    files: Sequence[FileFacts] = (),
    server: str | None = None,
    models: Sequence["ServedModel"] = (),
    device: str | None = None,
) -> Diagnosis:
    """The verdicts on facts. models: of the repository that the files are in. device: that is to
    run the files, or None."""
    problems, warnings = machine.problems, machine.warnings
    if device == "gpu" and machine.lacks_cuda:
        # A file may be made on one machine and served on another: it is judged by its own nodes.
        about_machine = server is None and not files and not models
        (problems if about_machine else warnings).append(WITHOUT_CUDA)
    for file in files:
        problems += file.problems
        warnings += file.warnings
        if None not in (device, file.device) and file.device != device:
            warnings.append(
                f"{file.path!r} was made for the {file.device}: export it with --device {device}"
            )
    # The name tells which model of the repository a sentence is about.
    for model in models:
        problems += [f"{model.name}: {sentence}" for sentence in model.problems]
        warnings += [f"{model.name}: {sentence}" for sentence in model.warnings]
    # What a server would say comes last: what fails here is mended first.
    served = []
    for file in files:
        loads = None if server is None else loads_under(server, file.lowest_onnxruntime)
        served.append(ServedFile(**vars(file), loads_on_server=loads))
        sentence = None if server is None else file.server_problem(server)
        if sentence is not None:
            # What is not known is no problem yet.
            (warnings if loads is None else problems).append(sentence)
    return Diagnosis(
        machine=machine,
        files=tuple(served),
        models=tuple(
            RepositoryModel(model.name, model.backend, model.versions) for model in models
        ),
        server=server,
        problems=tuple(dict.fromkeys(problems)),  # file and machine may have the same
        warnings=tuple(warnings),
    )
