"""The runs of a comparison on Ray: one worker for each CPU or GPU of the cluster, which does runs
one after the other, as one process would.

A Ray of this machine alone (`local`) lets nobody in: its processes listen on the loopback interface
and ask for a token that is made anew for each command. Ray runs what it is sent, and would listen
on all interfaces by default. A Ray that cannot be closed so is not started.

What a run gives does not depend on who does it (marrq/distributed.py), so the report is the same,
times and memory apart. A worker computes on one thread, or on one GPU. Model and images must lie
under the same path wherever workers run, and every machine needs the same version of marrq.
"""

import ipaddress
import logging
import os
import platform
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marrq.errors import MarrqError
from marrq.workflows.checks import check_packages
from marrq.workflows.compare import Combination, Runner, Task
from runtime.environment import usable_cores
from runtime.errors import BenchError

PACKAGES = ("marrq", "torch", "timm", "transformers")

# Ray reads these when it is imported. Its name for the second is historical: on every system, 0
# gives the processes of Ray the loopback address, as on systems whose firewalls ask the user.
CLOSED = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
REACHABLE_SECONDS = 5
"""How long to wait for an answer of a cluster's address."""


class Worker:
    """A `Runner` in a process that Ray starts."""

    def prepare(self, task: Task, folder: Path, versions: dict[str, str]) -> None:
        """Load model and images.

        folder: where the command runs; relative paths of the task start there.
        versions: of the command's packages.

        Raises MarrqError, naming this machine, if its versions differ, or if it has no such model
        or images.
        """
        # A machine without that folder can still do tasks with absolute paths.
        with suppress(OSError):
            os.chdir(folder)
        try:
            # Ray puts the command's folder in front of the import path.
            check_packages()
            if versions != _versions():
                raise MarrqError(f"it has {_versions()}, the command {versions}: install the same")
            self.runner = Runner(task)
        except MarrqError as error:
            raise MarrqError(
                f"a worker of Ray's on {platform.node()} cannot start: {error}"
            ) from error

    def run(self, combination: Combination) -> dict[str, Any]:
        """Do one run."""
        return self.runner.run(combination)


def runs_on_ray(
    address: str, task: Task, combinations: list[Combination]
) -> Iterator[dict[str, Any]]:
    """Do runs on a cluster, and give them as they are done.

    address: `local` for a Ray of this machine that ends with the command, `auto`, HOST:PORT or
    ray://HOST:PORT.

    Raises MarrqError if Ray is not installed or cannot be reached, if a worker is lost, and for an
    unexpected error of a worker. A worker's MarrqError, BenchError or OSError is raised as it is.
    """
    # Nothing to do: no cluster is looked for.
    if not combinations:
        return
    ray = _connected(address)
    try:
        with _errors_as_sentences(ray):
            workers = _workers(ray, task, len(combinations))
            yield from _runs(ray, workers, combinations)
    # A Ray that was started here ends; of another cluster only this client and its workers do.
    finally:
        ray.shutdown()


@contextmanager
def _errors_as_sentences(ray: Any) -> Iterator[None]:
    """Turn errors of Ray into MarrqError."""
    again = "runs that were done are in the file, repeat the command for the others"
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        # Ray wraps what a worker raised, and its cause is that error.
        if isinstance(error.cause, (MarrqError, BenchError, OSError)):
            raise error.cause from error
        raise MarrqError(
            f"a run on Ray failed with {type(error.cause).__name__}: {error.cause}; {again}"
        ) from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise MarrqError(f"a run on Ray failed ({reason}): {again}") from error


def _workers(ray: Any, task: Task, most: int) -> dict[Any, Any]:
    """Start at most so many workers, one for each CPU or GPU.

    Returns workers by the answer that each owes; the first answer says that the worker is prepared.
    """
    kind = "GPU" if task.device == "cuda" else "CPU"
    # More workers than runs would only load the model.
    count = min(int(ray.cluster_resources().get(kind, 0)), most)
    if not count:
        raise MarrqError(
            f"the cluster of Ray has no {kind}: choose another --device, or leave --ray out"
        )
    # Ray starts a worker when its CPU or GPU is free, and gives it one thread or that GPU.
    actor = ray.remote(Worker).options(num_cpus=1, num_gpus=int(kind == "GPU"))
    # All prepare at once, each in its own process.
    workers = [actor.remote() for _ in range(count)]
    return {worker.prepare.remote(task, Path.cwd(), _versions()): worker for worker in workers}


def _runs(
    ray: Any, busy: dict[Any, Any], combinations: list[Combination]
) -> Iterator[dict[str, Any]]:
    """Hand out the runs and give them as they are done.

    A worker gets its first run when it is prepared, so a worker for which the cluster has no room
    yet holds no run back. It stays with its seed, whose tokens it has, and then takes a seed that
    no other worker is at.

    busy: workers by the answer that each owes.
    """
    waiting, seeds, left = list(combinations), dict[Any, int](), len(combinations)
    while left:
        # The first answer that is there; `get` raises what the worker has raised.
        [answer], _ = ray.wait(list(busy))
        worker, run = busy.pop(answer), ray.get(answer)
        if waiting:
            following = min(waiting, key=lambda one: _preference(one, worker, seeds))
            waiting.remove(following)
            seeds[worker] = following.seed
            busy[worker.run.remote(following)] = worker
        # The answer of `prepare` is no run.
        if run is not None:
            left -= 1
            yield run


def _preference(one: Combination, worker: Any, seeds: dict[Any, int]) -> tuple[bool, bool]:
    """Smallest for the run that a worker should do next. seeds: of the workers' last runs."""
    # False is less than True: its own seed first, then a seed that nobody is at.
    return one.seed != seeds.get(worker), one.seed in seeds.values()


def _connected(address: str) -> Any:
    """The package ray, connected to the cluster or to a new Ray on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Future versions of Ray behave like this by default; present ones warn of the change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "local":
        _close_to_strangers()
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MarrqError("--ray needs Ray: pip install '.[ray]' in the clone") from error
    # The size of a cluster is its own; a local Ray gets the cores that this process may use.
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": usable_cores(), "include_dashboard": False}
    # Ray raises all of these for an address that does not work.
    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MarrqError(
            f"no Ray at {address!r} ({reason}): start a cluster there, or pass --ray local"
        ) from error
    if address == "local":
        _check_closed(ray)
    return ray


def _close_to_strangers() -> None:
    """Ask for a Ray on the loopback interface that wants a token. Raises MarrqError if that is too
    late, because Ray was imported with other settings."""
    differing = [name for name, value in CLOSED.items() if os.environ.get(name) != value]
    if "ray" in sys.modules and differing:
        raise MarrqError(
            f"Ray was imported without {differing[0]}={CLOSED[differing[0]]}, so strangers could "
            "reach it: set that before Python starts, or leave --ray out"
        )
    os.environ.update(CLOSED)
    # A token of the user's own is as good.
    if not any(os.environ.get(name) for name in TOKENS):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_closed(ray: Any) -> None:
    """Raise MarrqError, and end Ray, if it listens beyond the loopback interface: a version of Ray
    may not heed what it was asked for."""
    addresses = [node["NodeManagerAddress"] for node in ray.nodes()]
    open_to_others = [one for one in addresses if not ipaddress.ip_address(one).is_loopback]
    if open_to_others:
        ray.shutdown()
        raise MarrqError(
            f"Ray {ray.__version__} listens on {open_to_others[0]}, which others may reach: "
            "install another version of Ray, or leave --ray out"
        )


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at the address: Ray itself would try for minutes."""
    if address not in ("local", "auto"):
        # A client connects through ray://, a member of the cluster without it.
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if not colon or not port.isdecimal():
            raise ValueError("not local, auto or HOST:PORT")
        socket.create_connection((host, int(port)), REACHABLE_SECONDS).close()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
