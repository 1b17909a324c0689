"""What the user chooses about a bench, and the mistakes that show before anything is exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.choices import (
    BASELINES,
    NO_OPTIONS,
    Options,
    check_choice,
    check_flavor_on,
    check_scheme,
    suitable_flavor,
)
from marrq.artifact.scheme import read_scheme
from marrq.errors import MarrqError
from marrq.files import check_artifact
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.images.counts import GALLERY_IMAGES, PARITY_IMAGES
from marrq.workflows.provider import choose_provider
from runtime.environment import usable_cores
from runtime.measure.bench import BenchSettings
from runtime.measure.gate import Limits
from runtime.measure.latency import Plan, thread_counts
from runtime.metadata import OutputKind
from runtime.session import SessionSettings

if TYPE_CHECKING:
    from marrq.models.images import ImageSet

NO_BASELINE = "none"
"""What a user names to measure no baseline at all."""

SUFFIX = ".onnx"
"""By which a baseline that is a file is told from a misspelled flavour."""


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` measures, and how.

    flavor: in which artifacts are exported; None for the flavour that suits the scheme best.
    baselines: what to measure beside the files: float flavours of the model, fp16 and fp32, or ONNX
        files with an export of it; ("none",) for nothing. None: fp16 and fp32 if the model is at
        hand, which the report says if it is not.
    batches: batch sizes to time.
    rounds: how often each session is opened and timed, in turn with all others.
    seconds: time on each model, batch size and round.
    device: cpu or gpu, what artifacts and baselines are exported for. provider: cpu, cuda or
        tensorrt, what runs them. Of a None the other one decides; if both are, it is the CPU.
    cuda_graph: time each batch size as a recorded CUDA graph.
    weights_only: export artifacts with quantized activations without them (`folded`).
    classes: export artifacts that give features with these classes.
    threads: of one operator; None for ONNX Runtime's choice.
    throughput: also measure images per second with 1, 2, 4 … threads.
    max_drop: points of top-1, of k-NN for embeddings, that a file may lose against the baseline;
        None for no gate.
    min_cosine: least mean cosine of embeddings and dense outputs with fp32; None for no gate.
    gallery_images: of train/ that k-NN looks among, at most.
    recommend: measure every flavour of an artifact, and name the best.
    parity_images: images on which files are compared with torch; None for no comparison.
    artifacts: what ONNX files were exported from; needed for parity.
    """

    flavor: str | None = None
    baselines: tuple[str, ...] | None = None
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    seconds: float = 1.0
    device: str | None = None
    provider: str | None = None
    cuda_graph: bool = False
    weights_only: bool = False
    threads: int | None = None
    throughput: bool = False
    max_drop: float | None = None
    min_cosine: float | None = None
    gallery_images: int = GALLERY_IMAGES
    recommend: bool = False
    parity_images: int | None = None
    artifacts: tuple[Path, ...] = ()
    classes: ClassEmbeddings | None = None

    def __post_init__(self) -> None:
        # The device is a part of what follows, so a contradiction is told first.
        device, provider = self.runs_on
        if self.flavor in BASELINES:
            raise MarrqError(
                f"{self.flavor} is the float model, and no form of an artifact: pass --baseline "
                f"{self.flavor}"
            )
        if self.flavor is not None:
            check_choice(self.flavor, self.flavor_options)
            check_flavor_on(self.flavor, device)
        self._check_baselines()
        if self.recommend and self.flavor is not None:
            raise MarrqError(
                f"--recommend measures every flavour: leave out --flavor {self.flavor}"
            )
        if self.cuda_graph and provider != "cuda":
            raise MarrqError(
                f"--cuda-graph is of the CUDA provider, not of {provider}: pass --device gpu"
            )
        if not self.batches or min(*self.batches, self.rounds) < 1:
            raise MarrqError(
                "a bench has one batch size or more and one round or more: got batches="
                f"{self.batches}, rounds={self.rounds}"
            )
        # Every comparison with NaN is false.
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise MarrqError(f"--max-drop is a number of points from 0 to 100: got {self.max_drop}")
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise MarrqError(f"--min-cosine is a number from -1 to 1: got {self.min_cosine}")
        if self.artifacts and self.parity_images is None:
            raise MarrqError("--artifact is what --parity compares a file with: add --parity")

    def _check_baselines(self) -> None:
        named = self.baselines or ()
        for name in named:
            # A file that does not exist is told by its name, if that looks like a file's.
            is_file = name.endswith(SUFFIX) or Path(name).is_file()
            if is_file and not Path(name).is_file():
                raise MarrqError(f"the baseline {name!r} does not exist: give an ONNX file")
            if not is_file and name not in (*BASELINES, NO_BASELINE):
                raise MarrqError(
                    f"unknown baseline {name!r}: choose one of {', '.join(BASELINES)}, none, or an "
                    "ONNX file"
                )
        if NO_BASELINE in named and len(named) > 1:
            raise MarrqError("--baseline none leaves out all baselines: name it alone")
        if self.max_drop is not None and self.wanted_baselines == ():
            raise MarrqError("--max-drop compares with a baseline: leave out --baseline none")
        if self.min_cosine is not None and self.wanted_baselines == ():
            raise MarrqError("--min-cosine compares with fp32: leave out --baseline none")

    @property
    def wanted_baselines(self) -> tuple[str, ...] | None:
        """Flavours and files to measure; None for the default ones."""
        # What is asked for must be there, and what is taken by default need not be, so the default
        # is not spelled out here.
        return () if self.baselines == (NO_BASELINE,) else self.baselines

    @property
    def limits(self) -> Limits:
        """What candidates are held to."""
        return Limits(self.max_drop, self.min_cosine)

    @property
    def runs_on(self) -> tuple[str, str]:
        """Device and provider."""
        return choose_provider(self.device, self.provider)

    @property
    def flavor_options(self) -> Options:
        """Of the flavour that artifacts are exported in."""
        return {"weights_only": True} if self.weights_only else NO_OPTIONS

    @property
    def session(self) -> SessionSettings:
        """How every file is opened."""
        _, provider = self.runs_on
        return SessionSettings(provider, self.threads)

    @property
    def settings(self) -> BenchSettings:
        """The part that the measuring itself has to know."""
        # Up to the threads asked for, or to the cores that this process may use.
        counts = thread_counts(self.threads or usable_cores()) if self.throughput else ()
        plan = Plan(self.batches, self.rounds, self.seconds, self.cuda_graph)
        return BenchSettings(self.session, plan, counts, self.limits, self.recommend)


DEFAULTS = BenchOptions()


def images_of_parity(parity: bool, images: int | None) -> int | None:
    """How many images parity is measured on; None without parity. Raises MarrqError for a number
    without it."""
    if not parity and images is not None:
        raise MarrqError(f"--parity-images {images} is a number for --parity: add --parity")
    return (images or PARITY_IMAGES) if parity else None


def check_drop(images: "ImageSet", labels: tuple[str, ...]) -> None:
    """Raise MarrqError if right answers on the images cannot be counted. labels: of the model."""
    if labels:
        images.labelled()
    elif not images.targets:
        raise MarrqError(
            f"--max-drop counts right answers, and {images.why_unlabelled}, or pass --min-cosine"
        )


def check_limits(limits: Limits, kind: OutputKind, is_alone: bool) -> None:
    """Raise MarrqError for a limit of what a model does not give.

    kind: of its judged output. is_alone: whether it has no other output."""
    if limits.max_drop is not None and kind == "dense":
        raise MarrqError(
            "--max-drop counts right answers, and the model gives dense outputs alone: pass "
            "--min-cosine"
        )
    # Outputs beside the logits are held to the cosine.
    if limits.min_cosine is not None and kind == "classes" and is_alone:
        raise MarrqError(
            "--min-cosine is for embeddings and dense outputs, and the model gives logits of "
            "classes: pass --max-drop"
        )


def check_paths(paths: Sequence[Path], options: BenchOptions) -> None:
    """Raise MarrqError for a path that cannot be measured, and for an option that no path has a
    use for."""
    if not paths:
        raise MarrqError("there is nothing to measure: give an artifact or an ONNX file")
    device, _ = options.runs_on
    for path in paths:
        if not path.exists():
            raise MarrqError(f"{str(path)!r} does not exist: give an artifact or an ONNX file")
        if path.is_dir():
            check_artifact(path)
            scheme = read_scheme(path)
            if scheme is not None and not options.recommend:
                flavor = options.flavor or suitable_flavor(scheme, device)
                check_scheme(scheme, flavor, options.flavor_options, device)
    # A file has been exported already; only an artifact can be exported in another flavour.
    about_exports = {
        "--recommend": options.recommend,
        f"--flavor {options.flavor}": options.flavor is not None,
        "--weights-only": options.weights_only,
        "--classes": options.classes is not None,
    }
    option = next((name for name, given in about_exports.items() if given), None)
    if option is not None and all(path.is_file() for path in paths):
        raise MarrqError(
            f"{option} is about an artifact, and {str(paths[0])!r} is exported already: give the "
            f"artifact, or leave out {option}"
        )
