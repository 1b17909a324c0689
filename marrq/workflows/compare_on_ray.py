"""The runs of a comparison on Ray: an actor for each CPU or GPU of the cluster does runs one after
the other, as one process would.

What a run gives does not depend on who does it (marrq/distributed.py), so the report is the same,
times and memory apart. Each actor has one thread, or one GPU. Model and images must lie under the
same path wherever actors run, and marrq be the same version."""

import logging
import os
import platform
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marrq.errors import MarrqError

if TYPE_CHECKING:
    from marrq.cli.compare import Combination, Task

PACKAGES = ("marrq", "torch", "timm", "transformers")
REACHABLE_SECONDS = 5


class Worker:
    """A runner in a process of Ray's."""

    def prepare(self, task: "Task", folder: Path, versions: dict[str, str]) -> None:
        """Load model and images. folder: where the command runs, which relative paths start from.
        Raises MarrqError, naming this machine, where it has other versions than the command, or not
        the model or the images."""
        from marrq.cli import check_packages
        from marrq.cli.compare import Runner

        with suppress(OSError):  # a machine without that folder can still do with absolute paths
            os.chdir(folder)
        try:
            check_packages()  # Ray puts the command's folder in front of the path
            if versions != _versions():
                raise MarrqError(f"it has {_versions()}, the command {versions}: install the same")
            self.runner = Runner(task)
        except MarrqError as error:
            raise MarrqError(
                f"a worker of Ray's on {platform.node()} cannot start: {error}"
            ) from error

    def run(self, combination: "Combination") -> dict[str, Any]:
        """Do a run."""
        return self.runner.run(combination)


def runs_on_ray(
    address: str, task: "Task", combinations: "list[Combination]"
) -> Iterator[dict[str, Any]]:
    """The runs as they are done. address: local, or that of a cluster. Raises MarrqError where Ray
    is not installed or cannot be reached, where an actor is lost, and for an error that is none of
    ours; ours come as they are."""
    if not combinations:
        return
    ray = _connected(address)
    again = "runs that were done are in the file, repeat the command for the others"
    try:
        yield from _runs(ray, _workers(ray, task, len(combinations)), combinations)
    except ray.exceptions.RayTaskError as error:
        from runtime.errors import BenchError

        if isinstance(error.cause, (MarrqError, BenchError, OSError)):
            raise error.cause from error
        raise MarrqError(
            f"a run on Ray failed with {type(error.cause).__name__}: {error.cause}; {again}"
        ) from error
    except ray.exceptions.RayError as error:
        raise MarrqError(
            f"a run on Ray failed ({str(error).strip().splitlines()[0]}): {again}"
        ) from error
    finally:
        ray.shutdown()


def _workers(ray: Any, task: "Task", most: int) -> dict[Any, Any]:
    """Actors, one for each CPU or GPU, by the answer that says that they are prepared."""
    kind = "GPU" if task.device == "cuda" else "CPU"
    count = min(int(ray.cluster_resources().get(kind, 0)), most)
    if not count:
        raise MarrqError(
            f"the cluster of Ray has no {kind}: choose another --device, or leave --ray out"
        )
    actor = ray.remote(Worker).options(num_cpus=1, num_gpus=int(kind == "GPU"))
    workers = [actor.remote() for _ in range(count)]
    return {worker.prepare.remote(task, Path.cwd(), _versions()): worker for worker in workers}


def _runs(
    ray: Any, busy: dict[Any, Any], combinations: "list[Combination]"
) -> Iterator[dict[str, Any]]:
    """The runs as they are done. A worker gets its first when it is prepared, so one for which the
    cluster has no place yet holds none up. It stays with a seed, whose tokens it has, then takes
    one that no other works on. busy: workers by the answer that they owe."""
    waiting, seeds, left = list(combinations), dict[Any, int](), len(combinations)
    while left:
        [answer], _ = ray.wait(list(busy))
        worker, run = busy.pop(answer), ray.get(answer)
        if waiting:
            following = min(
                waiting, key=lambda one: (one[0] != seeds.get(worker), one[0] in seeds.values())
            )
            waiting.remove(following)
            seeds[worker] = following[0]
            busy[worker.run.remote(following)] = worker
        if run is not None:
            left -= 1
            yield run


def _connected(address: str) -> Any:
    """The package, connected to the cluster, or to one of its own in this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # what Ray will do by itself one day, and until then warns of
    if (
        address == "local"
    ):  # Ray listens on all interfaces, and runs what it is sent; it reads these when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MarrqError("--ray needs Ray: pip install 'marrq[ray]'") from error
    from runtime.environment import usable_cores

    own: dict[str, Any] = (
        {"num_cpus": usable_cores(), "include_dashboard": False} if address == "local" else {}
    )
    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MarrqError(
            f"no Ray at {address!r} ({reason}): start a cluster there, or pass --ray local"
        ) from error
    return ray


def _check_reachable(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself would try for minutes."""
    if address not in ("local", "auto"):
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if not colon or not port.isdecimal():
            raise ValueError("not local, auto or HOST:PORT")
        socket.create_connection((host, int(port)), REACHABLE_SECONDS).close()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
