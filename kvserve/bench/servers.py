"""Servers to put a load on: kvserve itself and llama-server, started alike and ended after use."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from kvserve.errors import WorkerFailed

_START_SECONDS = 300.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Settings:
    """What both servers are started with, in their common terms."""

    model: str
    n_ctx: int
    n_parallel: int
    cache_type_k: str
    cache_type_v: str
    n_threads: int | None
    gpu_layers: int


@dataclass(frozen=True, slots=True)
class Server:
    """A way to start one server: its name in tables, its arguments but for the port, and the path
    that answers 200 when it serves."""

    name: str
    argv: tuple[str, ...]
    ready_path: str


def kvserve(settings: Settings) -> Server:
    """This project's own server."""
    argv = [sys.executable, "-m", "kvserve", "start", "--model", settings.model]
    argv += ["--ctx", str(settings.n_ctx), "--parallel", str(settings.n_parallel)]
    argv += ["--cache-type", f"{settings.cache_type_k}:{settings.cache_type_v}"]
    argv += ["--log-level", "warning"]
    if settings.gpu_layers == 0:
        argv += ["--device", "cpu"]
    if settings.n_threads is not None:
        argv += ["--threads", str(settings.n_threads)]
    return Server("kvserve", tuple(argv), "/health/ready")


def llama_server(program: str, settings: Settings, modes: Sequence[str] = ()) -> Server:
    """llama-server with the same model, context, types and threads; `modes` are further flags."""
    argv = [program, "-m", settings.model, "-c", str(settings.n_ctx)]
    argv += ["-np", str(settings.n_parallel), "-ngl", str(settings.gpu_layers), "-fa", "on"]
    argv += ["-ctk", settings.cache_type_k, "-ctv", settings.cache_type_v]
    argv += ["-b", "512", "-ub", "512", "--no-webui", "--log-disable"]
    if settings.n_threads is not None:
        argv += ["-t", str(settings.n_threads), "-tb", str(settings.n_threads)]
    return Server(" ".join(["llama-server", *modes]), (*argv, *modes), "/health")


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """Start a server on a free port and give its base URL (with `/v1`); it ends with the block.

    Raises WorkerFailed, with its last words, where it does not come up.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        extra = ["--state-dir", folder] if server.name == "kvserve" else []
        with output.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - the user's own programs
                [*server.argv, "--port", str(port), *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            _wait_until_ready(server, process, port, output)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(process)


def _wait_until_ready(
    server: Server, process: subprocess.Popen[bytes], port: int, output: Path
) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            url = f"http://127.0.0.1:{port}{server.ready_path}"
            if httpx.get(url, trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(_POLL_SECONDS)
    words = output.read_text(errors="replace").strip().splitlines()[-5:]
    raise WorkerFailed(f"{server.name} did not come up: {' / '.join(words)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
