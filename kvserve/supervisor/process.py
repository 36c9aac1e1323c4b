"""Spawning and ending a worker: a process in a group of its own, with one socket to the daemon.

The worker's standard error is a file; its end is the process's last words.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from kvserve.core.plan import Launch
from kvserve.errors import WorkerFailed
from kvserve.ipc.channel import DaemonChannel, ProtocolError
from kvserve.ipc.messages import FromWorker, ToWorker, Transcode, Transcoded
from kvserve.logs import open_private
from kvserve.supervisor.exits import Exit
from kvserve.supervisor.loads import worker_environment
from kvserve.supervisor.states import Worker

WORKER_ARGV = (sys.executable, "-m", "kvserve.worker")
_AWAKE_SECONDS = 10.0
_LAST_WORDS_BYTES = 4096
_LOG_LIMIT_BYTES = 8 * 2**20


class ProcessWorker:
    """A running worker process."""

    def __init__(
        self, process: asyncio.subprocess.Process, channel: DaemonChannel, log: Path, log_from: int
    ) -> None:
        self._process = process
        self._channel = channel
        self._log = log
        self._log_from = log_from
        self._killed_for: str | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet, as far as is known."""
        return self._process.returncode is None

    def send(self, message: ToWorker) -> None:
        """Queue a frame."""
        self._channel.send(message)

    async def first_frame(self) -> None:
        """Return when it sent anything, or ended; `receive` still gives that."""
        await self._channel.first_frame()

    async def receive(self) -> FromWorker | None:
        """The next frame; a worker that sends nonsense is killed and reads as ended."""
        try:
            return await self._channel.receive()
        except ProtocolError as error:
            self._append_to_log(str(error))
            self.kill()
            return None

    def kill(self, why: str | None = None) -> None:
        """SIGKILL to the worker and whatever it started; `why` becomes the cause of its end."""
        if self.alive:
            self._killed_for = self._killed_for or why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> Exit:
        """Wait for the end. What the worker left running in its group is killed."""
        returncode = await self._process.wait()
        self.kill()
        self._channel.close()
        return Exit(returncode, self._last_words(), self._killed_for)

    def _last_words(self) -> str:
        try:
            with self._log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_from, end - _LAST_WORDS_BYTES))
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""

    def _append_to_log(self, line: str) -> None:
        with contextlib.suppress(OSError), open_private(self._log) as log:
            log.write(f"{line}\n".encode())


class ProcessSpawner:
    """Starts worker processes. `argv` is the program; the socket's number is appended.

    One process may be started ahead of its time: until it is told to load, a worker imports its
    modules, which takes a second, and touches no GPU.
    """

    def __init__(self, log: Path, argv: Sequence[str] = WORKER_ARGV) -> None:
        self._log = log
        self._argv = tuple(argv)
        self._ahead: tuple[dict[str, str], ProcessWorker] | None = None
        self._hearing: asyncio.Future[FromWorker | None] | None = None
        self._lock = asyncio.Lock()

    async def spawn_ahead(self, launch: Launch) -> None:
        """Have a process ready for the next `spawn`: returns when it has imported its modules, or
        cannot. Never raises: `spawn` will tell what is wrong."""
        async with self._lock:
            if self._ahead is not None:
                return
            environment = worker_environment(launch.backend)
            try:
                worker = await self._start(environment)
            except WorkerFailed:
                return
            self._ahead = environment, worker
        # `Awake`, or why it cannot be used: whoever `spawn`s it reads that.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(worker.first_frame(), _AWAKE_SECONDS)

    async def transcode_ahead(self, message: Transcode) -> None:
        """Have the process that is ready for the next `spawn` rewrite sequences: returns when it
        has, or is no more, or `spawn` took it meanwhile."""
        if self._ahead is None:
            return
        worker = self._ahead[1]
        worker.send(message)
        while True:
            hearing = self._hearing = asyncio.ensure_future(worker.receive())
            try:
                await asyncio.wait({hearing})
            finally:
                hearing.cancel()
            if hearing.cancelled() or isinstance(hearing.result(), Transcoded):
                return
            if hearing.result() is None:
                self._ahead = None
                await worker.wait()
                return

    def tell_ahead(self, message: ToWorker) -> None:
        """Send a frame to the process that is ready for the next `spawn`, if there is one."""
        if self._ahead is not None:
            self._ahead[1].send(message)

    async def spawn(self, launch: Launch) -> Worker:
        """Start a worker for a launch. Raises WorkerFailed where the system refuses."""
        environment = worker_environment(launch.backend)
        async with self._lock:
            if self._ahead is not None:
                fits, worker = self._ahead[0] == environment, self._ahead[1]
                self._ahead = None
                if self._hearing is not None:
                    self._hearing.cancel()
                if fits and worker.alive:
                    return worker
                worker.kill()
                await worker.wait()
            return await self._start(environment)

    async def close(self) -> None:
        """End the process that nobody came for."""
        async with self._lock:
            if self._ahead is not None:
                _, worker = self._ahead
                self._ahead = None
                worker.kill()
                await worker.wait()

    async def _start(self, environment: dict[str, str]) -> ProcessWorker:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise WorkerFailed(f"no worker process could be started: {error}") from error
        try:
            with self._open_log() as log:
                log_from = log.tell()
                process = await asyncio.create_subprocess_exec(
                    *self._argv,
                    "--fd",
                    str(theirs.fileno()),
                    "--parent",
                    str(os.getpid()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    env=environment,
                )
        except OSError as error:
            ours.close()
            raise WorkerFailed(f"no worker process could be started: {error}") from error
        finally:
            theirs.close()
        return ProcessWorker(process, await DaemonChannel.open(ours), self._log, log_from)

    def _open_log(self) -> BinaryIO:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self._log.stat().st_size > _LOG_LIMIT_BYTES:
                self._log.replace(self._log.with_suffix(self._log.suffix + ".1"))
        return open_private(self._log)
