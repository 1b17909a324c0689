"""A real Triton Inference Server for the tests.

The wheel nvidia-pytriton carries the server's binary with its python backend. The tests start that
binary without the wheel's own Python wrapper. The wheel wants an older numpy, so it lives in a
virtual environment of its own.

The server's flags are those of examples/serve/Dockerfile: the tests start what users start.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc
import tritonclient.http

REQUIREMENTS = ("nvidia-pytriton==0.7.0", "onnxruntime")
DOCKERFILE = Path(__file__).parents[1] / "examples" / "serve" / "Dockerfile"
PATIENCE = 60


@dataclass(frozen=True)
class Installation:
    """A server that can be started.

    bin: of the virtual environment. packages: its site-packages. server: a copy of the wheel's
    server folder.
    """

    bin: Path
    packages: Path
    server: Path


def install(folder: Path) -> Installation:
    """Make the virtual environment with the server, if it is not there yet."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = folder / "-".join((*REQUIREMENTS, version))
    packages = place / "lib" / f"python{version}" / "site-packages"
    made = Installation(place / "bin", packages, place / "server")
    if (place / "complete").exists():
        return made
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    subprocess.run(
        [made.bin / "python", "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True
    )
    shutil.copytree(packages / "pytriton" / "tritonserver", made.server)
    backend = made.server / "backends" / "python"
    shutil.copy(
        made.server / "python_backend_stubs" / version / "triton_python_backend_stub", backend
    )
    for program in (backend / "triton_python_backend_stub", made.server / "bin" / "tritonserver"):
        program.chmod(0o755)
    # Written last: an environment without this file was interrupted, and is made again.
    (place / "complete").touch()
    return made


@dataclass(frozen=True)
class Server:
    """A server that runs. http, grpc: HOST:PORT. log: what the server has written."""

    http: str
    grpc: str
    log: Path
    process: subprocess.Popen[bytes]

    def http_client(self) -> tritonclient.http.InferenceServerClient:
        return tritonclient.http.InferenceServerClient(self.http)

    def grpc_client(self) -> tritonclient.grpc.InferenceServerClient:
        return tritonclient.grpc.InferenceServerClient(self.grpc)

    def serves(self, name: str, version: str = "") -> bool:
        with self.http_client() as client:
            return bool(client.is_model_ready(name, version))

    def wait_for(self, name: str, version: str = "") -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.serves(name, version):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


def documented_flags(repository: Path) -> list[str]:
    """The server's flags in the Dockerfile, with another repository."""
    [command] = [
        line.removeprefix("CMD ")
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("CMD ")
    ]
    program, *flags = json.loads(command)
    assert program == "tritonserver"
    return [
        flag.replace("--model-repository=/models", f"--model-repository={repository}")
        for flag in flags
    ]


@contextmanager
def running(installation: Installation, repository: Path, log: Path) -> Iterator[Server]:
    """A server of the repository, on free ports of the loopback interface; stopped at the end."""
    http, grpc = free_ports(2)
    places = [
        "--http-address=127.0.0.1",
        f"--http-port={http}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc}",
    ]
    flags = [
        *documented_flags(repository),
        *places,
        "--allow-metrics=false",
        f"--backend-directory={installation.server / 'backends'}",
    ]
    # The stub of the python backend embeds an interpreter. PATH leads the stub to the interpreter
    # of the virtual environment, LD_LIBRARY_PATH to the interpreter's library.
    libraries = (
        f"{sysconfig.get_config_var('LIBDIR')}:{installation.packages / 'nvidia_pytriton.libs'}"
    )
    environment = {
        **os.environ,
        "PATH": f"{installation.bin}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": libraries,
    }
    environment.pop("PYTHONPATH", None)
    with log.open("wb") as output:
        command = [installation.server / "bin" / "tritonserver", *flags]
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    server = Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log, process)
    try:
        wait_until_live(server)
        yield server
    finally:
        process.terminate()
        process.wait(PATIENCE)


def wait_until_live(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, server.log.read_text()
        try:
            with server.http_client() as client:
                if client.is_server_live():
                    return
        except OSError:
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports: list[int] = [listener.getsockname()[1] for listener in sockets]
    # Closed together, so that no port is found twice.
    for listener in sockets:
        listener.close()
    return ports
