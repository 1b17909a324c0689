"""`marrq compare --ray`: the same runs, by several workers."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from marrq.cli import main
from marrq.errors import MarrqError
from marrq.methods.spec import parse_method
from marrq.schemes import parse_scheme
from marrq.workflows.compare import Combination, Task
from marrq.workflows.compare_on_ray import runs_on_ray

# As marrq does for a Ray of its own; Ray reads them when it is imported.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,  # Ray takes seconds to start
    # Ray leaves sockets and files to the end of the process, and announces its own changes.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def command(tiny: str, images: Path, file: Path, *options: str) -> list[str]:
    few = split("--samples 8 --seeds 2 --scheme W4A8 --scheme W4A4 --method gptq --method marr")
    return ["compare", tiny, "--data", str(images), "-o", str(file), *few, *options]


def combination(seed: int) -> Combination:
    return Combination(seed, parse_scheme("W4A8"), parse_method("rtn"))


def runs(file: Path) -> list[dict[str, Any]]:
    report = json.loads(file.read_text())
    return [
        {name: value for name, value in run.items() if name not in ("seconds", "peak_memory_mb")}
        for run in report["runs"]
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray with two CPUs, whose processes run in another folder than the tests."""
    from ray.cluster_utils import Cluster

    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield started.address
    started.shutdown()


@pytest.fixture(scope="module")
def alone(tiny: str, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one process."""
    file = tmp_path_factory.mktemp("alone") / "alone.json"
    assert main(command(tiny, image_folder, file)) == 0
    return file


def test_two_workers_give_what_one_process_gives_and_do_only_what_is_missing(
    cluster: str,
    alone: Path,
    tiny: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(image_folder.parent)  # a relative path starts there for the workers too
    together = tmp_path / "together.json"
    relative = command(tiny, image_folder, together, "--data", image_folder.name, "--ray", cluster)
    expected = json.loads(alone.read_text())
    expected["data"]["path"] = image_folder.name
    assert main(relative) == 0
    assert runs(together) == runs(alone)
    report = json.loads(together.read_text())
    assert {**report, "runs": []} == {**expected, "runs": []}
    kept = report | {"runs": report["runs"][::2]}
    together.write_text(json.dumps(kept))
    assert main(relative) == 0
    assert json.loads(together.read_text())["runs"][:4] == kept["runs"], (
        "what was there is not done again"
    )
    assert runs(together) == runs(alone)[::2] + runs(alone)[1::2]


def test_a_ray_of_its_own_gives_the_same(
    alone: Path, tiny: str, image_folder: Path, tmp_path: Path
):
    assert main(command(tiny, image_folder, tmp_path / "c.json", "--ray", "local")) == 0
    assert runs(tmp_path / "c.json") == runs(alone)


LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""

WATCHED = """
import os, sys
from marrq.workflows.compare_on_ray import _connected
ray = _connected("local")
ray.get(ray.remote(lambda: 1).remote())
print(os.environ["RAY_AUTH_TOKEN"], ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.readline()
ray.shutdown()
"""


def listening_sockets(parent: int) -> set[str]:
    """Addresses that a process and its descendants listen on, as the kernel writes them."""
    of = {
        int(stat.parent.name): int(stat.read_text().rpartition(")")[2].split()[1])
        for stat in Path("/proc").glob("[0-9]*/stat")
    }
    family = {parent}
    while more := {pid for pid, above in of.items() if above in family} - family:
        family |= more
    inodes = set()
    for pid in family:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1] for line in lines if line[3] == LISTENING and line[9] in inodes}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the sockets from /proc")
def test_a_ray_of_its_own_listens_on_the_loopback_interface_and_wants_a_token(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if "RAY_" not in name}
    # What a user may have set, and what would let everyone in.
    environment["RAY_AUTH_MODE"] = "disabled"
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    token, address = process.stdout.readline().split()
    found = listening_sockets(process.pid)
    assert len(found) >= 4
    # 127.0.0.1 as such, and within IPv6.
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:", f"{'0' * 24}01000000:")
    assert [one for one in found if not one.startswith(loopback)] == []
    stranger = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('in')"
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = subprocess.run(
        [sys.executable, "-c", stranger],
        capture_output=True,
        text=True,
        env=environment | wrong | {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"},
        timeout=120,
    )
    assert refused.returncode != 0
    assert "in" not in refused.stdout.split()
    assert token not in refused.stdout + refused.stderr
    process.communicate("\n", timeout=60)


def test_a_ray_that_strangers_could_reach_is_not_started(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(MarrqError, match=f"Ray was imported without {name}="):
                list(runs_on_ray("local", Task("demo", "demo", 8, "cpu"), [combination(0)]))
    # A version of Ray that does not heed the settings.
    nodes = [{"NodeManagerAddress": "192.0.2.7"}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(MarrqError, match=r"listens on 192\.0\.2\.7, which others may reach"):
        list(runs_on_ray("local", Task("demo", "demo", 8, "cpu"), [combination(0)]))
    assert not ray.is_initialized()


def test_a_worker_for_which_the_cluster_has_no_place_holds_nothing_up(
    cluster: str, alone: Path, tiny: str, image_folder: Path, tmp_path: Path
):
    class Idle:
        pass

    ray.init(address=cluster, namespace="tests", log_to_driver=False)
    ray.remote(Idle).options(num_cpus=1, name="idle", lifetime="detached").remote()
    ray.shutdown()
    assert main(command(tiny, image_folder, tmp_path / "c.json", "--ray", cluster)) == 0
    assert runs(tmp_path / "c.json") == runs(alone)
    ray.init(address=cluster, namespace="tests", log_to_driver=False)
    ray.kill(ray.get_actor("idle"))
    ray.shutdown()


def test_an_error_of_a_worker_is_its_sentence_and_what_was_done_is_kept(
    cluster: str, tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "c.json"
    options = ["--method", "gptq,lowrank=srr:4000", "--seeds", "1", "--ray", cluster]
    assert main(command(tiny, image_folder, file, *options)) == 1
    assert capsys.readouterr().err.startswith(
        "marrq: blocks.0.attn.qkv: the rank of srr:4000 is larger than a weight"
    )
    assert {run["method"] for run in runs(file)} <= {"gptq", "marr-stream"}
    assert runs(file), "the third run fails, after at least one of the two before it"


def test_an_error_that_is_none_of_ours_is_a_sentence_too(
    cluster: str, tiny: str, image_folder: Path
):
    task = Task(tiny, str(image_folder), 8, "cpu")
    with pytest.raises(
        MarrqError,
        match="a run on Ray failed with AttributeError: 'str' object has no attribute 'lowrank';",
    ):
        list(runs_on_ray(cluster, task, [replace(combination(0), method="no method")]))


def test_a_folder_that_a_worker_does_not_have_is_named_with_the_machine(cluster: str, tiny: str):
    task = Task(tiny, "/no/images", 8, "cpu")
    with pytest.raises(
        MarrqError,
        match=r"a worker of Ray's on .* cannot start: data folder '/no/images' does not exist",
    ):
        list(runs_on_ray(cluster, task, [combination(0)]))


def kill_a_worker(file: Path) -> None:
    """As soon as a run is in the file."""
    while not file.exists():
        time.sleep(0.01)
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if line.read_bytes().startswith(b"ray::Worker"):
                os.kill(int(line.parent.name), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_command_with_a_sentence_and_what_was_done_is_kept(
    cluster: str, tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "c.json"
    killer = threading.Thread(target=kill_a_worker, args=(file,), daemon=True)
    killer.start()
    assert main(command(tiny, image_folder, file, "--seeds", "9", "--ray", cluster)) == 1
    killer.join()
    assert "a run on Ray failed" in capsys.readouterr().err
    assert 1 <= len(runs(file)) < 36


def test_an_address_without_ray_is_one_sentence(
    tiny: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with socket.socket() as bound:  # to a port on which nothing listens
        bound.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{bound.getsockname()[1]}", "nowhere"):
            start = time.monotonic()
            assert main(command(tiny, image_folder, tmp_path / "c.json", "--ray", address)) == 1
            error = capsys.readouterr().err
            assert f"no Ray at '{address}' (" in error
            assert "start a cluster there, or pass --ray local" in error
            assert time.monotonic() - start < 30


def test_ray_is_needed_for_its_option_alone(
    monkeypatch: pytest.MonkeyPatch,
    tiny: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setitem(sys.modules, "ray", None)
    few = command(tiny, image_folder, tmp_path / "c.json", "--seeds", "1")
    assert main([*few, "--ray", "local"]) == 1
    assert "--ray needs Ray: pip install '.[ray]' in the clone" in capsys.readouterr().err
    assert main(few) == 0
