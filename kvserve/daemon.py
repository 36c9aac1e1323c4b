"""The wiring: settings and a model in, a served API out, in one process and one event loop."""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import structlog
import uvicorn

from kvserve import __version__
from kvserve.api.app import create_app
from kvserve.api.config import ApiConfig
from kvserve.api.malformed import JsonErrorProtocol
from kvserve.core.lifecycle import Phase
from kvserve.device.host import process_started_at
from kvserve.heartbeat import beating
from kvserve.instance import (
    Instance,
    InstancePaths,
    keep_few_passing,
    remove_instance,
    write_instance,
)
from kvserve.metrics import Metrics
from kvserve.notify import Notifier
from kvserve.supervisor.launching import Policy
from kvserve.supervisor.loop import Supervisor
from kvserve.supervisor.planning import MachinePlanner
from kvserve.supervisor.preparing import Prepared
from kvserve.supervisor.process import ProcessSpawner
from kvserve.supervisor.status import Status

log = structlog.get_logger(__name__)

_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Listening:
    """A daemon that listens: where, and with which instance record."""

    sock: socket.socket
    paths: InstancePaths
    instance: Instance


def introduce(prepared: Prepared, sock: socket.socket) -> Listening:
    """Leave the instance record of a daemon that has this socket for the other commands. Raises
    UsageError where the disk takes none."""
    settings = prepared.settings
    port = sock.getsockname()[1]
    host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"
    instance = Instance(
        pid=os.getpid(),
        process_started_at=process_started_at(os.getpid()) or 0.0,
        url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        port=port,
        model=prepared.model_id,
        admin_token=secrets.token_urlsafe(32),
    )
    paths = InstancePaths(settings.state_dir, port)
    write_instance(paths, instance)
    keep_few_passing(paths, passing=settings.port == 0)
    return Listening(sock, paths, instance)


def policy_of(prepared: Prepared) -> Policy:
    """The supervisor's limits, from the settings."""
    settings = prepared.settings
    return Policy(
        model_path=str(prepared.model.path),
        model_identity=prepared.model.identity,
        n_threads=settings.n_threads(prepared.machine.host),
        queue_limit=settings.queue_limit,
        request_timeout=settings.request_timeout,
        drain_timeout=settings.drain_timeout,
        pause_timeout=settings.pause_timeout,
        load_timeout=settings.load_timeout,
        step_timeout=settings.step_timeout,
        carry_bytes=settings.carry_bytes,
        cache_bytes=settings.cache_bytes,
        growth=settings.growth(prepared.model.shape.n_ctx_train),
        serves_below_floor=settings.below_floor == "serve",
        speculate=settings.speculation,
        n_draft_each=settings.draft_max,
        draft_path=None if prepared.draft is None else str(prepared.draft.path),
    )


async def serve(
    prepared: Prepared,
    listening: Listening,
    on_progress: Callable[[Status], None],
    on_ready: Callable[[Status], None],
) -> None:
    """Load the model, serve until a signal, end cleanly.

    `on_progress` is told several times a second how far the load is, `on_ready` once. Raises the
    KvserveError of a first load that failed.
    """
    metrics = Metrics(__version__, tuple(Phase))
    notifier = Notifier.from_environment(os.environ)
    supervisor = Supervisor(
        prepared.plan,
        policy_of(prepared),
        ProcessSpawner(listening.paths.worker_log),
        MachinePlanner(prepared.decider),
        observer=metrics,
    )
    server = _Server(_uvicorn_config(prepared, listening, supervisor, metrics))
    running = asyncio.create_task(supervisor.run())
    serving = asyncio.create_task(server.serve(sockets=[listening.sock]))
    with _signals(supervisor, notifier):
        try:
            async with beating(supervisor, notifier) as heart:
                async with _reporting(supervisor, on_progress):
                    await asyncio.wait(
                        {supervisor.first_ready, running}, return_when=asyncio.FIRST_COMPLETED
                    )
                if supervisor.first_ready.done():
                    supervisor.first_ready.result()  # raises what the first load failed with
                    on_ready(supervisor.status())
                    heart.beat()
                    await asyncio.wait({running, serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            notifier.stopping()
            await supervisor.stop()
            server.should_exit = True
            await serving
            await running
            notifier.close()


def run(
    prepared: Prepared,
    listening: Listening,
    on_progress: Callable[[Status], None],
    on_ready: Callable[[Status], None],
) -> None:
    """`serve` in an event loop of its own; the instance record goes when it ends."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(prepared, listening, on_progress, on_ready))
    finally:
        remove_instance(listening.paths, os.getpid())
        listening.sock.close()


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the supervisor must end first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(
    prepared: Prepared, listening: Listening, supervisor: Supervisor, metrics: Metrics
) -> uvicorn.Config:
    settings = prepared.settings
    app = create_app(
        supervisor,
        ApiConfig(
            model_id=prepared.model_id,
            created=int(time.time()),
            aliases=frozenset(
                {prepared.model.path.stem, prepared.model.path.name, settings.model or ""}
            ),
            api_keys=settings.api_keys,
            admin_keys=settings.admin_keys,
            admin_token=listening.instance.admin_token,
            local_only=not settings.exposed,
            reasoning_format=settings.reasoning_format,
        ),
        metrics,
    )
    return uvicorn.Config(
        app,
        http=JsonErrorProtocol,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not there on every platform
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextlib.contextmanager
def _signals(supervisor: Supervisor, notifier: Notifier) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP end the supervisor; a second one does not hurry it."""
    loop = asyncio.get_running_loop()
    stopping: set[asyncio.Task[None]] = set()

    def stop() -> None:
        notifier.stopping()
        task = loop.create_task(supervisor.stop())
        stopping.add(task)
        task.add_done_callback(stopping.discard)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def _reporting(
    supervisor: Supervisor, on_progress: Callable[[Status], None]
) -> AsyncIterator[None]:
    async def report() -> None:
        while True:
            on_progress(supervisor.status())
            await asyncio.sleep(_PROGRESS_SECONDS)

    task = asyncio.create_task(report())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
