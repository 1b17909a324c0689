"""What a user chooses about the server, checked before anything is loaded."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from exporters.replacing import check_version_folder
from marrq.errors import MarrqError

BACKEND_FILES = {"onnxruntime": None, "python": Path(__file__).with_name("python_backend.py")}
"""Backends, and the model.py that a backend needs beside the ONNX file."""

NEEDS_TRITONCLIENT = (
    "a Triton repository is written by tritonclient's protobuf, which is not installed: pip "
    "install '.[serve]' in the clone"
)

NAME = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Serving:
    """Choices about the server. Raises MarrqError for a name or backend that is wrong.

    name: of the model; clients address the model by it.
    model_version: a server takes the highest.
    backend: a key of BACKEND_FILES.
    instances: copies of the model that run at once, on each GPU.
    threads: of one operator; None for one thread a core.
    max_batch: images in one run.
    queue_delay: microseconds that a request may wait for others to join it.
    bench: JSON of `marrq bench`, whose fastest batch sizes are preferred; None for no preference.
    preprocess: the model takes uint8 images instead of normalized pixels.
    """

    name: str = "vit"
    model_version: int = 1
    backend: str = "onnxruntime"
    instances: int = 1
    threads: int | None = None
    max_batch: int = 8
    queue_delay: int = 0
    bench: Path | None = None
    preprocess: bool = False

    def __post_init__(self) -> None:
        # A name such as "../x" would leave the repository.
        if NAME.fullmatch(self.name) is None:
            raise MarrqError(
                "a model's name is part of its address: letters, digits and '_', single '.' and "
                f"'-' between: got {self.name!r}"
            )
        if self.backend not in BACKEND_FILES:
            raise MarrqError(
                f"unknown backend {self.backend!r}: choose one of {', '.join(BACKEND_FILES)}"
            )

    def version_folder(self, repository: Path) -> Path:
        """The folder of the model's version."""
        return repository / self.name / str(self.model_version)

    def check_repository(self, repository: Path, force: bool) -> None:
        """Raise MarrqError if the version exists and may not be replaced, or if the package that
        writes a repository is not installed."""
        check_version_folder(self.version_folder(repository), force)
        if find_spec("tritonclient") is None:
            raise MarrqError(NEEDS_TRITONCLIENT)
