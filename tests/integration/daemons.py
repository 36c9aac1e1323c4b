"""Real daemons in processes of their own, for tests that use kvserve as its users do."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

START_SECONDS = 90


def run_cli(*arguments: str, state_dir: Path, timeout: float = 60) -> subprocess.CompletedProcess:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "kvserve", *arguments, "--state-dir", str(state_dir)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Daemon:
    """`kvserve start` in the foreground of a process, on a free port."""

    def __init__(
        self, state_dir: Path, *arguments: str, module: str = "kvserve", **environ: str
    ) -> None:
        self.state_dir = state_dir
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "start", "--port", "0", "--state-dir",
             str(state_dir), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **environ},
        )  # fmt: skip
        self.output: list[str] = []
        self._serving = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line.rstrip("\n"))
            if line.startswith("ask "):
                self._serving.set()
        self._serving.set()

    def wait_until_serving(self) -> "Daemon":
        assert self._serving.wait(START_SECONDS), "\n".join(self.output)
        assert self.process.poll() is None, "\n".join(self.output)
        return self

    @property
    def url(self) -> str:
        line = next(line for line in self.output if line.startswith("serving "))
        found = re.search(r"http://\S+(?=/v1)", line)
        assert found
        return found[0]

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def status(self) -> dict[str, Any]:
        done = run_cli("status", "--json", "--port", self.port, state_dir=self.state_dir)
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, trust_env=False)

    def __enter__(self) -> "Daemon":
        return self.wait_until_serving()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def process_runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def wait_for_end(pid: int, seconds: float = 10) -> bool:
    """Wait for a process that is no child of ours to end."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return True
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)
