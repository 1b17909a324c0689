"""The runs of a comparison on Ray: an actor for each CPU or GPU of the cluster does runs one after the other, as one process would.

What a run gives does not depend on who does it (marrq/threads.py), so the report is the same, times and memory apart. Each actor has one
thread, or one GPU. Model and images must lie under the same path wherever actors run, and marrq be the same version.
"""

import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from marrq.errors import MarrqError

if TYPE_CHECKING:
    from marrq.cli.compare import Combination, Task

PACKAGES = ("marrq", "torch", "timm", "transformers")


class Worker:
    """A runner in a process of Ray's. Errors of marrq come back as values: Ray would wrap them."""

    def __init__(self, task: "Task", versions: dict[str, str]) -> None:
        self.task, self.versions = task, versions

    def run(self, combination: "Combination") -> dict[str, Any] | str:
        """The run, or the sentence that says why there is none."""
        from marrq.cli.compare import Runner

        try:
            if self.versions != _versions():
                raise MarrqError(f"a worker has {_versions()}, this process {self.versions}: install the same")
            if not hasattr(self, "runner"):
                self.runner = Runner(self.task)
            return self.runner.run(combination)
        except MarrqError as error:
            return str(error)


def runs_on_ray(address: str, task: "Task", combinations: "list[Combination]") -> Iterator[dict[str, Any]]:
    """The runs as they are done. address: local, or that of a cluster. Raises MarrqError where Ray is not installed or cannot be reached,
    where a run fails, and where an actor is lost."""
    if not combinations:
        return
    ray = _connected(address)
    try:
        kind = "GPU" if task.device == "cuda" else "CPU"
        count = min(int(ray.cluster_resources().get(kind, 0)), len(combinations))
        if not count:
            raise MarrqError(f"the cluster of Ray has no {kind}: choose another --device, or leave --ray out")
        worker = ray.remote(Worker).options(num_cpus=1, num_gpus=int(kind == "GPU"))
        pool = ray.util.ActorPool([worker.remote(task, _versions()) for _ in range(count)])
        for run in pool.map_unordered(lambda actor, combination: actor.run.remote(combination), combinations):
            if isinstance(run, str):
                raise MarrqError(run)
            yield run
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise MarrqError(
            f"a run on Ray failed ({reason}): runs that were done are in the file, repeat the command for the others"
        ) from error
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """The package, connected to the cluster, or to one of its own in this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MarrqError("--ray needs Ray: pip install 'marrq[ray]'") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MarrqError(f"no Ray at {address!r}: start a cluster there, or pass --ray local") from error
    return ray


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
