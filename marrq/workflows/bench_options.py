"""What the user chooses about a bench, and the mistakes that show before anything is exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.choices import NO_OPTIONS, check_baseline, check_choice, check_scheme
from marrq.artifact.scheme import read_scheme
from marrq.errors import MarrqError
from marrq.files import check_artifact
from runtime.environment import usable_cores
from runtime.measure.bench import BenchSettings
from runtime.measure.latency import Plan, thread_counts
from runtime.session import SessionSettings


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` measures, and how.

    flavor: in which artifacts are exported; None for the flavour that suits the scheme best.
    baselines: float flavours of the model to measure beside the files, of fp16 and fp32.
    batches: batch sizes to time.
    rounds: how often each session is opened and timed, in turn with all others.
    seconds: time on each model, batch size and round.
    provider: cpu, cuda or tensorrt.
    threads: of one operator; None for ONNX Runtime's choice.
    throughput: also measure images per second with 1, 2, 4 … threads.
    max_drop: points of top-1 that a file may lose against the baseline; None for no gate.
    recommend: measure every flavour of an artifact, and name the best.
    parity_images: images on which files are compared with torch; None for no comparison.
    artifacts: what ONNX files were exported from; needed for parity.
    """

    flavor: str | None = None
    baselines: tuple[str, ...] = ("fp16", "fp32")
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    seconds: float = 1.0
    provider: str = "cpu"
    threads: int | None = None
    throughput: bool = False
    max_drop: float | None = None
    recommend: bool = False
    parity_images: int | None = None
    artifacts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.flavor is not None:
            check_choice(self.flavor, NO_OPTIONS)
        for baseline in self.baselines:
            check_baseline(baseline)
        if self.recommend and self.flavor is not None:
            raise MarrqError(
                f"--recommend measures every flavour: leave out --flavor {self.flavor}"
            )

    @property
    def session(self) -> SessionSettings:
        """How every file is opened."""
        return SessionSettings(self.provider, self.threads)

    @property
    def settings(self) -> BenchSettings:
        """The part that the measuring itself has to know."""
        # Up to the threads asked for, or to the cores that this process may use.
        counts = thread_counts(self.threads or usable_cores()) if self.throughput else ()
        plan = Plan(self.batches, self.rounds, self.seconds)
        return BenchSettings(self.session, plan, counts, self.max_drop, self.recommend)


DEFAULTS = BenchOptions()


def check_paths(paths: Sequence[Path], options: BenchOptions) -> None:
    """Raise MarrqError for a path that cannot be measured, and for an option that no path has a
    use for."""
    for path in paths:
        if not path.exists():
            raise MarrqError(f"{str(path)!r} does not exist: give an artifact or an ONNX file")
        if path.is_dir():
            check_artifact(path)
            scheme = read_scheme(path)
            if scheme is not None and options.flavor is not None:
                check_scheme(scheme, options.flavor)
    # A file has been exported already; only an artifact can be exported in another flavour.
    if all(path.is_file() for path in paths) and (options.recommend or options.flavor is not None):
        option = "--recommend" if options.recommend else f"--flavor {options.flavor}"
        raise MarrqError(
            f"{option} is about an artifact, and {str(paths[0])!r} is exported already: give the "
            f"artifact, or leave out {option}"
        )
